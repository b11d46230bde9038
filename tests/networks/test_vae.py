"""The autoencoder against diffusers' AutoencoderKL, and what it refuses."""

import numpy as np
import pytest

from sd_numba.errors import InputError, ModelError
from sd_numba.networks.vae import Vae, VaeConfig
from tests.golden.cases import CASES, Case
from tests.golden.compare import check, golden, weights_of

TOLERANCE = 2e-4
SD1, SD2, _, THREE_LEVELS, _ = CASES


def vae(case: Case, dtype: str = "f32", packed: bool = False) -> Vae:
    weights = weights_of(case, "vae", dtype)
    weights.packed = packed
    network = Vae(weights, VaeConfig.from_dict(case.vae))
    weights.finish()
    return network


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_decode_golden(case):
    check(vae(case).decode(case.latents()), golden(case.path)["vae_decode"], TOLERANCE, case.name)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_encode_golden(case):
    check(vae(case).encode(case.image()), golden(case.path)["vae_encode"], TOLERANCE, case.name)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_moments_golden(case):
    mean, std = vae(case).encode_distribution(case.image())
    np.testing.assert_array_equal(mean, vae(case).encode(case.image()))
    check(std, golden(case.path)["vae_encode_std"], TOLERANCE, case.name)


def test_inputs_stay_as_they_are():
    network, latents, image = vae(SD1), SD1.latents(), SD1.image()
    network.decode(latents)
    network.encode(image)
    np.testing.assert_array_equal(latents, SD1.latents())
    np.testing.assert_array_equal(image, SD1.image())


def test_factor_and_scale_follow_the_config():
    assert (vae(SD1).factor, vae(SD1).config.scaling_factor) == (8, 0.18215)
    assert (vae(THREE_LEVELS).factor, vae(THREE_LEVELS).config.scaling_factor) == (4, 0.5)


def test_images_of_a_batch_are_independent():
    network, latents = vae(SD2), SD2.latents()
    together = network.decode(latents)
    for i in range(len(latents)):
        check(network.decode(latents[i : i + 1])[0], together[i], 1e-6, f"image {i}")


def test_packed_weights_change_nothing():
    check(vae(SD2, packed=True).decode(SD2.latents()), vae(SD2).decode(SD2.latents()), 1e-6, "decode")
    check(vae(SD2, packed=True).encode(SD2.image()), vae(SD2).encode(SD2.image()), 1e-6, "encode")


@pytest.mark.parametrize(("dtype", "tolerance"), [("f16", 5e-3), ("bf16", 5e-2)])
def test_half_precision_weights(dtype, tolerance):
    check(vae(SD1, dtype).decode(SD1.latents()), golden(SD1.path)["vae_decode"], tolerance, dtype)


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (4, 8, 8), (1, 4, 0, 8), (0, 4, 8, 8)])
def test_bad_latents(shape):
    with pytest.raises(InputError, match="latents"):
        vae(SD1).decode(np.zeros(shape, np.float32))


@pytest.mark.parametrize("shape", [(1, 4, 64, 64), (3, 64, 64), (1, 3, 4, 64)])
def test_bad_images(shape):
    with pytest.raises(InputError, match="image"):
        vae(SD1).encode(np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("down_block_types", ["DownBlock2D"] * 4),
        ("up_block_types", ["UpDecoderBlock2D"] * 3),
        ("latents_mean", [0.0] * 4),
        ("shift_factor", 0.1),
        ("norm_num_groups", 7),
        ("scaling_factor", 0),
        ("act_fn", "mish"),
    ],
)
def test_unsupported_configs(key, value):
    with pytest.raises(ModelError, match=f"vae config: {key} is .*, expected "):
        VaeConfig.from_dict(SD1.vae | {key: value})
