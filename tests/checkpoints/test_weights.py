"""Memory-mapped safetensors: views, names, and one clear line for every kind of damage."""

import json
import os
import random
import struct
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from sd_numba import kernels
from sd_numba.checkpoints.weights import ShapeRecorder, Weights, find_nonfinite
from sd_numba.errors import ModelError
from sd_numba.files.safetensors import read_header, read_metadata
from sd_numba.networks.layers import Embedding, Linear


def write(path, header, data=b""):
    """A safetensors file as given, with whatever faults it has."""
    if isinstance(header, dict):
        header = json.dumps(header).encode()
        header += b" " * (-len(header) % 8)
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def entry(dtype="F32", shape=(2,), begin=0, end=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def fault(action, *args):
    """The message of the one-line ModelError that this must raise."""
    with pytest.raises(ModelError) as caught:
        action(*args)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000
    return message


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    return {
        "conv.weight": rng.standard_normal((3, 2, 3, 3)).astype(np.float32),
        "norm.weight": rng.standard_normal(5).astype(np.float16),
        "scalar": np.array(3, np.float32),
        "empty": np.zeros((0, 4), np.float32),
    }


def test_views_equal_what_the_safetensors_library_wrote(tmp_path, tensors):
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    weights = Weights.open(tmp_path / "a.safetensors")
    assert sorted(weights.names()) == sorted(tensors) and len(weights) == 4 and "scalar" in weights
    assert weights.dtypes() == {"F32": 3, "F16": 1}
    for name, expected in tensors.items():
        view = weights.take(name, expected.shape)
        assert view.dtype == expected.dtype and view.flags.aligned and view.flags.c_contiguous
        assert not view.flags.writeable and not view.flags.owndata
        np.testing.assert_array_equal(view, expected)
    weights.finish()


def test_bfloat16_comes_as_bits(tmp_path):
    values = np.array([1.0, -2.5, np.inf, np.nan], np.float32)
    bits = (values.view(np.uint32) >> 16).astype("<u2")
    write(tmp_path / "b.safetensors", {"w": entry("BF16", (2, 2))}, bits.tobytes())
    weights = Weights.open(tmp_path / "b.safetensors")
    np.testing.assert_array_equal(weights.take("w", (2, 2)), bits.reshape(2, 2))
    assert list(find_nonfinite(weights)) == [("w", 2)]


def test_float8(tmp_path):
    codes = np.arange(256, dtype=np.uint8)
    header = {"a.weight": entry("F8_E4M3", (2, 128), 0, 256), "b": entry("F8_E5M2", (256,), 256, 512)}
    weights = Weights.open(write(tmp_path / "f.safetensors", header, codes.tobytes() * 2))
    a, b = weights.take("a.weight", (2, 128)), weights.take("b", (256,))
    weights.finish()
    assert (a.dtype, b.dtype) == (kernels.float8_e4m3, kernels.float8_e5m2) and not a.flags.owndata
    assert kernels.widen(a)[0, 0x38] == kernels.widen(b)[0x3C] == 1
    assert list(find_nonfinite(weights)) == [("a.weight", 2), ("b", 8)]
    rows = Embedding(weights, "a", 2, 128)(np.array([[1, 0, 1]]))
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, kernels.widen(a)[None, [1, 0, 1]])


def test_updates(tmp_path):
    tensors = {"fc.weight": np.ones((4, 6), np.float16), "fc.bias": np.ones(4, np.float32)}
    tensors |= {"conv.weight": np.ones((4, 3, 3, 3), np.float32), "proj.weight": np.ones((2, 5, 1, 1), np.float32)}
    save_file(tensors, tmp_path / "a.safetensors")
    weights = Weights.open(tmp_path / "a.safetensors")
    added = {
        "fc": [(np.ones((4, 2), np.float32), np.ones((2, 6), np.float16), 0.5)],
        "conv": [(np.ones((4, 1, 1, 1), np.float32), np.ones((1, 3, 3, 3), np.float32), 2.0)],
        "proj": [(np.ones((2, 7), np.float32), np.ones((7, 5, 1, 1), np.float32), 1.0)] * 2,
    }
    for name, updates in added.items():
        for update in updates:
            weights.add_updates(name, *update)
    for name, tensor in tensors.items():
        weights.take(name, tensor.shape)
    for name, updates in added.items():
        assert weights.updates(name) == updates
    assert weights.updates("other") == ShapeRecorder().updates("fc") == []
    weights.finish()


@pytest.mark.parametrize(
    ("name", "up", "down", "expected"),
    [
        ("fcs", (4, 2), (2, 6), "an update of 'fcs.weight', expected the weight of one of its linear layers"),
        ("norm", (4, 2), (2, 1), "an update of 'norm.weight', expected the weight of one of its linear layers"),
        ("fc", (4, 2), (2, 5), "shapes (4, 2) and (2, 5), expected (4, r) and (r, 6)"),
        ("fc", (6, 2), (2, 4), "shapes (6, 2) and (2, 4), expected (4, r) and (r, 6)"),
        ("fc", (4, 2), (3, 6), "shapes (4, 2) and (3, 6), expected (4, r) and (r, 6)"),
        ("fc", (4, 0), (0, 6), "shapes (4, 0) and (0, 6), expected (4, r) and (r, 6)"),
        ("fc", (), (), "shapes () and (), expected (4, r) and (r, 6)"),
        ("fc", (4,), (6,), "shapes (4,) and (6,), expected (4, r) and (r, 6)"),
        ("conv", (4, 2), (2, 3), "shapes (4, 2) and (2, 3), expected (4, r) and (r, 3, 3, 3)"),
        ("conv", (4, 2), (2, 27), "shapes (4, 2) and (2, 27), expected (4, r) and (r, 3, 3, 3)"),
    ],
)
def test_updates_that_do_not_fit(tmp_path, name, up, down, expected):
    tensors = {"fc.weight": np.ones((4, 6), np.float32), "norm.weight": np.ones(4, np.float32)}
    save_file(tensors | {"conv.weight": np.ones((4, 3, 3, 3), np.float32)}, tmp_path / "a.safetensors")
    weights = Weights.open(tmp_path / "a.safetensors")
    assert expected in fault(weights.add_updates, name, np.ones(up, np.float32), np.ones(down, np.float32), 1.0)


def test_finish_tells_of_updates_without_a_layer(tmp_path):
    """A fault of a weight that has an update is told as any other."""
    tensors = {"a.weight": np.ones((4, 6), np.float32), "b.weight": np.ones((5, 3), np.float32)}
    save_file(tensors, tmp_path / "a.safetensors")
    weights = Weights.open(tmp_path / "a.safetensors")
    weights.add_updates("a", np.ones((4, 2), np.float32), np.ones((2, 6), np.float32), 1.0)
    weights.add_updates("b", np.ones((5, 2), np.float32), np.ones((2, 3), np.float32), 1.0)
    Linear(weights, "a", 7, 4, bias=False)
    Embedding(weights, "b", 5, 3)
    message = fault(weights.finish)
    assert "1 of a wrong shape or dtype: a.weight (found (4, 6), expected (4, 7))" in message
    assert "1 with an update that cannot be applied: b" in message


def test_opening_takes_no_memory_for_the_tensors(tmp_path):
    path = tmp_path / "big.safetensors"
    size = 1 << 31  # a hole in the file: takes no space on the disk either
    write(path, {"w": entry("F32", (size // 4,), 0, size)})
    os.truncate(path, path.stat().st_size + size)
    script = (
        "import resource, sys; from sd_numba.checkpoints.weights import Weights\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"view = Weights.open(sys.argv[1]).take('w', ({size // 4},)); assert view[-1] == 0\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20_000  # kilobytes


def test_an_unaligned_file_is_mapped_like_any_other(tmp_path):
    text = json.dumps({"w": entry()}).encode()
    text += b" " * (-len(text) % 8 + 1)  # the data begin at 1 mod 8
    write(tmp_path / "u.safetensors", text, np.array([1, 2], "<f4").tobytes())
    view = Weights.open(tmp_path / "u.safetensors").take("w", (2,))
    assert not view.flags.writeable and not view.flags.owndata
    np.testing.assert_array_equal(view, [1, 2])


def test_finish_lists_everything_that_does_not_fit(tmp_path, tensors):
    tensors["ids"] = np.arange(4)
    save_file(tensors, tmp_path / "a.safetensors")
    weights = Weights.open(tmp_path / "a.safetensors")
    assert weights.take("conv.weight", (3, 2, 1, 1)).shape == (3, 2, 1, 1)
    assert weights.take("conv.bias", (1 << 40, 9)).shape == (1 << 40, 9)  # a dummy: takes no memory
    weights.take("ids", (4,))
    weights.take("scalar", ())
    message = fault(weights.finish)
    assert "1 missing: conv.bias" in message
    assert "conv.weight (found (3, 2, 3, 3), expected (3, 2, 1, 1))" in message
    assert "ids (found I64, expected F32, F16, BF16, F8_E4M3 or F8_E5M2)" in message
    assert "2 unexpected: " in message and "norm.weight" in message and str(tmp_path / "a.safetensors") in message


def test_only_the_first_few_faults_are_listed(tmp_path, tensors):
    save_file(tensors, tmp_path / "a.safetensors")
    weights = Weights.open(tmp_path / "a.safetensors")
    for index in range(600):
        weights.take(f"blocks.{index}.weight", (1,))
    message = fault(weights.finish)
    assert "600 missing: blocks.0.weight, blocks.1.weight, blocks.2.weight, blocks.3.weight, ...;" in message


def test_a_pointwise_convolution_serves_as_a_matrix(tmp_path):
    save_file({"w": np.ones((3, 2, 1, 1), np.float32)}, tmp_path / "a.safetensors")
    weights = Weights.open(tmp_path / "a.safetensors")
    assert weights.take("w", (3, 2)).shape == (3, 2)
    weights.finish()


def test_shape_recorder():
    recorder = ShapeRecorder()
    assert recorder.take("a.weight", (np.int64(4), 5)).shape == (4, 5)
    recorder.finish()
    assert recorder.shapes == {"a.weight": (4, 5)} and "a.weight" not in recorder and not recorder.packed


def test_nonfinite_values_are_found(tmp_path):
    values = {name: np.ones(3_000_000, dtype) for name, dtype in (("a", np.float32), ("b", np.float16))}
    values["a"][[5, 2_999_999]] = np.nan, -np.inf
    values["c"] = np.arange(3)
    save_file(values, tmp_path / "a.safetensors")
    assert list(find_nonfinite(Weights.open(tmp_path / "a.safetensors"))) == [("a", 2)]


# Which file is opened


@pytest.mark.parametrize("stem", ["diffusion_pytorch_model", "model"])
def test_full_precision_is_preferred_in_a_folder(tmp_path, stem):
    save_file({"w": np.ones(2, np.float16)}, tmp_path / f"{stem}.fp16.safetensors")
    assert Weights.open(tmp_path).dtypes() == {"F16": 1}
    save_file({"w": np.ones(2, np.float32)}, tmp_path / f"{stem}.safetensors")
    weights = Weights.open(str(tmp_path))
    assert weights.dtypes() == {"F32": 1} and weights.files == [tmp_path / f"{stem}.safetensors"]


def sharded(folder, **names):
    save_file({"a": np.ones(2, np.float32)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": np.zeros(3, np.float32)}, folder / "model-00002-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors", **names}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 20}, "weight_map": weight_map}))
    return index


def test_shards(tmp_path):
    index = sharded(tmp_path)
    for path in (tmp_path, index):
        weights = Weights.open(path)
        assert sorted(weights.names()) == ["a", "b"] and len(weights.files) == 2
        np.testing.assert_array_equal(weights.take("b", (3,)), [0, 0, 0])


def test_faults_of_shards(tmp_path):
    assert "'c', which is in none of its shards" in fault(
        Weights.open, sharded(tmp_path, c="model-00001-of-00002.safetensors")
    )
    for name in ("../model.safetensors", "/etc/passwd", "", "..", 3):
        assert "expected the name of a file beside it" in fault(Weights.open, sharded(tmp_path, a=name))
    index = sharded(tmp_path)
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "model-00002-of-00002.safetensors")
    assert "'a' is there twice" in fault(Weights.open, index)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert "its shard model-00002-of-00002.safetensors is missing" in fault(Weights.open, index)
    for text in ("{}", '{"weight_map": {}}', '{"weight_map": 3}'):
        index.write_text(text)
        assert "weight_map" in fault(Weights.open, index)
    index.write_text("{")
    assert "not valid JSON" in fault(Weights.open, index)


def test_folders_without_weights(tmp_path):
    assert "no such file" in fault(Weights.open, tmp_path / "unet")
    assert "no weights" in fault(Weights.open, tmp_path)
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"PK\x03\x04")
    message = fault(Weights.open, tmp_path)
    assert "diffusion_pytorch_model.bin" in message and "safe_serialization=True" in message


# Damage


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "empty"),
        (b"\x08\0\0", "not a safetensors file, or a truncated one"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "git lfs pull"),
        (b"PK\x03\x04" + b"\0" * 99, "PyTorch pickle"),
        (b"\x80\x02}q\0(X\x0a\0\0\0state_dict", "torch.load(OLD, weights_only=True)"),
        (b"<!DOCTYPE html><html>Sign in</html>", "web page"),
        (b"\n <html>", "web page"),
        (b"GGUF" + b"\0" * 99, "GGUF"),
        (bytes(1000), "not a safetensors file"),
        (struct.pack("<Q", 1 << 63) + b"{}", "header should be 9,223,372,036,854,775,808 bytes"),
        (struct.pack("<Q", 3) + b"{}", "truncated"),
        (struct.pack("<Q", 2) + b"{}", "holds no tensors"),
        (struct.pack("<Q", 3) + b"{,}", "not JSON"),
        (struct.pack("<Q", 4) + b'{"\xff}', "not JSON"),
        (struct.pack("<Q", 60000) + b'{"a":' * 12000, "not JSON"),
    ],
)  # fmt: skip
def test_files_that_are_something_else(tmp_path, content, expected):
    (tmp_path / "x.safetensors").write_bytes(content)
    assert expected in fault(Weights.open, tmp_path / "x.safetensors")


def test_missing_and_unreadable(tmp_path):
    assert "no such file" in fault(read_header, tmp_path / "x.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    assert "not a file" in fault(read_header, tmp_path / "folder.safetensors")


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ({"w": 3}, "no dtype, shape and data_offsets"),
        ({"w": entry(dtype="F8_E9")}, "found dtype 'F8_E9', expected F32, F16, BF16, F8_E4M3 or F8_E5M2"),
        ({"w": entry(dtype=["F32"])}, "expected F32, F16, BF16, F8_E4M3 or F8_E5M2"),
        ({"w": entry(shape=(-2,))}, "found shape [-2]"),
        ({"w": entry(shape=(2.0,))}, "found shape"),
        ({"w": entry(shape=(True,))}, "found shape"),
        ({"w": {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]}}, "found shape '2'"),
        ({"w": entry(shape=[1] * 40)}, "found shape"),
        ({"w": entry(shape=(1 << 40, 1 << 40), end=1 << 40)}, "found shape"),
        ({"w": entry(shape=(0, 1 << 40, 1 << 40), end=0)}, "found shape"),
        ({"w": entry(begin=-4, end=4)}, "data_offsets [-4, 4]"),
        ({"w": entry(begin=8, end=0)}, "data_offsets [8, 0]"),
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}, "expected [begin, end]"),
        ({"w": entry(shape=(3,))}, "hold 8 bytes, but F32 (3,) needs 12"),
        ({"w": entry(), "v": entry()}, "overlaps"),
        ({"w": entry("F32", (1,), 0, 4), "v": entry("F16", (1,), 2, 4)}, "overlaps"),
        ({"w": entry("F32", (1,), 4, 8)}, "does not follow"),
        ({"w": entry("F32", (9,), 0, 36)}, "truncated"),
        ({"w": entry("F32", (1,), 0, 4)}, "damaged: its tensors end"),
        (b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "w": 1}', "names 'w' twice"),
        (b'{"w": {"dtype": "F32", "shape": [2], "shape": [2], "data_offsets": [0, 8]}}', "names 'shape' twice"),
        (b'{"w": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}', "found shape"),
        (b'{"w": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 8]}}', ""),
    ],
)  # fmt: skip
def test_damaged_headers(tmp_path, header, expected):
    assert expected in fault(Weights.open, write(tmp_path / "w.safetensors", header, bytes(8)))


def test_a_header_whose_length_looks_like_another_format_is_read(tmp_path):
    for length in (0x3C, 0x3C20, 0x0280, 0x3C0A):  # the first bytes are "<", " <", a pickle's, "\n<"
        text = json.dumps({"w": entry()}).encode()
        write(tmp_path / "w.safetensors", text + b" " * (length - len(text)), bytes(8))
        assert list(read_header(tmp_path / "w.safetensors")) == ["w"]


def test_random_damage_is_an_error_or_a_sound_file(tmp_path):
    """Whatever a few changed, lost or added bytes do: one ModelError, or tensors that lie inside the file."""
    rng = random.Random(0)
    names = ("decoder.conv_in.weight", "decoder.conv_in.bias", "encoder.mid_block.attentions.0.key.weight")
    tensors = {name: np.full((3, 2), 7, np.float16) for name in names}
    save_file(tensors, tmp_path / "small.safetensors", metadata={"format": "pt"})
    original = (tmp_path / "small.safetensors").read_bytes()
    header_end = 8 + int.from_bytes(original[:8], "little")
    path = tmp_path / "mutated.safetensors"
    survived = 0
    for _ in range(3000):
        content = bytearray(original)
        for _ in range(rng.randint(1, 4)):
            kind, place = rng.randrange(5), rng.randrange(min(header_end, len(content)))
            if kind == 0:
                content[place] = rng.randrange(256)
            elif kind == 1:
                del content[place : place + rng.randint(1, 30)]
            elif kind == 2:
                content[place:place] = rng.choice([b'"', b"0", b"9" * 30, b"[", b"}", b"-", b"e5", b",", b"\0"])
            elif kind == 3:
                content[place:place] = content[(start := rng.randrange(header_end)) : start + rng.randint(1, 60)]
            else:
                content[8:header_end] = content[8:header_end].replace(
                    b"F16", rng.choice([b"F32", b"I64", b"U8", b"F99"])
                )
        path.write_bytes(content)
        try:
            weights = Weights.open(path)
        except ModelError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
            continue
        survived += 1
        for name in weights.names():
            assert weights.raw(name).nbytes == weights.info(name).nbytes
        list(find_nonfinite(weights))
    assert 0 < survived < 1000


def test_every_truncation_is_noticed(tmp_path):
    save_file({"w": np.ones((2, 3), np.float32)}, tmp_path / "w.safetensors")
    whole = (tmp_path / "w.safetensors").read_bytes()
    for size in range(len(whole)):
        (tmp_path / "w.safetensors").write_bytes(whole[:size])
        fault(Weights.open, tmp_path / "w.safetensors")


def test_metadata(tmp_path):
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = {"__metadata__": {"a": "b", "c": 3, "d": "x\ud800"}, "w": entry}
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    assert read_metadata(tmp_path / "a.safetensors") == {"a": "b", "d": "x?"}
    text = text.replace(b'"w"', b'"w\\ud800"')
    (tmp_path / "b.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    assert "not Unicode text" in fault(Weights.open, tmp_path / "b.safetensors")
