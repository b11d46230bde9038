"""Memory that is used again: fresh pages cost the operating system more time than a kernel takes to fill them.

`scratch` keeps the buffers that kernels work in. `reuse` makes the arrays that kernels return come from the memory of
arrays that are gone, for as long as a network runs.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

_SMALL = 1 << 16  # bytes below which the C library's allocator recycles well enough
_WASTE = 2  # how many times larger than the array its memory may be


def aligned(floats: int) -> np.ndarray:
    """Return an uninitialised float32 vector that starts on a cache line."""
    raw = np.empty(floats * 4 + 64, np.uint8)
    start = -raw.__array_interface__["data"][0] % 64
    return raw[start : start + floats * 4].view(np.float32)


class _Scratch(threading.local):
    """Buffers of a thread, by use, that grow to what was asked for and are used again."""

    def __init__(self) -> None:
        self._buffers: dict[str, np.ndarray] = {}

    def take(self, use: str, floats: int) -> np.ndarray:
        """Return a float32 vector of at least `floats`, whose contents are what the last user left."""
        buffer = self._buffers.get(use)
        if buffer is None or buffer.size < floats:
            self._buffers.pop(use, None)
            del buffer  # before the larger one is made
            buffer = self._buffers[use] = aligned(floats)
        return buffer


scratch = _Scratch()


class _Pool:
    """Memory of arrays that are gone."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] | None = []

    def take(self, shape: Sequence[int]) -> np.ndarray:
        floats = math.prod(shape)
        fitting = [block for block in self._free or () if floats <= block.size <= _WASTE * floats]
        if fitting:
            block = min(fitting, key=lambda block: block.size)
            self._free = [other for other in self._free or () if other is not block]
        else:
            self._free = [other for other in self._free or () if other.size > floats]  # or they would pile up
            block = aligned(floats)
        return np.asarray(_Lease(self, block)).reshape(-1)[:floats].reshape(shape)

    def give_back(self, block: np.ndarray) -> None:
        if self._free is not None:
            self._free.append(block)

    def clear(self) -> None:
        self._free = []

    def close(self) -> None:
        self._free = None


class _Lease:
    """Owner of an array's memory: NumPy keeps it alive as long as the array or a view of it, then it goes back."""

    def __init__(self, pool: _Pool, block: np.ndarray) -> None:
        self._pool, self._block = pool, block

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return self._block.__array_interface__

    def __del__(self) -> None:
        self._pool.give_back(self._block)


class _Active(threading.local):
    pool: _Pool | None = None


_active = _Active()


@contextmanager
def reuse() -> Iterator[None]:
    """Reuse the memory of freed arrays for the arrays that kernels return in this ``with`` block and thread.

    Arrays that outlive the block stay valid. At its end, free memory goes back to the system. A block inside another
    one has no effect.
    """
    if _active.pool is not None:
        yield
        return
    pool = _active.pool = _Pool()
    try:
        yield
    finally:
        _active.pool = None
        pool.close()


def trim() -> None:
    """Give the system what is free in the memory of `reuse`: much smaller arrays are next, which would not take it."""
    if _active.pool is not None:
        _active.pool.clear()


def empty(shape: Sequence[int]) -> np.ndarray:
    """Return an uninitialised float32 array from the start of a cache line; in `reuse`, memory of one that is gone."""
    if _active.pool is None or math.prod(shape) * 4 < _SMALL:
        return aligned(math.prod(shape)).reshape(shape)
    return _active.pool.take(shape)
