"""Location of a tensor in a file, and views of it in the mapped file."""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .. import kernels
from ..errors import ModelError

MAX_DIMS = 32
BLOCK = 1 << 20  # values that are checked or converted at a time
MAX_NAME = 1000  # characters: several times the longest real name, and short enough to match against any pattern
# NumPy has neither bfloat16 nor float8: their bits are passed on as unsigned integers, or as the kernels' own dtypes.
NUMPY_DTYPES: dict[str, type[np.generic] | np.dtype] = {
    "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "F64": np.float64,
    "F8_E4M3": kernels.float8_e4m3, "F8_E5M2": kernels.float8_e5m2, "F8_E8M0": np.uint8, "BOOL": np.bool_,
    "I8": np.int8, "U8": np.uint8, "I16": np.int16, "U16": np.uint16,
    "I32": np.int32, "U32": np.uint32, "I64": np.int64, "U64": np.uint64,
}  # fmt: skip
WEIGHT_DTYPES = ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
SCALED, SCALES, SCALE_DTYPES = "I8", "_scale", ("F32", "F16", "BF16")  # see `join_scales`
EXPECTED_DTYPES = f"expected {', '.join(WEIGHT_DTYPES[:-1])} or {WEIGHT_DTYPES[-1]}"
# GGUF dtypes that store values in blocks -> values in a block, and the NumPy dtype of a block.
BLOCKS = {"Q8_0": (32, np.dtype([("scale", np.float16), ("values", np.int8, 32)]))}


@dataclass(frozen=True)
class TensorInfo:
    """One header entry: a tensor's offset in bytes from the start of its file, and its scales if it has any."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int
    scales: TensorInfo | None = None

    def rows(self, part: int, parts: int) -> TensorInfo:
        """Return part number ``part`` of ``parts`` equal parts of the rows, as a separate tensor."""
        size, rest = divmod(self.shape[0] if self.shape else 0, parts)
        if rest or not size:
            raise ModelError(f"found a tensor of shape {self.shape}, expected {parts} equal parts of its rows")
        nbytes = self.nbytes // parts
        scales = self.scales and self.scales.rows(part, parts)
        return TensorInfo(self.dtype, (size, *self.shape[1:]), self.start + part * nbytes, nbytes, scales)


def join_scales(header: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Attach the scales of int8 weights to their weights, and remove the scales' own entries from a header.

    The scales of ``X.weight`` are ``X.weight_scale (n, 1)``, as in compressed-tensors and vLLM
    (https://github.com/vllm-project/compressed-tensors, strategy "channel"): row i of the weight stands for
    ``weight[i] * weight_scale[i]``.
    """
    joined = dict(header)
    for name in header:
        weight = joined.get(name.removesuffix(SCALES))
        if name.endswith(f"weight{SCALES}") and weight is not None and (weight.dtype, weight.scales) == (SCALED, None):
            joined[name.removesuffix(SCALES)] = replace(weight, scales=joined.pop(name))
    return joined


def map_file(path: Path) -> mmap.mmap:
    """Map a file into memory for reading.

    Raises
    ------
    ModelError
        The file cannot be mapped.
    """
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be memory-mapped: {error}") from None


def tensor_view(info: TensorInfo, mapped: mmap.mmap) -> np.ndarray:
    """Return a view of a tensor in a mapped file, as stored. Quantised values are a vector of blocks."""
    if info.dtype in BLOCKS:
        dtype = BLOCKS[info.dtype][1]
        return np.ndarray(info.nbytes // dtype.itemsize, dtype, buffer=mapped, offset=info.start)
    return np.ndarray(info.shape, NUMPY_DTYPES[info.dtype], buffer=mapped, offset=info.start)


def read_scales(info: TensorInfo, mapped: mmap.mmap, scales: tuple[TensorInfo, mmap.mmap] | None) -> np.ndarray:
    """Read the scales of an int8 weight. They may be in another file.

    Returns
    -------
    ndarray
        Float32 ``(n,)``, one for each row.

    Raises
    ------
    ModelError
        The scales are missing, have the wrong shape or dtype, or have invalid values: negative, infinite, NaN, or 0 for
        a row that is not all zeros.
    """
    n = info.shape[0] if info.shape else 0
    expected = f"expected F32, F16 or BF16 ({n}, 1)"
    if scales is None:
        raise ModelError(f"found I8 without its scales, {expected}")
    found = scales[0]
    if not info.shape or found.dtype not in SCALE_DTYPES or found.shape[:1] != (n,) or math.prod(found.shape) != n:
        raise ModelError(f"found scales {found.dtype} {found.shape!s:.80}, {expected}")
    result = kernels.widen(tensor_view(*scales)).reshape(n)
    bad = np.count_nonzero(~np.isfinite(result) | (result < 0))
    if bad:
        raise ModelError(f"found {bad} scales that are NaN, infinite or negative")
    rows = tensor_view(info, mapped).reshape(n, math.prod(info.shape[1:]))
    step = max(1, BLOCK // max(1, rows.shape[1]))
    for first in range(0, n, step):
        empty = result[first : first + step] == 0
        if empty.any() and (empty & rows[first : first + step].any(axis=1)).any():
            raise ModelError("found a scale of 0 for a row with other values than 0")
    return result
