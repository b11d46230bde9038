"""Atomic writing of files, and writing of safetensors files a block at a time.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import kernels
from ..errors import InputError, ModelError
from .tensors import BLOCK, BLOCKS, NUMPY_DTYPES, SCALED, SCALES, WEIGHT_DTYPES

DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "int8": SCALED}


@dataclass(frozen=True)
class Entry:
    """A tensor to write.

    Attributes
    ----------
    stored : str
        The name of its dtype in safetensors files.
    shape : tuple of int
    parts : tuple of ndarray
        Flat views of the stored values, concatenated in this order. Each has the same number of rows.
    scales : ndarray, optional
        Float32 scales of int8 values, one for each row.
    rounded : bool
        Whether it becomes int8, and not float16, if int8 is wanted.
    """

    stored: str
    shape: tuple[int, ...]
    parts: tuple[np.ndarray, ...]
    scales: np.ndarray | None = None
    rounded: bool = False

    def dtype(self, wanted: str | None) -> str:
        """Return the dtype to write for a wanted one of `DTYPES`.

        Without a wanted dtype the stored one is kept, except that values in blocks become float16. Tensors that are
        not weights always keep theirs.
        """
        if self.stored in BLOCKS:
            wanted = wanted or "f16"
        elif wanted is None or (self.stored not in (*WEIGHT_DTYPES, "F64") and self.scales is None):
            return self.stored
        keeps = wanted == "int8" and self.scales is None and not self.rounded
        return DTYPES["f16" if keeps else wanted]

    def tensors(self, name: str, wanted: str | None) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return the names of the tensors to write -> dtype and shape: the tensor, and the scales of int8 values."""
        dtype = self.dtype(wanted)
        scaled = dtype == SCALED and (self.scales is not None or self.stored != SCALED)
        return {name: (dtype, self.shape)} | ({name + SCALES: ("F32", (self.shape[0], 1))} if scaled else {})

    def nbytes(self, wanted: str | None) -> int:
        """Return the number of bytes to write."""
        return sum(_nbytes(*tensor) for tensor in self.tensors("", wanted).values())


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * np.dtype(NUMPY_DTYPES[dtype]).itemsize


def write_safetensors(
    path: Path, tensors: Mapping[str, Entry], dtype: str | None, metadata: Mapping[str, str]
) -> Iterator[int]:
    """Write a file; yield the number of bytes of tensors written so far.

    Raises
    ------
    ModelError
        A value is too large for float16, int8 cannot represent a value, or weights that are not int8 have scales.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    written: dict[str, tuple[str, tuple[int, ...]]] = {}
    for key, entry in tensors.items():
        several = entry.tensors(key, dtype)
        if any(name != key and name in tensors for name in several):
            raise ModelError(f"tensor {key}: found {entry.stored} with scales, expected only I8 to have them")
        written |= several
    # The largest items first, so that every tensor starts at a multiple of its item's size.
    order = sorted(written, key=lambda name: (-_nbytes(written[name][0], ()), name))
    end, places = 0, {}
    for name in order:
        places[name], end = end, end + _nbytes(*written[name])
        header[name] = {"dtype": written[name][0], "shape": written[name][1], "data_offsets": [places[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        base, done = file.tell(), 0
        for name in filter(tensors.__contains__, order):
            for piece, data in _pieces(tensors[name], name, dtype):
                file.seek(base + places[piece])
                places[piece] += file.write(data)
                done += len(data)
                yield done
        file.flush()
        os.fsync(file.fileno())


def _pieces(entry: Entry, name: str, wanted: str | None) -> Iterator[tuple[str, bytes]]:
    """Yield a tensor in pieces, each with the tensor's name, interleaved with the pieces of its scales."""
    dtype, (_, *scales_name) = entry.dtype(wanted), entry.tensors(name, wanted)
    if entry.scales is None and not scales_name:
        for part in entry.parts:
            step = BLOCK // (BLOCKS[entry.stored][0] if entry.stored in BLOCKS else 1)
            for begin in range(0, part.size, step):
                yield name, _converted(part[begin : begin + step], dtype, entry.stored, name)
        return
    row, rows = math.prod(entry.shape[1:]), entry.shape[0] // len(entry.parts)
    step = max(1, BLOCK // max(1, row))
    for i, part in enumerate(entry.parts):
        table = part.reshape(rows, part.size // max(1, rows))
        for begin in range(0, rows, step):
            some = table[begin : begin + step]
            if entry.scales is None:
                values, scales = _quantized(_widened(some, entry.stored).reshape(-1, row), name)
            else:
                first = i * rows + begin
                values, scales = some, entry.scales[first : first + len(some)]
            if scales_name:
                yield name, values.tobytes()
                yield scales_name[0], scales.tobytes()
            else:
                yield name, _narrowed(values * scales[:, np.newaxis], dtype, name)


def _quantized(wide: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Round rows to int8, so that the largest value of each becomes 127. Return the rows and their scales."""
    weight = kernels.quantize(wide)
    if not np.isfinite(weight.scales).all():
        raise ModelError(f"tensor {name}: has NaN or infinite values, which int8 cannot represent; download it again")
    return weight.values, weight.scales


def _converted(values: np.ndarray, wanted: str, stored: str, name: str) -> bytes:
    """Convert values to another dtype."""
    return values.tobytes() if wanted == stored else _narrowed(_widened(values, stored), wanted, name)


def _widened(values: np.ndarray, stored: str) -> np.ndarray:
    """Convert values to float32."""
    if stored in BLOCKS:
        return values["values"] * values["scale"].astype(np.float32)[..., None]
    return values.astype(np.float32) if stored == "F64" else kernels.widen(values)


def _narrowed(wide: np.ndarray, wanted: str, name: str) -> bytes:
    """Convert float32 values to another dtype, rounding to nearest, ties to even."""
    if wanted == "F32":
        return wide.tobytes()
    if wanted == "BF16":
        return kernels.narrow(wide).tobytes()
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float16)
    if (np.isinf(narrow) & np.isfinite(wide)).any():
        largest = np.abs(wide[np.isfinite(wide)]).max()
        raise ModelError(f"tensor {name}: the value {largest:g} is too large for float16; choose bf16")
    return narrow.tobytes()


def check_space(target: Path, nbytes: int) -> None:
    """Raise InputError unless the target's disk has ``nbytes`` bytes free."""
    free = shutil.disk_usage(target.absolute().parent).free
    if nbytes > free:
        raise InputError(f"{target}: not enough disk space: {nbytes / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free")


@contextmanager
def unfinished(target: Path, remove: Callable[[Path], Any], replace: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write to. It is renamed to the target on success and removed on failure.

    Raises
    ------
    InputError
        The file or folder cannot be written, or another process has created the target meanwhile and `replace` is
        false.
    """
    path = target.with_name(f".sd-numba-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield path
        if os.path.lexists(target) and not replace:
            raise InputError(f"{target}: exists already; choose another name or remove it")
        os.replace(path, target)
    except OSError as error:
        raise InputError(f"{target}: cannot be written: {error.strerror or error}") from None
    finally:
        if os.path.lexists(path):
            remove(path)
