"""Helpers of the kernel tests: random arrays, ways to store weights, fences, comparisons."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numba
import numpy as np
import pytest

from sd_numba import kernels

STORED = ("f32", "f16", "bf16", "e4m3", "e5m2")
# Precisions of products below float32, whose instructions this row of the dispatch table may lack.
BF16, INT8 = (
    pytest.mark.skipif(name not in kernels.precisions(), reason=f"this row has no {name}") for name in ("bf16", "int8")
)
LOW = (pytest.param("bf16", marks=BF16), pytest.param("int8", marks=INT8))
THREADS = range(1, min(3, numba.config.NUMBA_NUM_THREADS) + 1)
_SENTINEL, _FENCE = np.float32(-1.2345e30), 256  # floats on either side


def normal(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    """Normally distributed float32."""
    return (np.random.RandomState(seed).standard_normal(shape) * scale).astype(np.float32)


def store(w: np.ndarray, how: str) -> np.ndarray | kernels.QuantizedWeight:
    """Round float32 to one of the dtypes that checkpoints have, or to whole numbers."""
    if how == "int8":
        return kernels.quantize(w)
    if how == "bf16":
        return (w.view(np.uint32) >> 16).astype(np.uint16)
    if how == "e5m2":
        return (w.astype(np.float16).view(np.uint16) >> 8).astype(np.uint8).view(kernels.float8_e5m2)
    if how == "e4m3":
        half = (w / 2**8).astype(np.float16).view(np.uint16)  # has the bits of E4M3, then
        code = np.minimum((half & 0x7FFF) >> 7, np.where(np.isfinite(w), 0x7E, 0x7F)) | half >> 8 & 0x80
        return code.astype(np.uint8).view(kernels.float8_e4m3)
    return w.astype({"f32": np.float32, "f16": np.float16}[how])


def misaligned(array: np.ndarray, offset: int) -> np.ndarray:
    """Copy an array to a read-only view `offset` bytes into a buffer, as a memory-mapped file gives."""
    raw = np.zeros(array.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 16 + offset
    raw[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
    view = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    view.flags.writeable = False
    assert view.ctypes.data % 16 == offset
    return view


@contextmanager
def fenced(*shape: int, fill: float = np.nan) -> Iterator[np.ndarray]:
    """Give an array inside a larger one and check afterwards that what lies around it is untouched."""
    size = int(np.prod(shape))
    buffer = np.full(size + 2 * _FENCE, _SENTINEL, np.float32)
    inside = buffer[_FENCE : _FENCE + size].reshape(shape)
    inside[...] = fill
    yield inside
    assert (buffer[:_FENCE] == _SENTINEL).all(), "wrote before the output"
    assert (buffer[_FENCE + size :] == _SENTINEL).all(), "wrote behind the output"


def product_tolerance(terms: int) -> float:
    """Allow a float32 sum of so many random products this error, relative to the largest of the results.

    The rounding of a running sum is a random walk; the largest errors measured are a quarter of this, from 5 terms to
    7000.
    """
    return 1.5e-7 * (1 + math.sqrt(terms))


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Compare float32 arrays; the largest difference may be `tolerance` times the largest expected magnitude."""
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    error = np.abs(found.astype(np.float64) - expected).max(initial=0.0)
    assert error <= tolerance * max(np.abs(expected).max(initial=0.0), 1e-30)


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert (found.view(np.uint32) == expected.view(np.uint32)).all()


def assert_same_on_any_threads(compute: Callable[[], np.ndarray]) -> None:
    """Compare, bit for bit, what is computed on one thread and on several."""
    results = []
    try:
        for count in THREADS:
            kernels.set_threads(count)
            assert kernels.threads() == count
            results.append(compute())
    finally:
        kernels.set_threads(0)
    for result in results[1:]:
        assert_same_bits(result, results[0])
