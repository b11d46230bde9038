"""Measure a kernel next to torch, NumPy and the machine's peak, and format the results.

They take turns in one process: ours, torch, NumPy, a loop that measures the peak, and again. A ratio is the median of
the rounds' ratios, so the speed of the machine may drift. Every library makes a new array for its result, and what they
compute is compared before anything is timed.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from pytest_benchmark.fixture import BenchmarkFixture

from sd_numba import kernels
from sd_numba.kernels.machine.peak import measure_peak

# Imported here, because Numba must not start its threads first: torch would then share Numba's OpenMP, in which Numba
# allows threads to start threads, and torch's attention would take 20 times as long.
try:
    import torch
except ImportError:
    torch = None

_TURN = 0.003  # seconds: a short call is repeated until its turn takes this long
_SECONDS, _FEWEST, _MOST = 2.0, 5, 15  # of a case: about this long, but within these numbers of rounds
_TOLERANCES = {
    "f32": 1e-4,
    "bf16": 3e-2,
    "int8": 6e-2,
}  # relative to the largest value; large enough for every kernel, too small for a wrong one

Call = Callable[[], Any]


def normal(*shape: int) -> np.ndarray:
    """Return normally distributed float32 values."""
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def on_torch(function: Callable[..., Any], *arrays: np.ndarray) -> Call | None:
    """Bind ``function(F, *tensors)``, where F is ``torch.nn.functional``; None if torch is not installed."""
    if torch is None:
        return None
    torch.set_num_threads(kernels.threads())
    tensors = [torch.from_numpy(array) for array in arrays]

    def call() -> Any:
        with torch.inference_mode():
            return function(torch.nn.functional, *tensors)

    return call


def _seconds(call: Call, loops: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(loops):
        call()
    return (time.perf_counter() - start) / loops


def _warm(call: Call, loops: int) -> None:
    """Wake a library's threads and load its arrays before the turn of a short call; a long one is not affected."""
    if loops > 1:
        _seconds(call, loops)


def _check(expected: np.ndarray, peers: dict[str, Call], tolerance: float) -> None:
    for name, call in peers.items():
        error = np.abs(np.asarray(call()) - expected).max() / np.abs(expected).max()
        assert error < tolerance, f"ours and {name} differ by {error:.1e}"


def compare(
    benchmark: BenchmarkFixture,
    ours: Call,
    *,
    flop: int = 0,
    traffic: int = 0,
    torch: Call | None = None,
    numpy: Call | None = None,
    precision: str = "f32",
) -> None:
    """Time `ours` with pytest-benchmark, the others in between, and put the results into ``extra_info``.

    Parameters
    ----------
    benchmark : BenchmarkFixture
        Pytest's fixture of that name.
    ours : callable
        Computes the case with a kernel.
    flop, traffic : int
        One of them: multiplications and additions, or the bytes that must be read and written.
    torch, numpy : callable, optional
        Compute the same.
    precision : str
        Of ours: how far the others may be from it.
    """
    peers = {name: call for name, call in (("torch", torch), ("numpy", numpy)) if call}
    _check(ours(), peers, _TOLERANCES[precision])
    if benchmark.disabled:
        benchmark.pedantic(ours)
        return
    once = {name: _seconds(call) for name, call in {"ours": ours, **peers}.items()}
    loops = {name: math.ceil(_TURN / seconds) for name, seconds in once.items()}
    rounds = int(_SECONDS / sum(once[name] * loops[name] for name in once))
    taken: dict[str, list[float]] = {name: [] for name in peers}
    peaks: list[float] = []

    def others() -> None:
        for name, call in peers.items():
            _warm(call, loops[name])
            taken[name].append(_seconds(call, loops[name]))
        peaks.append(measure_peak())
        _warm(ours, loops["ours"])

    rounds = max(_FEWEST, min(_MOST, rounds))
    benchmark.pedantic(ours, rounds=rounds, iterations=loops["ours"], teardown=others)
    times = benchmark.stats.stats.data
    info = benchmark.extra_info
    info |= {"threads": kernels.threads(), "peak_gflops": statistics.median(peaks)}
    if flop:
        info["gflops"] = flop / 1e9 / statistics.median(times)
        info["percent_of_peak"] = 100 * _median_ratio([flop / 1e9 / seconds for seconds in times], peaks)
    else:
        info["gigabytes_per_second"] = traffic / 1e9 / statistics.median(times)
    info |= {f"{name}_time_ratio": _median_ratio(theirs, times) for name, theirs in taken.items()}


def _median_ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=False))


def _duration(seconds: float) -> str:
    size, unit = next(pair for pair in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")) if seconds >= pair[0])
    return f"{seconds / size:#.3g}".rstrip(".") + f" {unit}"


def _row(measured: dict[str, Any]) -> str:
    info = measured["extra_info"]
    name = measured["name"].removeprefix("bench_").replace("[", " ").rstrip("]")
    rate, share = f"{info.get('gigabytes_per_second', 0):.1f} GB/s", ""
    if "gflops" in info:
        rate, share = f"{info['gflops']:.0f} GFLOP/s", f"{info['percent_of_peak']:.0f}%"
    ratios = (f"{info[key]:.2f}" if key in info else "" for key in ("torch_time_ratio", "numpy_time_ratio"))
    return f"{name:<42}{_duration(measured['median']):>9}{rate:>14}{share:>9}" + "".join(f"{r:>8}" for r in ratios)


def table(measured: list[dict[str, Any]]) -> str:
    """Format what `compare` measured: entries as pytest-benchmark's hook ``pytest_benchmark_group_stats`` gets them."""
    peaks = [entry["extra_info"]["peak_gflops"] for entry in measured]
    libraries = ", ".join(f"{library.__name__} {library.__version__}" for library in (torch, np) if library)
    lines = [
        f"{time.strftime('%F')}, {measured[0]['extra_info']['threads']} threads, {libraries}, "
        f"peak {statistics.median(peaks):.0f} GFLOP/s ({min(peaks):.0f} .. {max(peaks):.0f})",
        "torch, NumPy: how many times as long as ours they take",
        f"{'':<42}{'median':>9}{'rate':>14}{'of peak':>9}{'torch':>8}{'NumPy':>8}",
    ]
    return "\n".join([*lines, *map(_row, measured)])
