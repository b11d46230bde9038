"""The fastest that this machine multiplies and adds in float32, measured: the yardstick of the other benchmarks."""

import statistics
import time

import numpy as np
from numba import carray, prange

import kernels
from kernels.jit import kernel
from kernels.simd import LANES, float_pointer, fma, splat, total

_LOOPS = 2_000_000
_CHAINS = 12  # independent sums, enough to hide the latency of an addition


@kernel(3)
def peak_loop(loops, out, workers):
    for worker in prange(workers):
        x, y = splat(np.float32(1e-9)), splat(np.float32(0.5))
        a, b, c, d, e, f = x, x, x, x, x, x
        g, h, i, j, k, m = y, y, y, y, y, y
        for _ in range(loops):
            a, b, c, d = fma(x, y, a), fma(x, y, b), fma(x, y, c), fma(x, y, d)
            e, f, g, h = fma(x, y, e), fma(x, y, f), fma(x, y, g), fma(x, y, h)
            i, j, k, m = fma(x, y, i), fma(x, y, j), fma(x, y, k), fma(x, y, m)
        result = carray(float_pointer(out), workers)
        result[worker] = total(a + b + c + d + e + f + g + h + i + j + k + m)


def measure_peak(runs: int = 5) -> float:
    """Return GFLOP/s of a loop that touches registers only, on as many threads as kernels use (median of `runs`)."""
    workers = kernels.threads()
    out = np.zeros(workers, np.float32)
    seconds = []
    peak_loop(1, out.ctypes.data, workers)
    for _ in range(runs):
        start = time.perf_counter()
        peak_loop(_LOOPS, out.ctypes.data, workers)
        seconds.append(time.perf_counter() - start)
    return 2 * LANES * _CHAINS * _LOOPS * workers / statistics.median(seconds) / 1e9


if __name__ == "__main__":
    print(f"{measure_peak():.0f} GFLOP/s on {kernels.threads()} threads")
