"""Decoding and encoding in strips: what comes of it is what comes of the whole, in less memory."""

import tracemalloc

import numpy as np
import pytest
from PIL import Image

from sd_numba import InputError, StableDiffusionPipeline, kernels
from sd_numba.checkpoints.opening import embedded_model_path
from sd_numba.networks import vae_strips
from sd_numba.networks.vae import Vae, VaeConfig
from sd_numba.samplers.noise import make_noise
from tests.golden.cases import CASES
from tests.golden.compare import check, golden, weights_of


@pytest.fixture(scope="module")
def pipe():
    return StableDiffusionPipeline.from_pretrained()


@pytest.fixture
def everything(monkeypatch):
    """Every level that there is runs in strips, of a few rows."""
    monkeypatch.setattr(vae_strips, "WHOLE", 0)
    monkeypatch.setattr(vae_strips, "STRIP", 1 << 20)


def picture_latents(pipe, side: int) -> np.ndarray:
    """Latents of two smooth pictures beside each other, side x 1.5 side pixels."""
    grid = Image.open(embedded_model_path() / "grid.jpg").convert("RGB").crop((0, 0, 192, 128))
    picture = np.asarray(grid.resize((side * 3 // 2, side), Image.Resampling.BICUBIC), np.float32)
    return pipe.vae.encode(picture.transpose(2, 0, 1)[None] / 127.5 - 1)


def smooth_latents(height: int, width: int) -> np.ndarray:
    """Noise of low frequency with the variance of latents."""
    rough = np.random.default_rng(0).standard_normal((4, height // 12 + 2, width // 12 + 2)).astype(np.float32)
    size = (width, height)
    smooth = np.stack([np.asarray(Image.fromarray(c).resize(size, Image.Resampling.BICUBIC)) for c in rough])[None]
    return smooth / smooth.std() / np.float32(0.18215)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("strip", [1, 20_000])
def test_with_all_statistics_it_is_the_decoder(case, strip, monkeypatch):
    """Strips of 8 rows and of more, levels of other counts, odd sizes, batches."""
    monkeypatch.setattr(vae_strips, "WHOLE", 0)
    monkeypatch.setattr(vae_strips, "STRIP", strip)
    monkeypatch.setattr(vae_strips, "PERIOD", 1000)
    network = Vae(weights_of(case, "vae"), VaeConfig.from_dict(case.vae))
    check(network.decode(case.latents(), tiling=True), golden(case.path)["vae_decode"], 2e-4, case.name)
    check(network.decode(case.latents(), tiling=True), network.decode(case.latents()), 1e-5, case.name)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("strip", [1, 20_000])
def test_encoding_with_all_statistics_is_the_encoder(case, strip, monkeypatch):
    monkeypatch.setattr(vae_strips, "WHOLE", 0)
    monkeypatch.setattr(vae_strips, "STRIP", strip)
    monkeypatch.setattr(vae_strips, "PERIOD", 1000)
    network = Vae(weights_of(case, "vae"), VaeConfig.from_dict(case.vae))
    check(network.encode(case.image(), tiling=True), golden(case.path)["vae_encode"], 2e-4, case.name)
    check(network.encode(case.image(), tiling=True), network.encode(case.image()), 1e-5, case.name)


@pytest.mark.parametrize(("height", "width"), [(61, 47), (8, 130), (75, 9), (130, 8)])
def test_encoding_odd_sizes(height, width, monkeypatch):
    """Sizes that the halvings do not divide, and strips that end with them."""
    monkeypatch.setattr(vae_strips, "WHOLE", 0)
    monkeypatch.setattr(vae_strips, "STRIP", 1)
    monkeypatch.setattr(vae_strips, "PERIOD", 1000)
    network = Vae(weights_of(CASES[0], "vae"), VaeConfig.from_dict(CASES[0].vae))
    image = np.tanh(np.random.default_rng(0).standard_normal((2, 3, height, width)).astype(np.float32))
    whole, found = (network.encode_distribution(image, tiling=tiling) for tiling in (False, True))
    for expected, values in zip(whole, found, strict=True):
        assert expected.shape == (2, 4, height // 8, width // 8)
        check(values, expected, 1e-5, f"{height} x {width}")


@pytest.mark.parametrize(("height", "width"), [(128, 128), (100, 60), (36, 180), (61, 47)])
def test_encoding_differs_by_the_estimate_of_the_statistics(pipe, everything, height, width):
    image = np.tanh(smooth_latents(height, width))[:, :3]
    whole, found = (pipe.vae.encode_distribution(image, tiling=tiling) for tiling in (False, True))
    assert whole[0].shape == found[0].shape == (1, 4, height // 4, width // 4)
    for expected, values in zip(whole, found, strict=True):
        assert np.square(values - expected).mean() < 1e-3 * np.square(expected).mean()


def test_small_pictures_are_decoded_as_a_whole(pipe):
    latents = smooth_latents(24, 20)
    np.testing.assert_array_equal(pipe.vae.decode(latents, tiling=True), pipe.vae.decode(latents))


def latents_of(pipe, kind: str) -> np.ndarray:
    sizes = {"odd": (67, 41), "wide": (30, 90)}
    return picture_latents(pipe, int(kind)) if kind.isdigit() else smooth_latents(*sizes[kind])


@pytest.mark.parametrize("kind", ["128", "256", "odd", "wide"])
def test_it_differs_by_the_estimate_of_the_statistics(pipe, everything, kind):
    latents = latents_of(pipe, kind)
    whole, found = (np.clip(pipe.vae.decode(latents, tiling=tiling), -1, 1) for tiling in (False, True))
    assert 10 * np.log10(4 / np.square(found - whole).mean()) >= 45


def test_no_border_shows(pipe, monkeypatch):
    """The error is as smooth from a strip to the next as it is within one."""
    monkeypatch.setattr(vae_strips, "WHOLE", 0)
    monkeypatch.setattr(vae_strips, "STRIP", 1)  # strips of 8 rows
    latents = smooth_latents(48, 32)
    error = pipe.vae.decode(latents, tiling=True) - pipe.vae.decode(latents)
    steps = np.abs(np.diff(error, axis=2)).max(axis=(0, 1, 3))
    borders = np.arange(len(steps)) % 8 == 7
    assert steps.max() < 0.02
    assert steps[borders].max() <= 1.5 * steps[~borders].max()


def test_threads_and_batches_change_nothing(pipe, everything):
    latents = np.concatenate([smooth_latents(40, 24), smooth_latents(40, 24)[:, :, ::-1]])
    together = pipe.vae.decode(latents, tiling=True)
    kernels.set_threads(1)
    try:
        alone = pipe.vae.decode(latents[1:], tiling=True)
    finally:
        kernels.set_threads(0)
    np.testing.assert_array_equal(alone[0], together[1])


def test_it_takes_less_memory(pipe, monkeypatch):
    monkeypatch.setattr(vae_strips, "WHOLE", 2 << 20)
    monkeypatch.setattr(vae_strips, "STRIP", 1 << 18)
    latents = smooth_latents(64, 64)
    peaks = []
    for tiling in (False, True):
        tracemalloc.start()
        pipe.vae.decode(latents, tiling=tiling)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 0.5 * peaks[0]


def test_the_pipeline_decides(pipe, monkeypatch):
    asked = []
    zeros = np.zeros((1, 4, 24, 16), np.float32)
    monkeypatch.setattr(pipe.vae, "decode", lambda latents, tiling: asked.append(tiling) or np.zeros((1, 3, 8, 8)))
    monkeypatch.setattr(pipe.vae, "encode_distribution", lambda image, tiling: asked.append(tiling) or (zeros, zeros))
    needed = 96 * 64 * 2800
    for tiling, available in (("auto", 2 * needed), ("auto", needed), ("on", 2 * needed), ("off", needed)):
        monkeypatch.setattr(pipe, "vae_tiling", tiling)
        monkeypatch.setattr("sd_numba.generation.model.available_memory", lambda available=available: available)
        pipe.decode(zeros)
        pipe.encode(np.zeros((1, 96, 64, 3), np.float32), [make_noise("cpu", 0)])
    assert asked == [False, False, True, True, True, True, False, False]


def test_a_size_is_refused_if_even_strips_do_not_fit(pipe, monkeypatch):
    monkeypatch.setattr("sd_numba.checks.available_memory", lambda: 1024**2 * 1300)
    pipe.generate("a fox", width=1024, height=1024)
    with pytest.raises(InputError, match=r"1536x1024 needs about 1.9 GB of memory"):
        pipe.generate("a fox", width=1536, height=1024)
    monkeypatch.setattr(pipe, "vae_tiling", "off")
    with pytest.raises(InputError, match=r"1024x1024 needs about 2.9 GB of memory"):
        pipe.generate("a fox", width=1024, height=1024)
