"""Writing models in another dtype or layout."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bench.make_random_model import to_bfloat16, write_model
from sd_numba import StableDiffusionPipeline, kernels
from sd_numba.checkpoints.opening import embedded_model_path
from sd_numba.errors import InputError, ModelError
from sd_numba.files import writing
from sd_numba.files.safetensors import read_header, read_metadata
from sd_numba.files.tensors import BLOCKS
from sd_numba.files.writing import Entry, write_safetensors
from sd_numba.tools.convert import convert
from tests.families.test_names import FAMILIES, latents
from tests.golden.compare import relative_error, scratch

FILES = ("text_encoder/model.safetensors", *(f"{n}/diffusion_pytorch_model.safetensors" for n in ("unet", "vae")))


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
    with pytest.raises(ModelError, match="tensor w: the value 70000 is too large for float16; choose bf16"):
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


# int8


@pytest.fixture(scope="module")
def eighths(folder):
    """The model in int8."""
    path = folder.with_name(f"{folder.name}-int8")
    if not path.exists():
        run(folder, path, "int8")
    return path


def stays(part, name, x):
    """Whether a tensor is in float16 in an int8 model."""
    first_or_last = name in ("conv_in.weight", "conv_out.weight")
    return "vae" in part or x.ndim < 2 or "embedding" in name or first_or_last or x[0].size < 64


def test_int8(folder, eighths):
    for part in FILES:
        before, after = load_file(folder / part), load_file(eighths / part)
        rounded = [name for name, x in before.items() if not stays(part, name, x)]
        assert after.keys() == before.keys() | {f"{name}_scale" for name in rounded}
        assert bool(rounded) == ("vae" not in part)
        for name, x in before.items():
            if name not in rounded:
                np.testing.assert_array_equal(after[name], x.astype(np.float16))
                continue
            values, scale = after[name], after[f"{name}_scale"]
            assert (values.dtype, scale.dtype, scale.shape) == (np.int8, np.float32, (len(x), 1))
            rows = x.reshape(len(x), -1)
            np.testing.assert_array_equal(scale, np.abs(rows).max(axis=1, keepdims=True) / np.float32(127))
            assert (np.abs(values.reshape(rows.shape)).max(axis=1) == 127).all()
            assert (np.abs(values.reshape(rows.shape) * scale - rows) <= scale * 0.5001).all()


def test_int8_values_stay_as_they_are(folder, eighths, tmp_path):
    """In other layouts, and if int8 is asked for once more; a single file is made of a single file directly, too."""
    run(eighths, tmp_path / "a.safetensors")
    run(tmp_path / "a.safetensors", tmp_path / "b")
    run(tmp_path / "b", tmp_path / "c", "int8")
    for part in FILES:
        expected = (eighths / part).read_bytes()
        assert (tmp_path / "b" / part).read_bytes() == (tmp_path / "c" / part).read_bytes() == expected
    run(folder, tmp_path / "f.safetensors")
    run(tmp_path / "f.safetensors", tmp_path / "g.safetensors", "int8")
    run(folder, tmp_path / "h.safetensors", "int8")
    expected = (tmp_path / "a.safetensors").read_bytes()
    assert (tmp_path / "g.safetensors").read_bytes() == (tmp_path / "h.safetensors").read_bytes() == expected


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_int8_becomes_floating_point_again(eighths, tmp_path, dtype):
    run(eighths, tmp_path / "a.safetensors")
    run(tmp_path / "a.safetensors", tmp_path / "x.safetensors", dtype)
    before, header = load_file(tmp_path / "a.safetensors"), read_header(tmp_path / "x.safetensors")
    assert header.keys() == {name for name in before if not name.endswith("_scale")}
    data = np.fromfile(tmp_path / "x.safetensors", np.uint8)
    for name, info in header.items():
        wide = before[name].astype(np.float32)
        if before[name].dtype == np.int8:
            wide *= before[f"{name}_scale"].reshape(-1, *[1] * (wide.ndim - 1))
        expected = {"f32": wide, "f16": wide.astype(np.float16), "bf16": to_bfloat16(wide)}[dtype]
        assert (info.dtype, info.shape) == (dtype.upper(), wide.shape)
        np.testing.assert_array_equal(data[info.start : info.start + info.nbytes], expected.reshape(-1).view(np.uint8))


def test_an_int8_model_makes_nearly_the_same(folder, eighths, tmp_path):
    run(eighths, tmp_path / "a.safetensors")
    run(eighths, tmp_path / "f", "f32")
    paths = (folder, eighths, tmp_path / "a.safetensors", tmp_path / "f")
    original, int8, single, wide = (StableDiffusionPipeline.from_pretrained(path, weights="mmap") for path in paths)
    random = np.random.default_rng(0)
    sample, ids = random.standard_normal((1, 4, 8, 8), np.float32), original.tokenizer("a cat on a beach")
    text = original.text_encoder(ids)
    assert relative_error(int8.text_encoder(ids), text) < 3e-2
    assert 1e-4 < relative_error(int8.unet(sample, 500, text), original.unet(sample, 500, text)) < 3e-2
    found, expected = latents(int8), latents(wide)
    np.testing.assert_array_equal(latents(single), found)
    assert relative_error(found, expected) < 1e-4
    int8.prepare("packed")
    assert relative_error(latents(int8), expected) < 1e-4


def stored_as(x, dtype):
    """A weight as files of this dtype have it, and what that stands for, float32."""
    if dtype == "Q8_0":
        blocks = np.zeros(x.size // 32, BLOCKS["Q8_0"][1])
        blocks["values"] = np.rint(x.reshape(-1, 32) * 20)
        blocks["scale"] = 2.0 ** -np.arange(len(blocks)).clip(0, 9)
        return blocks, (blocks["values"] * blocks["scale"].astype(np.float32)[:, None]).reshape(x.shape)
    if dtype == "F64":
        return x.astype(np.float64), x
    if dtype.startswith("F8"):
        codes = (x.astype(np.float16).view(np.uint16) >> 8).astype(np.uint8)
        stored = codes.view(kernels.float8_e4m3 if dtype == "F8_E4M3" else kernels.float8_e5m2)
    else:
        stored = {"F32": x, "F16": x.astype(np.float16), "BF16": to_bfloat16(x)}[dtype]
    return stored, kernels.widen(stored)


@pytest.mark.parametrize("block", [1, 1000, 1 << 20])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F64", "Q8_0"])
def test_any_dtype_becomes_int8(tmp_path, monkeypatch, dtype, block):
    """However many values are converted at a time; here, of a tensor that has been several."""
    monkeypatch.setattr(writing, "BLOCK", max(block, 32))
    x = np.random.default_rng(0).standard_normal((12, 96)).astype(np.float32)
    x[3] = 0
    stored, wide = stored_as(x, dtype)
    entry = Entry(dtype, (12, 96), tuple(np.split(stored.reshape(-1), 3)), rounded=True)
    list(write_safetensors(tmp_path / "a.safetensors", {"w": entry}, "int8", {}))
    found, expected = load_file(tmp_path / "a.safetensors"), kernels.quantize(wide)
    np.testing.assert_array_equal(found["w"], expected.values)
    np.testing.assert_array_equal(found["w_scale"], expected.scales[:, None])
    assert found["w"].any()


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_what_int8_cannot_hold(tmp_path, value):
    x = np.ones((3, 64), np.float32)
    x[1, 7] = value
    entry = Entry("F32", x.shape, (x.reshape(-1),), rounded=True)
    with pytest.raises(ModelError, match="tensor w: has NaN or infinite values, which int8 cannot represent"):
        list(write_safetensors(tmp_path / "a.safetensors", {"w": entry}, "int8", {}))


def test_biases_too_large_for_float16_are_no_int8_model(tmp_path):
    write_model(tmp_path / "m", FAMILIES["1"])
    tensors = load_file(tmp_path / "m" / FILES[1])
    tensors["conv_out.bias"][1] = 1e6
    save_file(tensors, tmp_path / "m" / FILES[1])
    with pytest.raises(ModelError, match=r"conv_out.bias: the value 1e\+06 is too large for float16; choose bf16"):
        run(tmp_path / "m", tmp_path / "x", "int8")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(
    ("name", "kind"), [("lora_unet_x.lora_down.weight", "LoRA"), ("decoder.conv_in.weight", "VAE"), ("x", "another")]
)
def test_only_whole_models_become_int8(tmp_path, name, kind):
    save_file({name: np.ones((64, 64), np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=f"found {kind}.*expected a whole model for int8; choose f32, f16 or bf16"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "int8")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_weights_with_scales_of_another_kind(tmp_path):
    """They would be rounded without those scales."""
    name = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    save_file({name: np.ones((3, 64), np.float32), f"{name}_scale": np.ones(3, np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=f"tensor {name}: found F32 with scales, expected only I8 to have them"):
        run(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "int8")


def test_wrong_scales_are_told_when_a_file_is_converted(tmp_path):
    tensors = {"a.weight": np.ones((4, 2), np.int8), "a.weight_scale": np.ones((2, 1), np.float32)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=r"a.weight.*found scales F32 \(2, 1\), expected F32, F16 or BF16 \(4, 1\)"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "f32")


def test_projections_of_several_dtypes_are_no_single_file(tmp_path):
    write_model(tmp_path / "m", FAMILIES["2"], pad_token="!")
    path = tmp_path / "m" / FILES[0]
    tensors = load_file(path)
    name = "text_model.encoder.layers.0.self_attn.k_proj.weight"
    tensors[name] = tensors[name].astype(np.float16)
    save_file(tensors, path)
    with pytest.raises(ModelError, match="found projections of dtypes F32, F16, F32, which are one tensor"):
        convert(tmp_path / "m", tmp_path / "a.safetensors")
