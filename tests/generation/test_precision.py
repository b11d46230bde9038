"""Precisions of a pipeline: close to float32, the same bits whatever the threads and the weights; LoRAs; fallbacks."""

import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from safetensors.numpy import save_file

from bench.compare_precisions import judge
from bench.quality import psnr
from sd_numba import InputError, StableDiffusionPipeline, kernels
from sd_numba.checkpoints.opening import embedded_model_path
from sd_numba.cli import main
from sd_numba.generation import model
from sd_numba.pictures.arrays import to_pil
from tests.checkpoints.test_lora import kohya, random_updates
from tests.kernels.common import LOW

APPLE, FOX = "a red apple on a blue background", "a fox"
SMALL = {"width": 64, "height": 64}
LEAST_PSNR = {"bf16": 45, "int8": 32}  # dB; measured: 49 and 37


def draw(pipe, prompts, seeds, **size):
    return pipe(prompts, seed=seeds, num_inference_steps=4, output_type="np", **size).images


@pytest.fixture(scope="module")
def pipes():
    return {name: StableDiffusionPipeline.from_pretrained(precision=name) for name in kernels.precisions()}


@pytest.fixture(scope="module")
def mapped():
    """Without float32, which test_pipeline.py has."""
    some = kernels.precisions()[1:]
    return {name: StableDiffusionPipeline.from_pretrained(precision=name, weights="mmap") for name in some}


@pytest.fixture(scope="module")
def pictures(pipes):
    return {name: draw(pipe, [APPLE, FOX], [5, 6]) for name, pipe in pipes.items()}


@pytest.mark.parametrize("precision", LOW)
def test_pictures_are_close_to_those_in_float32(pictures, precision):
    for found, expected in zip(pictures[precision], pictures["f32"], strict=True):
        assert LEAST_PSNR[precision] < psnr(found, expected) < 80  # or it is none of that precision


@pytest.mark.parametrize("precision", LOW)
def test_pictures_do_not_depend_on_threads_or_batches(pipes, pictures, precision):
    kernels.set_threads(1)
    try:
        alone = draw(pipes[precision], FOX, 6)
    finally:
        kernels.set_threads(0)
    np.testing.assert_array_equal(alone[0], pictures[precision][1])


@pytest.mark.parametrize("precision", LOW)
def test_packed_and_mapped_weights_give_the_same(pipes, mapped, precision):
    pipes[precision].prepare("packed")  # as they are, unless the embedded model has grown
    expected = draw(pipes[precision], FOX, 6, **SMALL)
    np.testing.assert_array_equal(draw(mapped[precision], FOX, 6, **SMALL), expected)


@pytest.mark.parametrize("precision", LOW)
def test_loras(pipes, mapped, tmp_path, precision):
    updates = random_updates(embedded_model_path())
    save_file(kohya({key: x for key, x in updates.items() if key[0] == "unet"}), tmp_path / "a.safetensors")
    involved = pipes["f32"], pipes[precision], mapped[precision]
    plain = draw(pipes["f32"], FOX, 6)
    try:
        for pipe in involved:
            pipe.load_lora_weights(tmp_path / "a.safetensors", 1.5)
        expected, found, again = (draw(pipe, FOX, 6) for pipe in involved)
    finally:
        for pipe in involved:
            pipe.unload_lora_weights()
    assert psnr(found, expected) > LEAST_PSNR[precision]
    assert psnr(plain, expected) < 26  # the LoRA matters
    np.testing.assert_array_equal(again, found)


@pytest.mark.parametrize("precision", LOW)
def test_the_decoder_is_no_coarser_than_bf16(pipes, precision):
    noise = np.random.default_rng(0).standard_normal((1, 4, 8, 8), np.float32)
    expected = pipes["bf16" if "bf16" in pipes else "f32"].decode(noise)
    np.testing.assert_array_equal(pipes[precision].decode(noise), expected)


def test_auto_is_the_fastest_unless_the_model_is_small(monkeypatch):
    assert StableDiffusionPipeline.open(precision="auto").precision == "f32"
    monkeypatch.setattr(model, "PACK_BELOW", 0)
    assert StableDiffusionPipeline.open(precision="auto").precision == kernels.precisions()[-1]


def test_a_precision_that_the_cpu_lacks_becomes_float32(pipes, monkeypatch, caplog):
    monkeypatch.setattr(kernels, "precisions", lambda: ("f32",))
    pipe = StableDiffusionPipeline.from_pretrained(precision="bf16")
    assert pipe.precision == "f32"
    np.testing.assert_array_equal(draw(pipe, FOX, 6, **SMALL), draw(pipes["f32"], FOX, 6, **SMALL))
    assert StableDiffusionPipeline.open(precision="auto").precision == "f32"
    assert caplog.messages == ["precision bf16: this CPU has no instructions for it; computing in f32"]


def test_an_unknown_precision_is_refused():
    with pytest.raises(InputError, match="precision: found 'f16', expected f32 or bf16 or int8 or auto"):
        StableDiffusionPipeline.from_pretrained(precision="f16")


@pytest.mark.parametrize("precision", LOW)
def test_on_the_command_line(pipes, tmp_path, precision):
    path = tmp_path / "fox.png"
    options = ["--precision", precision, "--steps", "4", "-W", "64", "-H", "64", "-s", "6", "-o", str(path)]
    result = CliRunner().invoke(main, ["generate", FOX, *options])
    assert result.exit_code == 0, result.output
    expected = to_pil(draw(pipes[precision], FOX, 6, **SMALL))[0]
    assert Image.open(path).tobytes() == expected.tobytes()


def test_the_command_line_says_once_what_the_cpu_lacks(pipes, tmp_path):
    code = "from sd_numba import kernels; kernels.precisions = lambda: ('f32',); from sd_numba.cli import main; main()"
    path = tmp_path / "fox.png"
    options = ["--precision", "int8", "--steps", "4", "-W", "64", "-H", "64", "-s", "6", "-o", str(path)]
    command = [sys.executable, "-c", code, "generate", FOX, *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("precision int8: this CPU has no instructions for it; computing in f32\n") == 1
    expected = to_pil(draw(pipes["f32"], FOX, 6, **SMALL))[0]
    assert Image.open(path).tobytes() == expected.tobytes()


def test_the_judge_of_the_comparison(pictures):
    exact = pictures["f32"]
    for judged in judge([APPLE, FOX], exact, exact):
        assert judged.psnr == np.inf and not judged.doubtful
    for judged, other in zip(judge([APPLE, FOX], exact[::-1], exact), [FOX, APPLE], strict=True):
        assert f"nearest to {other!r}" in judged.faults
    apple, _ = judge([APPLE, FOX], exact * 0.9, exact)
    assert apple.nearest == APPLE and "colour" in apple.faults[0]
