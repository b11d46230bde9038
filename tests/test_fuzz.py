"""Readers of files against damaged, hostile and foreign files; ``python -m tests.fuzz`` tries many more."""

import json
import pickle
import random
import struct
import tracemalloc
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_numba.errors import SdNumbaError
from sd_numba.headers import read_header
from sd_numba.metadata import parse_parameters
from tests.fuzz import make_file, run, safetensors_header, try_file

OWN = 20 << 20  # bytes that every file may take: mostly CLIP's vocabulary, which comes with the package


def test_mutated_headers(tmp_path):
    ends = run(tmp_path, 1500, seed=1)
    for reader in ("header", "info", "test", "model", "vae", "lora", "embedding"):
        assert min(ends[f"{reader}: read"], ends[f"{reader}: refused"]) > 10, ends


def test_memory_stays_below_the_size_of_the_file(tmp_path):
    """But for a fixed amount."""
    path = tmp_path / "case.safetensors"
    make_file(path, random.Random(0))
    try_file(path)  # what is imported and cached on the way
    for case in range(150):
        make_file(path, random.Random(f"memory-{case}"))
        tracemalloc.start()
        try:
            try_file(path)
            assert tracemalloc.get_traced_memory()[1] < path.stat().st_size + OWN
        finally:
            tracemalloc.stop()
        try_file(path)  # untraced, for its time


@settings(max_examples=150, deadline=None)
@given(
    st.binary(max_size=300),
    st.sampled_from([b"", b"GGUF\x03\0\0\0", b"PK\x03\x04", b"\x89PNG\r\n\x1a\n", b"\x80\x02"]),
)
def test_any_bytes(tmp_path_factory, data, start):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(start + data)
    try_file(path)


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=20),
        st.tuples(st.sampled_from(["F32", "F16", "I64"]), st.lists(st.integers(0, 9), max_size=4)),
        max_size=8,
    )
)
def test_any_sound_header_is_read_back(tmp_path_factory, tensors):

    header, size = safetensors_header(tensors)
    header.pop("__metadata__")
    text = json.dumps(header).encode()
    path = tmp_path_factory.getbasetemp() / "sound.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    if "__metadata__" not in tensors:
        assert {name: (info.dtype, [*info.shape]) for name, info in read_header(path).items()} == tensors


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=400))
def test_any_text_in_a_picture(text):
    parameters = parse_parameters(text)
    assert isinstance(parameters.prompt, str)


def test_pickles_are_never_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was run",))

    (tmp_path / "a.ckpt").write_bytes(pickle.dumps(Trap()))
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Trap()))
    for name in ("a.ckpt", "b.pt"):
        ends = try_file(tmp_path / name)
        assert not any(end.endswith("read") for end in ends)
        with pytest.raises(SdNumbaError, match="a PyTorch pickle: only safetensors files are read"):
            read_header(tmp_path / name)


@pytest.mark.parametrize("part", [".", "lora_", ".processor.to_", "model.diffusion_model.", "decoder.up.", "a.lora_A."])
def test_names_without_end_take_no_time(tmp_path, part):
    """``try_file`` fails if they do."""
    names = [prefix + part * 30_000 + "weight" for prefix in ("", "model.diffusion_model.input_blocks.1.")]
    header, size = safetensors_header({name: ("F32", [2]) for name in names})
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    ends = try_file(tmp_path / "a.safetensors")
    assert ends["header: refused"] == 1
