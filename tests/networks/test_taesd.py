"""The tiny autoencoder against diffusers' AutoencoderTiny, with real weights where they are, and what it refuses."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.make_random_model import write_safetensors
from sd_numba import StableDiffusionPipeline, kernels
from sd_numba.checkpoints.opening import embedded_model_path, open_taesd
from sd_numba.checkpoints.weights import ShapeRecorder
from sd_numba.errors import InputError, ModelError
from sd_numba.networks import taesd
from sd_numba.networks.autoencoder import Autoencoder
from sd_numba.networks.taesd import TinyVae, TinyVaeConfig
from tests.golden.cases import CASES, TINY
from tests.golden.compare import check, golden

TOLERANCE = 2e-5
REAL = Path(os.environ.get("SD_NUMBA_TAESD") or Path(__file__).parents[3] / "shared" / "taesd" / "taesd.safetensors")


def tensors(config: dict | None = None) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name in a file -> (name that decides the values, shape)."""
    recorder = ShapeRecorder()
    TinyVae(recorder, TinyVaeConfig.from_dict(TINY.config if config is None else config))
    return {name: (name, shape) for name, shape in recorder.shapes.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A miniature in diffusers layout."""
    folder = tmp_path_factory.mktemp("taesd")
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", tensors(), "f32")
    (folder / "config.json").write_text(json.dumps(TINY.config))
    return folder


@pytest.fixture(scope="module")
def network(folder):
    return open_taesd(folder)


def original(path: Path, half: str, offset: int, config: dict | None = None) -> Path:
    """Write one half with random weights as TAESD's own files have them."""
    prefix = f"{half}.layers."
    names = {}
    for name, entry in tensors(config).items():
        if name.startswith(prefix):
            number, _, rest = name.removeprefix(prefix).partition(".")
            names[f"{int(number) + offset}.{rest}"] = entry
    write_safetensors(path, names, "f32")
    return path


def test_decode_golden(network):
    check(network.decode(TINY.latents()), golden(TINY.path)["decode"], TOLERANCE, "decode")


def test_encode_golden(network):
    check(network.encode(TINY.image()), golden(TINY.path)["encode"], TOLERANCE, "encode")


def test_it_takes_the_place_of_the_other_autoencoder(network):
    """By the members of `Autoencoder`, which the code around them asks for."""
    full = StableDiffusionPipeline.open().vae
    members = {"config", "decode", "encode_distribution", "bytes_per_pixel", *Autoencoder.__annotations__}
    for vae in (network, full):
        assert not [name for name in members if not hasattr(vae, name)]
    mean, std = network.encode_distribution(TINY.image(), tiling=True)
    assert std is None and not network.draws_noise and full.draws_noise
    np.testing.assert_array_equal(mean, network.encode(TINY.image()))
    np.testing.assert_array_equal(network.decode(TINY.latents(), tiling=True), network.decode(TINY.latents()))
    costs = [vae.bytes_per_pixel(tiling=tiling) for vae in (network, full) for tiling in (True, False)]
    assert costs == [400, 400, 1200, 2800]


def test_inputs_stay_as_they_are(network):
    latents, image = TINY.latents(), TINY.image()
    network.decode(latents)
    network.encode(image)
    np.testing.assert_array_equal(latents, TINY.latents())
    np.testing.assert_array_equal(image, TINY.image())


def test_threads_and_batches_change_nothing(network):
    together = network.decode(TINY.latents())
    kernels.set_threads(1)
    try:
        alone = network.decode(TINY.latents()[1:])
    finally:
        kernels.set_threads(0)
    np.testing.assert_array_equal(alone[0], together[1])


@pytest.mark.parametrize("band", [1, 5000])
def test_bands_of_any_height_make_the_same_picture(network, monkeypatch, band):
    expected = network.decode(TINY.latents())
    monkeypatch.setattr(taesd, "BAND", band)
    check(network.decode(TINY.latents()), expected, 3e-6, f"bands of {band} bytes")


def test_a_single_pixel(network):
    assert network.decode(np.zeros((1, 4, 1, 1))).shape == (1, 3, 8, 8)
    assert network.encode(np.zeros((1, 3, 1, 1))).shape == (1, 4, 1, 1)


def test_an_original_decoder(tmp_path):
    path = original(tmp_path / "taesd_decoder.safetensors", "decoder", 1, {})
    write_safetensors(tmp_path / "both.safetensors", tensors({}), "f32")
    latents = TINY.latents()
    expected = open_taesd(tmp_path / "both.safetensors").decode(latents)
    for place in (path, tmp_path):
        network = open_taesd(place)
        np.testing.assert_array_equal(network.decode(latents), expected)
        with pytest.raises(InputError, match="found a decoder without encoder"):
            network.encode(TINY.image())


def test_an_original_encoder_is_refused(tmp_path):
    with pytest.raises(ModelError, match="encoder of TAESD alone, expected taesd_decoder"):
        open_taesd(original(tmp_path / "taesd_encoder.safetensors", "encoder", 0, {}))


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ModelError, match="no such file"):
        open_taesd(tmp_path / "none.safetensors")
    with pytest.raises(ModelError, match="no weights"):
        open_taesd(tmp_path)
    with pytest.raises(ModelError, match="found VAE, expected a tiny autoencoder"):
        open_taesd(embedded_model_path() / "vae" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_class_name", "AutoencoderKL"),
        ("act_fn", "silu"),
        ("decoder_block_out_channels", [8, 8, 8, 4]),
        ("encoder_block_out_channels", [8, 8, 8]),
        ("latent_channels", 0),
        ("num_decoder_blocks", [1, 1]),
        ("num_decoder_blocks", [4]),
        ("num_encoder_blocks", [1, 2]),
        ("scaling_factor", 0),
        ("shift_factor", 0.5),
        ("upsample_fn", "bilinear"),
        ("upsampling_scaling_factor", 4),
    ],
)
def test_unsupported_configs(key, value):
    with pytest.raises(ModelError, match=r"taesd config: .* is .*, expected "):
        TinyVaeConfig.from_dict(TINY.config | {key: value})


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (4, 8, 8), (1, 4, 0, 8), (0, 4, 8, 8)])
def test_bad_latents(network, shape):
    with pytest.raises(InputError, match="latents"):
        network.decode(np.zeros(shape, np.float32))


def test_in_a_pipeline(folder, tmp_path):
    model = CASES[0].write(tmp_path)
    pipe = StableDiffusionPipeline.from_pretrained(model, taesd=folder)
    latents = pipe("a fox", seed=1, width=64, height=64, num_inference_steps=1, output_type="latent").images
    expected = np.clip(open_taesd(folder).decode(latents) / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(pipe.decode(latents), expected, atol=1e-6)
    shutil.rmtree(model)


TWO_LEVELS = {"num_encoder_blocks": [1, 1], "num_decoder_blocks": [1, 1]} | {
    f"{half}_block_out_channels": [8, 8] for half in ("encoder", "decoder")
}


@pytest.mark.parametrize("change", [{"latent_channels": 3}, TWO_LEVELS])
def test_a_pipeline_refuses_what_does_not_fit(tmp_path, change):
    config = TINY.config | change
    write_safetensors(tmp_path / "model.safetensors", tensors(config), "f32")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"found latents of .*, but the model needs"):
        StableDiffusionPipeline.from_pretrained(taesd=tmp_path)


@pytest.mark.skipif(not REAL.is_file(), reason="TAESD's weights are not here")
def test_real_weights_keep_a_picture():
    network = open_taesd(REAL)
    small = Image.open(embedded_model_path() / "grid.jpg").convert("RGB").crop((0, 0, 128, 128))
    picture = small.resize((256, 256), Image.Resampling.BICUBIC)
    image = np.asarray(picture, np.float32).transpose(2, 0, 1)[None] / 127.5 - 1
    error = np.clip(network.decode(network.encode(image)), -1, 1) - image
    assert 10 * np.log10(4 / np.square(error).mean()) >= 27
