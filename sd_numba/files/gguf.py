"""Headers of GGUF files, the format of stable-diffusion.cpp: one model in a file, in float16 or quantised.

A GGUF file consists of a magic word, a version, the numbers of tensors and of settings, the settings (key, type,
value), a record for each tensor (name, sizes from the innermost dimension outwards, type, offset), and the tensors,
which start at the next multiple of the alignment. Only versions 2 and 3, little-endian, are read.
The ``gguf`` package is not used: it trusts the sizes in the file, so a hostile file can make it exhaust memory.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path

import numpy as np

from ..errors import ModelError
from .tensors import BLOCKS, MAX_DIMS, MAX_NAME, NUMPY_DTYPES, TensorInfo

MAGIC = b"GGUF"
ALIGNMENT = 32  # unless the settings say otherwise
ALIGNMENT_KEY = "general.alignment"
# GGUF number of a tensor type -> its name here. A Q8_0 block is a float16 scale, then 32 signed bytes.
TYPES = {0: "F32", 1: "F16", 8: "Q8_0", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"}
SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # type of a setting -> size in bytes
UINT32, STRING, ARRAY = 4, 8, 9
MIN_STRING = 8  # bytes of an empty text: its length


class _Reader:
    """Reads values in sequence, never past the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def fail(self, what: str) -> ModelError:
        return ModelError(f"{self.path}: damaged or truncated: {what}; download it again")

    def number(self, kind: str) -> int:
        """Read a little-endian number: ``"I"`` (32 bits) or ``"Q"`` (64 bits)."""
        value: int = struct.unpack("<" + kind, self.take(4 if kind == "I" else 8))[0]
        return value

    def take(self, count: int) -> bytes:
        self.skip(count)
        return self.data[self.at - count : self.at]

    def skip(self, count: int) -> None:
        if count > len(self.data) - self.at:
            raise self.fail(f"its header continues past the end of the file at byte {len(self.data):,}")
        self.at += count

    def text(self) -> str:
        try:
            return self.take(self.number("Q")).decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail("a name in its header is not UTF-8") from None

    def skip_value(self, kind: int) -> None:
        """Skip the value of a setting."""
        if kind in SCALARS:
            self.skip(SCALARS[kind])
        elif kind == STRING:
            self.skip(self.number("Q"))
        elif kind == ARRAY:
            items, count = self.number("I"), self.number("Q")
            if items in SCALARS:
                self.skip(SCALARS[items] * count)
            elif items == STRING and count * MIN_STRING <= len(self.data) - self.at:
                for _ in range(count):
                    self.skip(self.number("Q"))
            else:
                raise self.fail(f"found a list of {count:,} values of type {items}")
        else:
            raise self.fail(f"found a setting of type {kind}")


def read_gguf_header(path: Path, data: mmap.mmap) -> dict[str, TensorInfo]:
    """Read and check the header of a GGUF file.

    Returns
    -------
    dict
        Name -> ``TensorInfo``, in the order of the data; shapes with the innermost size last.

    Raises
    ------
    ModelError
        The file is truncated, its header contradicts itself, or a tensor's type is not supported.
    """
    reader = _Reader(path, data)
    reader.skip(len(MAGIC))
    version = reader.number("I")
    if version not in (2, 3):
        raise ModelError(f"{path}: found GGUF version {version}, expected 2 or 3, little-endian")
    tensors, settings = reader.number("Q"), reader.number("Q")
    alignment = ALIGNMENT
    for _ in range(settings):
        key, kind = reader.text(), reader.number("I")
        if key == ALIGNMENT_KEY and kind == UINT32:
            alignment = reader.number("I")
        else:
            reader.skip_value(kind)
    if alignment < 1 or alignment & (alignment - 1):
        raise reader.fail(f"its alignment is {alignment}, expected a power of two")
    records: dict[str, TensorInfo] = {}
    for _ in range(tensors):
        name, info = _read_record(reader)
        if name in records:
            raise reader.fail(f"its header names {name!r:.80} twice")
        records[name] = info
    base = math.ceil(reader.at / alignment) * alignment
    end, placed = base, {}
    for name, info in sorted(records.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        start = base + info.start
        if start < end:
            raise reader.fail(f"tensor {name!r:.80} overlaps the one before it")
        end = start + info.nbytes
        if end > len(data):
            raise reader.fail(f"tensor {name!r:.80} ends at byte {end:,}, the file has {len(data):,}")
        placed[name] = TensorInfo(info.dtype, info.shape, start, info.nbytes)
    return placed


def _read_record(reader: _Reader) -> tuple[str, TensorInfo]:
    name, dimensions = reader.text(), reader.number("I")
    if len(name) > MAX_NAME:
        raise reader.fail(f"found a name of {len(name):,} characters, expected at most {MAX_NAME}")
    if dimensions > MAX_DIMS:
        raise reader.fail(f"tensor {name!r:.80}: found {dimensions} dimensions")
    shape = tuple(reader.number("Q") for _ in range(dimensions))[::-1]
    kind, start = reader.number("I"), reader.number("Q")
    dtype = TYPES.get(kind)
    if dtype is None:
        raise ModelError(
            f"{reader.path}: tensor {name!r:.80}: found GGUF type {kind}, expected F32, F16, BF16 or Q8_0; "
            "convert the file with stable-diffusion.cpp to one of those"
        )
    values = math.prod(shape)
    if math.prod(filter(None, shape)) >= 1 << 56:  # NumPy multiplies the sizes even where one of them is 0
        raise reader.fail(f"tensor {name!r:.80}: found shape {shape!r:.80}")
    block, stored = BLOCKS[dtype] if dtype in BLOCKS else (1, np.dtype(NUMPY_DTYPES[dtype]))
    if block > 1 and (not shape or shape[-1] % block):
        raise reader.fail(f"tensor {name!r:.80}: found shape {shape!r:.80}, expected rows of a multiple of {block}")
    return name, TensorInfo(dtype, shape, start, values // block * stored.itemsize)
