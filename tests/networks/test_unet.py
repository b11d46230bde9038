"""The UNet against diffusers' UNet2DConditionModel, and what it refuses."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from sd_numba import kernels
from sd_numba.checkpoints.weights import Weights
from sd_numba.errors import InputError, ModelError
from sd_numba.networks.unet import UNet, UNetConfig
from tests import reference
from tests.golden.cases import CASES, Case
from tests.golden.compare import check, golden, weights_of

TOLERANCE = 2e-4
SD1, SD2 = CASES[:2]


def unet(case: Case, dtype: str = "f32", packed: bool = False) -> UNet:
    return unet_of(weights_of(case, "unet", dtype), packed, case)


def unet_of(weights: Weights, packed: bool = False, case: Case = SD1) -> UNet:
    weights.packed = packed
    network = UNet(weights, UNetConfig.from_dict(case.unet))
    weights.finish()
    return network


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_golden(case):
    network = unet(case)
    for timestep in case.timesteps:
        found = network(case.sample(), timestep, case.context())
        check(found, golden(case.path)[f"unet_{timestep}"], TOLERANCE, f"{case.name}, timestep {timestep}")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_updates_are_as_good_as_other_weights(tmp_path, dtype, packed):
    rng, weights, merged = np.random.default_rng(0), weights_of(SD1, "unet", dtype), {}
    for name in weights.names():
        w = merged[name] = kernels.widen(weights.raw(name))
        if w.ndim in {2, 4}:
            up = rng.standard_normal((len(w), 3), np.float32)
            down = rng.standard_normal((3, *w.shape[1:]), np.float32) * w.std()
            weights.add_updates(name.removesuffix(".weight"), up, down, 0.7)
            merged[name] = reference.add_low_rank(w, [(up, down, 0.7)])
    save_file(merged, tmp_path / "merged.safetensors")
    found = unet_of(weights, packed)(SD1.sample(), 500, SD1.context())
    expected = unet_of(Weights.open(tmp_path / "merged.safetensors"))(SD1.sample(), 500, SD1.context())
    check(found, expected, TOLERANCE, "with updates")
    assert np.abs(expected - unet(SD1, dtype)(SD1.sample(), 500, SD1.context())).max() > 0.1 * np.abs(expected).max()


def test_inputs_stay_as_they_are():
    network, sample, context = unet(SD1), SD1.sample(), SD1.context()
    network(sample, 500, context)
    np.testing.assert_array_equal(sample, SD1.sample())
    np.testing.assert_array_equal(context, SD1.context())


def test_encoded_context_gives_the_same():
    network = unet(SD2)
    encoded = network.encode_context(SD2.context())
    expected = network(SD2.sample(), 500, SD2.context())
    for _ in range(2):  # using it does not use it up
        np.testing.assert_array_equal(network(SD2.sample(), 500, encoded), expected)


@pytest.mark.parametrize("case", [SD1, SD2], ids=lambda case: case.name)
def test_one_sample_for_several_contexts_is_as_good_as_copies(case):
    network, sample = unet(case), case.sample()
    context = np.random.default_rng(1).standard_normal((3 * len(sample), 5, case.context().shape[2]), np.float32)
    times = np.linspace(999, 1, len(sample))
    expected = network(np.concatenate([sample] * 3), np.concatenate([times] * 3), context)
    np.testing.assert_array_equal(network(sample, times, context), expected)


def test_images_of_a_batch_are_independent():
    network, sample, context = unet(SD2), SD2.sample(), SD2.context()
    together = network(sample, 500, context)
    for i in range(len(sample)):
        check(network(sample[i : i + 1], 500, context[i : i + 1])[0], together[i], 1e-5, f"image {i}")


def test_a_timestep_for_each_image():
    network, sample, context = unet(SD2), SD2.sample(), SD2.context()
    found = network(sample, np.array([999, 500, 1]), context)
    for i, timestep in enumerate((999, 500.0, 1)):
        check(found[i], golden(SD2.path)[f"unet_{timestep}"][i], TOLERANCE, f"timestep {timestep}")


def test_packed_weights_change_nothing():
    expected = unet(SD2)(SD2.sample(), 500, SD2.context())
    check(unet(SD2, packed=True)(SD2.sample(), 500, SD2.context()), expected, 1e-6, "packed")


@pytest.mark.parametrize(("dtype", "tolerance"), [("f16", 5e-3), ("bf16", 5e-2)])
def test_half_precision_weights(dtype, tolerance):
    found = unet(SD1, dtype)(SD1.sample(), 500, SD1.context())
    check(found, golden(SD1.path)["unet_500.0"], tolerance, dtype)


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (5, 17)])
def test_any_size(size):
    sample = np.ones((1, 4, *size), np.float32)
    assert unet(SD1)(sample, 1, SD1.context()).shape == sample.shape


@pytest.mark.parametrize(
    ("sample", "context", "message"),
    [
        ((1, 5, 8, 8), (1, 77, 32), "sample"),
        ((4, 8, 8), (1, 77, 32), "sample"),
        ((1, 4, 0, 8), (1, 77, 32), "sample"),
        ((2, 4, 8, 8), (1, 77, 32), "batch of 1"),
        ((2, 4, 8, 8), (3, 77, 32), "batch of 3"),
        ((1, 4, 8, 8), (1, 77, 33), "context"),
        ((1, 4, 8, 8), (77, 32), "context"),
        ((1, 4, 8, 8), (1, 0, 32), "context"),
    ],
)
def test_bad_shapes(sample, context, message):
    with pytest.raises(InputError, match=message):
        unet(SD1)(np.zeros(sample, np.float32), 1, np.zeros(context, np.float32))


@pytest.mark.parametrize("timestep", [np.array([1, 2]), np.array([]), float("nan"), float("inf")])
def test_bad_timestep(timestep):
    with pytest.raises(InputError, match="timestep"):
        unet(SD1)(SD1.sample(), timestep, SD1.context(), tome=0.5)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("addition_embed_type", "text_time"),  # SDXL
        ("class_embed_type", "projection"),
        ("num_class_embeds", 1000),
        ("resnet_time_scale_shift", "scale_shift"),
        ("time_cond_proj_dim", 256),
        ("encoder_hid_dim", 4096),
        ("mid_block_type", "UNetMidBlock2D"),
        ("act_fn", "gelu"),
        ("down_block_types", ["AttnDownBlock2D"] * 4),
        ("down_block_types", ["DownBlock2D"] * 3),
        ("block_out_channels", [16, 32]),
        ("block_out_channels", [16, 30, 48, 48]),
        ("attention_head_dim", [2, 2]),
        ("attention_head_dim", 0),
        ("cross_attention_dim", "wide"),
        ("use_linear_projection", 1),
    ],
)
def test_unsupported_configs(key, value):
    with pytest.raises(ModelError, match=r"unet config: \w+ is .*, expected "):
        UNetConfig.from_dict(SD1.unet | {key: value})


def test_unknown_keys_are_ignored():
    config = UNetConfig.from_dict(SD1.unet | {"some_new_key": 1, "num_attention_heads": None, "dropout": 0.1})
    assert config == UNetConfig.from_dict(SD1.unet)
