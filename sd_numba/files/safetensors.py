"""Read the headers of model files. They are validated in full first, so a damaged file gives one clear error.

A safetensors file is an 8-byte little-endian header length, a JSON header ``{name: {dtype, shape, data_offsets}}``
and the tensors' bytes. The ``safetensors`` package is not used for reading: its NumPy interface copies every tensor and
does not support bfloat16.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ModelError
from .folders import PICKLE_FILE_ADVICE
from .gguf import MAGIC, read_gguf_header
from .tensors import EXPECTED_DTYPES, MAX_DIMS, MAX_NAME, NUMPY_DTYPES, TensorInfo, join_scales, map_file

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library


def read_header(path: str | os.PathLike[str]) -> dict[str, TensorInfo]:
    """Read and check the header of a safetensors or GGUF file; the tensors themselves are not touched.

    Returns
    -------
    dict
        Name -> ``TensorInfo``, in the order of the data. The scales of int8 weights are part of their weights.

    Raises
    ------
    ModelError
        The file cannot be read, has another format, is truncated, or its header contradicts itself.
    """
    path = Path(path)
    if _is_gguf(path):
        with map_file(path) as data:
            return join_scales(read_gguf_header(path, data))
    header, base = _load_header(path)
    header.pop("__metadata__", None)
    return join_scales(_check_layout(path, header, base, path.stat().st_size))


def _is_gguf(path: Path) -> bool:
    try:
        if not os.path.isfile(path):  # a pipe would wait for a writer
            return False
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except (OSError, ValueError):  # the safetensors reader reports it
        return False


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the metadata strings in the header of a safetensors file.

    Raises
    ------
    ModelError
        The file cannot be read, or its header is damaged.
    """
    if _is_gguf(Path(path)):
        return {}
    texts = _load_header(Path(path))[0].get("__metadata__")
    pairs = texts.items() if isinstance(texts, dict) else ()
    return {_unicode(key): _unicode(text) for key, text in pairs if isinstance(text, str)}


def _unicode(text: str) -> str:
    """Replace lone surrogates: JSON can hold them, but they cannot be encoded."""
    return text.encode("utf-8", "replace").decode()


def _load_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the parsed JSON header, and the offset of the first tensor."""
    try:
        if not os.path.isfile(path):
            raise ModelError(f"{path}: {'not a file' if os.path.exists(path) else 'no such file'}")
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(64)
            _reject_other_formats(path, start, size)
            length = int.from_bytes(start[:8], "little")
            if length > min(size - 8, MAX_HEADER):
                raise ModelError(
                    f"{path}: damaged or truncated: its header should be {length:,} bytes long, the file has {size:,}; "
                    "download it again"
                )
            file.seek(8)
            text = file.read(length)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from None
    return _parse_header(path, text), 8 + length


def _reject_other_formats(path: Path, start: bytes, size: int) -> None:
    """Raise an error that names the format, for the files that are commonly mistaken for safetensors files."""
    if size == 0:
        raise ModelError(f"{path}: the file is empty; download it again")
    if size >= 10 and start[8:9] == b"{":
        return
    if start.startswith(b"version https://git-lfs"):
        raise ModelError(f"{path}: a Git LFS pointer, not the weights themselves; run 'git lfs pull' in its folder")
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04")):
        raise ModelError(f"{path}: a PyTorch pickle: {PICKLE_FILE_ADVICE}")
    if start.lstrip().startswith(b"<"):
        raise ModelError(f"{path}: a web page, not a safetensors file; download it again")
    raise ModelError(f"{path}: not a safetensors file, or a truncated one ({size:,} bytes)")


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = Counter(name for name, _ in pairs)
        if len(names) < len(pairs):
            raise ModelError(f"{path}: its header names {names.most_common(1)[0][0]!r:.80} twice")
        return dict(pairs)

    try:
        header: dict[str, Any] = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: damaged: its header is not JSON ({error}); download it again") from None
    odd = next((name for name in header if re.search("[\ud800-\udfff]", name)), None)
    if odd is not None:
        raise ModelError(f"{path}: damaged: its header names {odd!r:.80}, which is not Unicode text")
    return header


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 56


def _fits(shape: list[int]) -> bool:
    return _is_size(math.prod(filter(None, shape)))  # NumPy multiplies the sizes even where one of them is 0


def _check_entry(path: Path, name: str, entry: Any, base: int) -> TensorInfo:
    fault = f"{path}: damaged: tensor {name!r:.80}"
    if len(name) > MAX_NAME:
        raise ModelError(f"{fault}: its name has {len(name):,} characters, expected at most {MAX_NAME}")
    if not isinstance(entry, dict):
        raise ModelError(f"{fault} has no dtype, shape and data_offsets")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in NUMPY_DTYPES:
        raise ModelError(f"{path}: tensor {name!r:.80}: found dtype {dtype!r:.80}, {EXPECTED_DTYPES}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(map(_is_size, shape)) or not _fits(shape):
        raise ModelError(f"{fault}: found shape {shape!r:.80}, expected a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise ModelError(f"{fault}: found data_offsets {offsets!r:.80}, expected [begin, end]")
    expected = math.prod(shape) * np.dtype(NUMPY_DTYPES[dtype]).itemsize
    if offsets[1] - offsets[0] != expected:
        raise ModelError(
            f"{fault}: its data_offsets {offsets} hold {offsets[1] - offsets[0]} bytes, "
            f"but {dtype} {tuple(shape)} needs {expected}"
        )
    return TensorInfo(dtype, tuple(shape), base + offsets[0], expected)


def _check_layout(path: Path, header: dict[str, Any], base: int, size: int) -> dict[str, TensorInfo]:
    """Check every entry, and that the tensors fill the file without gap or overlap, as the format demands."""
    entries = {name: _check_entry(path, name, entry, base) for name, entry in header.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)))
    end = base
    for name, info in entries.items():
        if info.start != end:
            kind = "overlaps the one before it" if info.start < end else "does not follow the one before it"
            raise ModelError(f"{path}: damaged: tensor {name!r:.80} {kind}")
        end += info.nbytes
    if end != size:
        kind = "truncated" if end > size else "damaged"
        raise ModelError(f"{path}: {kind}: its tensors end at byte {end:,}, the file has {size:,}; download it again")
    return entries
