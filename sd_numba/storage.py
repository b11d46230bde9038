"""Files as a whole: written completely or not at all, digested; safetensors files written a block at a time.

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

import kernels

from .errors import InputError, ModelError
from .tensors import BLOCKS, NUMPY_DTYPES, WEIGHT_DTYPES

DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
BLOCK = 1 << 20  # values converted at a time


@dataclass(frozen=True)
class Entry:
    """A tensor to write.

    Attributes
    ----------
    stored : str
        Its dtype as safetensors files call it.
    shape : tuple of int
    parts : tuple of ndarray
        Flat views of the stored values that it consists of, one after the other.
    """

    stored: str
    shape: tuple[int, ...]
    parts: tuple[np.ndarray, ...]

    def dtype(self, wanted: str | None) -> str:
        """Dtype to write if this one of `DTYPES` is wanted: None, and what is no weight, stays as it is stored.

        But quantised values become float16, unless something else is wanted.
        """
        if self.stored in BLOCKS:
            return DTYPES[wanted or "f16"]
        return DTYPES[wanted] if wanted and self.stored in (*WEIGHT_DTYPES, "F64") else self.stored

    def nbytes(self, wanted: str | None) -> int:
        """Bytes to write."""
        return math.prod(self.shape) * item_bytes(self.dtype(wanted))


def item_bytes(dtype: str) -> int:
    """Bytes of a value."""
    return np.dtype(NUMPY_DTYPES[dtype]).itemsize


def write_safetensors(
    path: Path, tensors: Mapping[str, Entry], dtype: str | None, metadata: Mapping[str, str]
) -> Iterator[int]:
    """Write a file; yields how many bytes of tensors have been written.

    Raises
    ------
    ModelError
        A value is too large for float16.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    # The largest items first, so that every tensor starts at a multiple of its item's size.
    order = sorted(tensors, key=lambda name: (-item_bytes(tensors[name].dtype(dtype)), name))
    end = 0
    for name in order:
        entry = tensors[name]
        begin, end = end, end + entry.nbytes(dtype)
        header[name] = {"dtype": entry.dtype(dtype), "shape": entry.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        done = 0
        for name in order:
            entry = tensors[name]
            for part in entry.parts:
                step = BLOCK // (BLOCKS[entry.stored][0] if entry.stored in BLOCKS else 1)
                for begin in range(0, part.size, step):
                    done += file.write(_converted(part[begin : begin + step], entry.dtype(dtype), entry.stored, name))
                    yield done
        file.flush()
        os.fsync(file.fileno())


def _converted(values: np.ndarray, wanted: str, stored: str, name: str) -> bytes:
    """Give values in another dtype, rounded to the nearest, ties to even."""
    if wanted == stored:
        return values.tobytes()
    if stored in BLOCKS:
        wide = (values["values"] * values["scale"].astype(np.float32)[:, None]).reshape(-1)
    elif stored == "F64":
        wide = values.astype(np.float32)
    else:
        wide = kernels.widen(values)
    if wanted == "F32":
        return wide.tobytes()
    if wanted == "BF16":
        bits = wide.view(np.uint32)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return np.where(np.isnan(wide), 0x7FC0, rounded).astype(np.uint16).tobytes()
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float16)
    if (np.isinf(narrow) & np.isfinite(wide)).any():
        largest = np.abs(wide[np.isfinite(wide)]).max()
        raise ModelError(f"tensor {name}: found the value {largest:g}, float16 ends at 65504; choose bf16")
    return narrow.tobytes()


def check_space(target: Path, nbytes: int) -> None:
    """Raise InputError unless there is room for so many bytes where the target is to be."""
    free = shutil.disk_usage(target.absolute().parent).free
    if nbytes > free:
        raise InputError(f"{target}: needs {nbytes / 1e9:.2f} GB, {free / 1e9:.2f} GB of the disk are free; make room")


def digest_file(digest: Any, path: Path) -> None:
    """Add a file's bytes to a digest of `hashlib`."""
    block = memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])


@contextmanager
def unfinished(target: Path, remove: Callable[[Path], Any], replace: bool = False) -> Iterator[Path]:
    """Give a name to write to, which becomes the target's if nothing fails, and is removed if something does.

    Raises
    ------
    InputError
        The file or folder cannot be written, or somebody else has made the target meanwhile, unless it may `replace`
        that.
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
