"""The fastest that this machine multiplies and adds in float32, measured: the yardstick of profiles and benchmarks."""

from __future__ import annotations

import statistics
import time

import numpy as np
from numba import carray, prange

from .emit import LANES
from .jit import inline, kernel, threads
from .simd import float_pointer, fma, splat, total

_LOOPS = 2_000_000
_CHAINS = 12  # independent sums, enough to hide the latency of an addition


@inline
def _multiply_add(loops, x, y):
    a, b, c, d, e, f = x, y, x + y, x - y, y - x, x * y  # all different, or the compiler would keep one
    g, h, i, j, k, m = a + c, b + c, a * c, b * c, c * c, c + d * f
    for _ in range(loops):
        a, b, c, d = fma(a, x, y), fma(b, x, y), fma(c, x, y), fma(d, x, y)
        e, f, g, h = fma(e, x, y), fma(f, x, y), fma(g, x, y), fma(h, x, y)
        i, j, k, m = fma(i, x, y), fma(j, x, y), fma(k, x, y), fma(m, x, y)
    return total(a + b + c + d + e + f + g + h + i + j + k + m)


@kernel(3)
def _peak_loop(loops, out, workers):
    """Do nothing but multiply and add, in each worker."""
    for worker in prange(workers):
        result = carray(float_pointer(out + worker * 4), 1)
        result[0] = _multiply_add(loops, splat(np.float32(0.5)), splat(result[0]))


def measure_peak(runs: int = 5) -> float:
    """Return GFLOP/s of a loop that touches registers only, on as many threads as kernels use (median of `runs`)."""
    workers = threads()
    out = np.zeros(workers, np.float32)
    seconds = []
    _peak_loop(1, out.ctypes.data, workers)
    for _ in range(runs):
        start = time.perf_counter()
        _peak_loop(_LOOPS, out.ctypes.data, workers)
        seconds.append(time.perf_counter() - start)
    return 2 * LANES * _CHAINS * _LOOPS * workers / statistics.median(seconds) / 1e9
