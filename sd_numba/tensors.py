"""Where a tensor lies in a file, and how to look at it there."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import kernels

from .errors import ModelError

MAX_DIMS = 32
MAX_NAME = 1000  # characters: several times the longest real one, few enough for any pattern to be tried on
# NumPy has no bfloat16 and no float8: their bits are handed out as unsigned integers, or as the kernels want them.
NUMPY_DTYPES: dict[str, type[np.generic] | np.dtype] = {
    "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "F64": np.float64,
    "F8_E4M3": kernels.float8_e4m3, "F8_E5M2": kernels.float8_e5m2, "F8_E8M0": np.uint8, "BOOL": np.bool_,
    "I8": np.int8, "U8": np.uint8, "I16": np.int16, "U16": np.uint16,
    "I32": np.int32, "U32": np.uint32, "I64": np.int64, "U64": np.uint64,
}  # fmt: skip
WEIGHT_DTYPES = ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
EXPECTED_DTYPES = f"expected {', '.join(WEIGHT_DTYPES[:-1])} or {WEIGHT_DTYPES[-1]}"
# Dtypes of GGUF files that store several values together -> their number, and what NumPy makes of them.
BLOCKS = {"Q8_0": (32, np.dtype([("scale", np.float16), ("values", np.int8, 32)]))}


@dataclass(frozen=True)
class TensorInfo:
    """One header entry: where a tensor lies in its file, in bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def rows(self, part: int, parts: int) -> TensorInfo:
        """One of several equal parts of its rows, as a tensor of its own."""
        size, rest = divmod(self.shape[0] if self.shape else 0, parts)
        if rest or not size:
            raise ModelError(f"found a tensor of shape {self.shape}, expected {parts} equal parts of its rows")
        nbytes = self.nbytes // parts
        return TensorInfo(self.dtype, (size, *self.shape[1:]), self.start + part * nbytes, nbytes)


def map_file(path: Path) -> mmap.mmap:
    """Map a file into memory, to be read.

    Raises
    ------
    ModelError
        It cannot be.
    """
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be memory-mapped: {error}") from None


def tensor_view(info: TensorInfo, mapped: mmap.mmap) -> np.ndarray:
    """The tensor in a mapped file, as stored; quantised values as a vector of their blocks."""
    if info.dtype in BLOCKS:
        dtype = BLOCKS[info.dtype][1]
        return np.ndarray(info.nbytes // dtype.itemsize, dtype, buffer=mapped, offset=info.start)
    return np.ndarray(info.shape, NUMPY_DTYPES[info.dtype], buffer=mapped, offset=info.start)
