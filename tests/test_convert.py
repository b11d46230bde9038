"""Writing models in another dtype or layout."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bench.make_random_model import write_model
from sd_numba.convert import convert
from sd_numba.errors import InputError, ModelError
from sd_numba.headers import read_header, read_metadata
from sd_numba.model import embedded_model_path
from tests.golden.compare import scratch
from tests.test_single_file import FAMILIES


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request):
    folder = scratch() / f"convert-{request.param}"
    write_model(folder, FAMILIES[request.param], pad_token="!" if request.param == "2" else "<|endoftext|>")
    return folder


def run(*arguments):
    done = list(convert(*arguments))
    assert done[-1][0] == done[-1][1] and [a for a, _ in done] == sorted(a for a, _ in done)


def test_there_and_back_again(folder, tmp_path):
    run(folder, tmp_path / "a.safetensors")
    run(tmp_path / "a.safetensors", tmp_path / "b")
    run(tmp_path / "b", tmp_path / "c.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()
    for part in ("text_encoder/model", "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"):
        before, after = (load_file(where / f"{part}.safetensors") for where in (folder, tmp_path / "b"))
        assert before.keys() == after.keys()
        assert all(np.array_equal(before[name], after[name]) for name in before)
    for name in ("vocab.json", "merges.txt"):
        assert (folder / "tokenizer" / name).read_bytes() == (tmp_path / "b" / "tokenizer" / name).read_bytes()
    index = json.loads((tmp_path / "b" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline" and index["unet"][1] == "UNet2DConditionModel"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b", "c.safetensors"]


def bfloat16(x):
    """Round to the nearest bfloat16 by its definition: of the two neighbours, the closer, or the even one."""
    low = x.view(np.uint32) >> 16
    gap = np.stack([(((low + i) << 16).view(np.float32).astype(np.float64) - x) for i in (0, 1)])
    up = np.abs(gap[1]) < np.abs(gap[0])
    return np.where(up | ((np.abs(gap[1]) == np.abs(gap[0])) & (low % 2 == 1)), low + 1, low).astype(np.uint16)


def test_dtypes(tmp_path):
    random = np.random.default_rng(0)
    x = random.standard_normal((300, 77)).astype(np.float32) * np.float32(2) ** random.integers(-20, 10, (300, 77))
    x = x.astype(np.float32)
    x[0, :4] = [1 + 2**-8, 1 + 3 * 2**-8, np.inf, np.nan]  # two ties
    tensors = {"x": x, "ids": np.arange(7), "h": x[1:].astype(np.float16), "one": np.array(3, np.float32)}
    save_file(tensors, tmp_path / "a.safetensors", {"who": "me"})
    run(tmp_path / "a.safetensors", tmp_path / "h.safetensors", "f16")
    found = load_file(tmp_path / "h.safetensors")
    np.testing.assert_array_equal(found["x"], x.astype(np.float16))
    assert found["ids"].dtype == np.int64 and found["one"].shape == () and found["h"].dtype == np.float16
    assert read_metadata(tmp_path / "h.safetensors") == {"who": "me"}
    run(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "bf16")
    info = read_header(tmp_path / "b.safetensors")["x"]
    assert info.dtype == "BF16"
    bits = np.fromfile(tmp_path / "b.safetensors", np.uint16, x.size, offset=info.start).reshape(x.shape)
    finite = np.isfinite(x)
    np.testing.assert_array_equal(bits[finite], bfloat16(x[finite]))
    assert bits[0, 2] == 0x7F80 and bits[0, 3] == 0x7FC0
    run(tmp_path / "b.safetensors", tmp_path / "f.safetensors", "f32")
    np.testing.assert_array_equal(load_file(tmp_path / "f.safetensors")["x"].view(np.uint32) >> 16, bits)


def test_a_model_in_half_precision_halves(folder, tmp_path):
    run(folder, tmp_path / "f", None)
    run(folder, tmp_path / "h", "f16")
    sizes = [sum(path.stat().st_size for path in (tmp_path / name).glob("*/*.safetensors")) for name in ("f", "h")]
    assert 0.49 < sizes[1] / sizes[0] < 0.55


def test_the_embedded_model_keeps_its_defaults(tmp_path):
    run(embedded_model_path(), tmp_path / "e", "f32")
    defaults = [
        json.loads((where / "model_index.json").read_text())["_defaults"]
        for where in (embedded_model_path(), tmp_path / "e")
    ]
    assert defaults[0] == defaults[1]


def test_what_float16_cannot_hold(tmp_path):
    save_file({"w": np.array([1, 70000], np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match="tensor w: found the value 70000, float16 ends at 65504; choose bf16"):
        run(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "f16")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_targets_that_cannot_be(folder, tmp_path):
    (tmp_path / "there").mkdir()
    for target, message in (
        (tmp_path / "there", "exists already"),
        (tmp_path / "no" / "a.safetensors", "does not exist; make it first"),
        (tmp_path / "a.ckpt", "written as .safetensors files or as folders"),
    ):
        with pytest.raises(InputError, match=message):
            convert(folder, target)
    with pytest.raises(InputError, match="expected f32, f16, bf16"):
        convert(folder, tmp_path / "x", "int4")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_stopping_in_the_middle_leaves_nothing(folder, tmp_path):
    for target in (tmp_path / "a.safetensors", tmp_path / "b"):
        progress = convert(folder, target)
        next(progress)
        assert len(list(tmp_path.iterdir())) == 1
        progress.close()
        assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="needs limits of a process")
@pytest.mark.parametrize("name", ["a.safetensors", "b"])
def test_a_disk_that_fills_up(folder, tmp_path, name):
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20));"
        "from sd_numba.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "convert", str(folder), str(tmp_path / name)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.count("\n") <= 2 and "cannot be written: File too large" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("bias", "expected", "side"), [(-3, "v_prediction", 96), (0, "epsilon", 64)])
def test_what_the_unet_predicts_is_written(tmp_path, bias, expected, side):
    """A single file of family 2.x does not say it, a folder must."""
    write_model(tmp_path / "m", FAMILIES["2"], pad_token="!")
    run(tmp_path / "m", tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    tensors["model.diffusion_model.out.2.bias"][:] = bias
    save_file(tensors, tmp_path / "b.safetensors")  # without metadata
    run(tmp_path / "b.safetensors", tmp_path / "f")
    assert json.loads((tmp_path / "f/scheduler/scheduler_config.json").read_text())["prediction_type"] == expected
    assert json.loads((tmp_path / "f/unet/config.json").read_text())["sample_size"] == side


def test_double_precision(tmp_path):
    save_file({"w": np.array([1 / 3, 1e-9])}, tmp_path / "a.safetensors")
    run(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "f32")
    assert load_file(tmp_path / "b.safetensors")["w"].tolist() == np.array([1 / 3, 1e-9], np.float32).tolist()
