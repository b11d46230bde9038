"""The state of a run comes back bit for bit, or is refused in one line."""

import json
import os
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from sd_numba.errors import InputError
from sd_numba.files import writing
from sd_numba.generation import state
from sd_numba.generation.state import load_state, save_state

DTYPES = ("?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8")


@st.composite
def arrays(draw):
    """Arrays of every dtype that a state can hold, with any bits: NaN, infinity and denormal numbers too."""
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=4)))
    size = int(np.prod(shape)) * dtype.itemsize
    content = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8)
    array = content.view(dtype).reshape(shape) if dtype.kind != "b" else (content & 1).astype(bool).reshape(shape)
    return array.T if draw(st.booleans()) else array


plain = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=10)
scalars = st.builds(lambda array: array.reshape(-1)[0] if array.size else np.float32(0), arrays())
trees = st.recursive(
    plain | arrays() | scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


def same(a, b):
    """Equal in type, shape and every bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray | np.generic):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@settings(max_examples=150, deadline=None)
@given(tree=trees)
def test_a_tree_comes_back_bit_for_bit(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("state") / "run.state"
    save_state(path, tree, {"kind": "test", "jobs": [1, {"a": None}]})
    found, about = load_state(path)
    assert same(found, tree)
    assert about == {"kind": "test", "jobs": [1, {"a": None}]}
    assert os.listdir(path.parent) == ["run.state"]


def test_a_long_text_comes_back(tmp_path):
    save_state(tmp_path / "a", None, {"text": "x" * 15_000_000})
    assert len(load_state(tmp_path / "a")[1]["text"]) == 15_000_000


def test_loaded_arrays_are_their_own(tmp_path):
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    save_state(tmp_path / "a", [x.T, x], {})
    (found, _), _ = load_state(tmp_path / "a")
    found[0, 0] = 9
    assert found.flags.c_contiguous and x[0, 0] == 0
    assert load_state(tmp_path / "a")[0][0][0, 0] == 0


def test_an_array_that_occurs_twice_is_stored_once(tmp_path):
    x = np.zeros(100_000, np.float32)
    save_state(tmp_path / "a", {"x": x, "history": (x, [x])}, {})
    assert (tmp_path / "a").stat().st_size < 450_000


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        (1j, "found complex 1j, expected plain values and arrays"),
        ({1: 2}, "found dict"),
        ({"a": {2}}, "found set"),
        (np.zeros(2, np.complex64), "found complex64, expected booleans, integers or floats of up to 64 bits"),
        (np.array(["a"]), "found <U1"),
        (np.zeros(2, object), "found object"),
    ],
)
def test_what_a_state_cannot_hold(tmp_path, tree, words):
    with pytest.raises(InputError, match=words):
        save_state(tmp_path / "a", tree, {})
    assert os.listdir(tmp_path) == []


def test_trees_that_are_too_deep_or_too_long(tmp_path, monkeypatch):
    tree = []
    for _ in range(60):
        tree = [tree]
    with pytest.raises(InputError, match="nested more than 50 levels deep"):
        save_state(tmp_path / "a", tree, {})
    monkeypatch.setattr(state, "_MAX_TEXT", 100)
    with pytest.raises(InputError, match="characters of text, more than 100"):
        save_state(tmp_path / "a", None, {"text": "x" * 100})
    assert os.listdir(tmp_path) == []


def test_a_failure_leaves_the_state_before_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "run.state"
    save_state(path, 1, {})

    def fail(*args, **how):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing.os, "fsync", fail)
    with pytest.raises(InputError, match="No space left on device"):
        save_state(path, 2, {})
    assert load_state(path)[0] == 1 and os.listdir(tmp_path) == ["run.state"]


def test_devices_and_folders_are_not_replaced(tmp_path):
    for path in ("/dev/null", tmp_path):
        with pytest.raises(InputError, match="not a regular file; choose another name"):
            save_state(path, 1, {})
    with pytest.raises(InputError):
        save_state(tmp_path / "none" / "run.state", 1, {})


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_whenever_a_process_is_killed_the_file_is_whole(tmp_path):
    program = """if True:
        import itertools, sys
        import numpy as np
        from sd_numba.generation.state import save_state
        for number in itertools.count():
            save_state(sys.argv[1], {"number": number, "x": np.full(20_000, number)}, {"number": number})
    """
    path = tmp_path / "run.state"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    numbers = []
    for wait in (0.05, 0.1, 0.13, 0.171):
        path.unlink(missing_ok=True)
        process = subprocess.Popen([sys.executable, "-c", program, str(path)], env=environment)
        while not path.exists():
            assert process.poll() is None
            time.sleep(0.002)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        tree, about = load_state(path)
        assert tree["number"] == about["number"] and (tree["x"] == tree["number"]).all()
        numbers.append(tree["number"])
    assert max(numbers) > 3


# ---- files that are no state


@pytest.fixture
def kept(tmp_path):
    path = tmp_path / "run.state"
    save_state(path, {"x": np.arange(10, dtype=np.float32), "history": (np.float64(2), [None, 1.5])}, {"kind": "test"})
    return path


def refused(path):
    with pytest.raises(InputError) as caught:
        load_state(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


def test_files_that_are_none(tmp_path, kept):
    assert "not the state of a run" in refused(tmp_path / "none")
    (tmp_path / "text").write_text("a red apple, over and over again")
    refused(tmp_path / "text")
    (tmp_path / "empty").touch()
    refused(tmp_path / "empty")
    refused(tmp_path)
    save_file({"w": np.zeros(1, np.float32)}, tmp_path / "model")
    assert "not the state of a run" in refused(tmp_path / "model")


def rewrite(path, change):
    """Change the header of a safetensors file, as JSON."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


def test_newer_versions_say_so(kept):
    rewrite(kept, lambda header: header["__metadata__"].update(sd_numba_state="2"))
    assert "a state of version '2', expected 1: continue with the version of sd-numba that wrote it" in refused(kept)


@pytest.mark.parametrize("key", ["tree", "about", "sha256"])
def test_states_without_a_part(kept, key):
    rewrite(kept, lambda header: header["__metadata__"].pop(key))
    assert f"damaged: it has no '{key}'" in refused(kept)


def test_every_changed_byte_of_the_contents_is_noticed(kept):
    content = kept.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    for position in range(8 + size, len(content)):
        changed = bytearray(content)
        changed[position] ^= 1
        kept.write_bytes(changed)
        assert "do not match their digest" in refused(kept)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_files_end_in_one_line_or_are_whole(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("state") / "run.state"
    tree = {"x": np.arange(10, dtype=np.float32), "history": (np.float64(2), [None, 1.5])}
    save_state(path, tree, {"kind": "test"})
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        found, about = load_state(path)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert same(found, tree) and about == {"kind": "test"}


@pytest.mark.parametrize(
    "tree",
    ['{"list": [1]}', '{"array": "7"}', '{"array": 0}', '{"scalar": "0"}', '{"tuple": 5}', '{"dict": [1]}', "{}"],
)
def test_trees_of_another_shape(kept, tree, monkeypatch):
    monkeypatch.setattr(state, "_digest", lambda texts, arrays: "same")
    rewrite(kept, lambda header: header["__metadata__"].update(tree=tree, sha256="same"))
    assert "expected a tuple, dict, array or scalar" in refused(kept)


def test_texts_nested_without_end(kept, monkeypatch):
    monkeypatch.setattr(state, "_digest", lambda texts, arrays: "same")
    rewrite(kept, lambda header: header["__metadata__"].update(tree="[" * 100_000, sha256="same"))
    assert "damaged" in refused(kept)
    rewrite(kept, lambda header: header["__metadata__"].update(tree="1", about="[]"))
    assert "damaged: about is []" in refused(kept)
