"""Previews: a linear map of smoothed latents, or a tiny autoencoder."""

import json

import numpy as np
import pytest
from PIL import Image

from sd_numba import StableDiffusionPipeline
from sd_numba.checkpoints.opening import open_taesd
from sd_numba.errors import InputError, ModelError
from sd_numba.families.stable_diffusion import PREVIEW_FACTORS as FACTORS
from sd_numba.networks.vae import VaeConfig
from sd_numba.pictures.preview import LatentProjection, Previewer, projection_of, smooth
from tests.golden.cases import CASES, EMBEDDED, TINY
from tests.golden.compare import golden, scratch
from tests.networks.test_taesd import tensors, write_safetensors

LATENTS = np.random.default_rng(0).standard_normal((2, 4, 5, 7)).astype(np.float32)


@pytest.fixture(scope="module")
def pipe():
    return StableDiffusionPipeline.open()


@pytest.fixture(scope="module")
def sd():
    (case,) = (case for case in CASES if case.name == "sd1")
    return StableDiffusionPipeline.open(case.write(scratch()))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("taesd")
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", tensors(), "f32")
    (folder / "config.json").write_text(json.dumps(TINY.config))
    return open_taesd(folder)


@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (2, 1, 4, 3), (1, 5, 7, 3)])
def test_smoothing(shape):
    x = np.random.default_rng(1).random(shape).astype(np.float32)
    weights = np.outer([1, 2, 1], [1, 2, 1]) / 16
    h, w = shape[1:3]
    wanted = np.zeros(shape)
    for i, j, dy, dx in np.ndindex(h, w, 3, 3):
        wanted[:, i, j] += weights[dy, dx] * x[:, min(max(i + dy - 1, 0), h - 1), min(max(j + dx - 1, 0), w - 1)]
    np.testing.assert_allclose(smooth(x), wanted, atol=1e-6)


def test_a_projection():
    rows = np.random.default_rng(2).standard_normal((5, 3)) / 4
    found = LatentProjection.from_rows(rows.tolist()).project(LATENTS)
    colours = np.einsum("bchw,cr->bhwr", LATENTS, rows[:4]) + rows[4]
    wanted = np.clip(smooth(colours), 0, 1) * 255
    assert found.shape == (2, 5, 7, 3) and found.dtype == np.uint8
    assert np.abs(found - wanted).max() <= 0.51


def test_which_projection(pipe, sd, tiny):
    rows = pipe.vae.config.latent_rgb_factors
    assert len(rows) == 5
    np.testing.assert_array_equal(projection_of(pipe.vae).factors, np.array(rows[:4], np.float32))
    for vae in (sd.vae, tiny):
        found = projection_of(vae, FACTORS)
        np.testing.assert_array_equal(found.factors, np.array(FACTORS[:4], np.float32))
        np.testing.assert_array_equal(found.bias, np.array(FACTORS[4], np.float32))
    with pytest.raises(InputError, match="4 latent channels without _latent_rgb_factors in its config, choose none"):
        projection_of(sd.vae)
    with pytest.raises(InputError, match="expected 5 channels"):
        projection_of(sd.vae, [*FACTORS, FACTORS[0]])


def test_projections_in_a_config():
    config = {"_latent_rgb_factors": [[0, 1, 2]] * 5}
    assert VaeConfig.from_dict(config).latent_rgb_factors == ((0.0, 1.0, 2.0),) * 5
    for value in (5, [[0, 1, 2]] * 4, [[0, 1]] * 5, [["a", 1, 2]] * 5, [[1e40, 1, 2]] * 5, [[True, 1, 2]] * 5, [5] * 5):
        with pytest.raises(ModelError, match="_latent_rgb_factors"):
            VaeConfig.from_dict({"_latent_rgb_factors": value})


@pytest.mark.parametrize("kind", ["proj", "tae"])
def test_the_size_of_previews(sd, tiny, kind):
    latents = LATENTS[:, : sd.vae.config.latent_channels]
    pictures = Previewer(kind, sd.vae, tiny if kind == "tae" else None, FACTORS)(latents)
    factor = sd.vae.factor
    assert [(picture.mode, picture.size) for picture in pictures] == [("RGB", (7 * factor, 5 * factor))] * 2


def test_no_previews(sd):
    assert Previewer("none", sd.vae)(LATENTS) == []


def test_a_tiny_autoencoder_shows_what_it_decodes(sd, tiny):
    (found,) = Previewer("tae", tiny)(LATENTS[:1])
    decoded = tiny.decode(LATENTS[:1] / np.float32(tiny.config.scaling_factor))[0].transpose(1, 2, 0)
    assert np.abs(np.asarray(found) - np.clip(decoded / 2 + 0.5, 0, 1) * 255).max() <= 0.51


def test_what_cannot_be_shown(pipe, sd, tiny):
    with pytest.raises(InputError, match="preview: found 'all', expected none or proj or tae"):
        Previewer("all", sd.vae)
    with pytest.raises(InputError, match="preview tae: found no tiny autoencoder; give one with taesd, or choose proj"):
        Previewer("tae", sd.vae)
    with pytest.raises(
        InputError, match=r"4 channels, 8 times smaller than pictures, the model has .* 4 times smaller"
    ):
        Previewer("tae", pipe.vae, tiny)
    with pytest.raises(InputError, match=r"latents: found shape \(2, 3, 5, 7\), expected \(b, 4, h, w\)"):
        Previewer("proj", sd.vae, factors=FACTORS)(LATENTS[:, :3])


def test_the_preview_of_a_picture_is_a_blurred_picture_in_its_colours(pipe):
    """Of the embedded model; 23.0 dB were measured."""
    picture = golden(EMBEDDED.path)["images"][:1]
    latents = pipe.vae.encode(2 * picture.transpose(0, 3, 1, 2) - 1) * np.float32(pipe.vae.config.scaling_factor)
    (found,) = Previewer("proj", pipe.vae)(latents)
    error = np.mean((np.asarray(found, np.float32) / 255 - picture[0]) ** 2)
    assert -10 * np.log10(error) > 22.5
    grey = np.asarray(Image.new("RGB", found.size, (128, 128, 128)), np.float32) / 255
    assert error < 0.1 * np.mean((grey - picture[0]) ** 2)
