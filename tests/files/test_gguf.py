"""GGUF files as stable-diffusion.cpp writes them."""

import struct

import numpy as np
import pytest
from safetensors.numpy import load_file

from bench.make_random_model import write_model
from sd_numba import StableDiffusionPipeline, kernels
from sd_numba.errors import ModelError
from sd_numba.files.safetensors import read_header
from sd_numba.tools.convert import convert
from sd_numba.tools.info import describe
from tests.families.test_names import FAMILIES, latents
from tests.fuzz import GGML, gguf_header
from tests.golden.compare import scratch


def quantised(x):
    """Q8_0 by its definition: of 32 values, the largest becomes 127."""
    blocks = x.reshape(-1, 32).astype(np.float32)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / 127
    values = np.round(np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0)).astype(np.int8)
    return scale.astype(np.float16), values


def write_gguf(path, tensors, kind):
    """Matrices in this type where it can hold them, everything else in float32."""
    kinds = {
        name: (kind if x.ndim > 1 and x.shape[-1] % GGML[kind][1] == 0 else "F32", list(x.shape))
        for name, x in tensors.items()
    }
    head, size = gguf_header(kinds)
    data = bytearray(head + bytes(size))
    path.write_bytes(data)
    for name, info in read_header(path).items():
        x = tensors[name]
        if info.dtype == "Q8_0":
            scale, values = quantised(x)
            stored = b"".join(s.tobytes() + v.tobytes() for s, v in zip(scale, values, strict=True))
        else:
            stored = x.astype({"F32": np.float32, "F16": np.float16}[info.dtype]).tobytes()
        assert len(stored) == info.nbytes and info.start % 64 == 0
        data[info.start : info.start + info.nbytes] = stored
    path.write_bytes(data)
    return path


@pytest.fixture(scope="module")
def single():
    """A small model in one safetensors file."""
    folder, file = scratch() / "gguf", scratch() / "gguf.safetensors"
    write_model(folder, FAMILIES["1"])
    list(convert(folder, file))
    return file


def test_full_precision_makes_the_same_picture(single, tmp_path):
    path = write_gguf(tmp_path / "a.gguf", load_file(single), "F32")
    a, b = (StableDiffusionPipeline.from_pretrained(p, weights="mmap") for p in (single, path))
    np.testing.assert_array_equal(latents(b), latents(a))
    assert "single-file Stable Diffusion checkpoint" in describe(path)


def test_half_precision_is_that_of_a_converted_file(single, tmp_path):
    path = write_gguf(tmp_path / "a.gguf", load_file(single), "F16")
    list(convert(path, tmp_path / "b.safetensors"))
    a, b = (StableDiffusionPipeline.from_pretrained(p, weights="mmap") for p in (path, tmp_path / "b.safetensors"))
    np.testing.assert_array_equal(latents(b), latents(a))
    assert "F16" in describe(path)


@pytest.mark.parametrize("dtype", ["f16", "f32", None])
def test_quantised_files_are_converted(single, tmp_path, dtype):
    tensors = load_file(single)
    path = write_gguf(tmp_path / "q.gguf", tensors, "Q8_0")
    with pytest.raises(
        ModelError, match=r"found quantised weights \(Q8_0\).*sd-numba convert .*q.safetensors --dtype f16"
    ):
        StableDiffusionPipeline.from_pretrained(path)
    list(convert(path, tmp_path / "b.safetensors", dtype))
    found = load_file(tmp_path / "b.safetensors")
    assert found.keys() == tensors.keys()
    for name, info in read_header(path).items():
        if info.dtype == "Q8_0":
            scale, values = quantised(tensors[name])
            expected = (scale.astype(np.float32) * values).reshape(tensors[name].shape)
            assert found[name].dtype == (np.float32 if dtype == "f32" else np.float16)
            np.testing.assert_array_equal(found[name], expected.astype(found[name].dtype))
            np.testing.assert_allclose(expected, tensors[name], atol=np.abs(tensors[name]).max() / 200)
    assert StableDiffusionPipeline.from_pretrained(tmp_path / "b.safetensors", weights="mmap").unet


def test_quantised_files_become_int8(single, tmp_path):
    path = write_gguf(tmp_path / "q.gguf", load_file(single), "Q8_0")
    for name, dtype in (("wide", "f32"), ("int8", "int8")):
        list(convert(path, tmp_path / f"{name}.safetensors", dtype))
    wide, int8 = (load_file(tmp_path / f"{name}.safetensors") for name in ("wide", "int8"))
    rounded = {name for name, x in int8.items() if x.dtype == np.int8}
    assert len(rounded) > 50 and int8.keys() == wide.keys() | {f"{name}_scale" for name in rounded}
    for name in rounded:
        expected = kernels.quantize(wide[name])
        np.testing.assert_array_equal(int8[name], expected.values)
        np.testing.assert_array_equal(int8[f"{name}_scale"], expected.scales[:, None])


RECORD = struct.pack("<I2QI", 2, 3, 2, 1)
SECOND = struct.pack("<IQIQ", 1, 2, 0, 64)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda d: d[:100], "continues past the end of the file at byte 100"),
        (lambda d: d[:-70], "ends at byte"),
        (lambda d: d[:4] + struct.pack("<I", 1) + d[8:], "GGUF version 1, expected 2 or 3"),
        (lambda d: d[:8] + struct.pack("<Q", 1 << 60) + d[16:], "damaged or truncated"),
        (lambda d: d[:16] + struct.pack("<Q", 1 << 60) + d[24:], "damaged or truncated"),
        (lambda d: d.replace(b"w.weight", b"w.bias\0\0"), "names 'w.bias"),
        (lambda d: d.replace(struct.pack("<II", 4, 64), struct.pack("<II", 4, 48)), "alignment is 48"),
        (lambda d: d.replace(RECORD, struct.pack("<I2QI", 2, 3, 2, 12)), "found GGUF type 12"),
        (lambda d: d.replace(RECORD, struct.pack("<I2QI", 2, 1 << 60, 2, 1)), "found shape"),
        (lambda d: d.replace(RECORD, struct.pack("<I2QI", 2, 0, 1 << 60, 1)), "found shape"),
        (lambda d: d.replace(SECOND, struct.pack("<IQIQ", 1, 2, 0, 0)), "overlaps the one before it"),
        (lambda d: d.replace(RECORD, struct.pack("<I2QI", 2, 3, 2, 8)), "multiple of 32"),
    ],
)
def test_damaged_files_are_one_clear_line(tmp_path, damage, expected):
    head, size = gguf_header({"w.weight": ("F16", [2, 3]), "w.bias\0\0": ("F32", [2])})
    path = tmp_path / "a.gguf"
    path.write_bytes(damage(head + bytes(size)))
    with pytest.raises(ModelError) as caught:
        read_header(path)
    assert expected in str(caught.value) and "\n" not in str(caught.value)
