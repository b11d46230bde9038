"""Where the time goes: seconds and floating-point operations of each kind of kernel."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import kernels


@dataclass
class Row:
    """What one kind of kernel has cost: calls, seconds, and GFLOP of multiplications and additions."""

    calls: int = 0
    seconds: float = 0.0
    gflop: float = 0.0


def _linear(result: np.ndarray, _: Any, w: Any, *__: Any, **___: Any) -> tuple[str, float]:
    return "linear", 2 * result.size // result.shape[-1] * math.prod(w.shape)


def _conv2d(result: np.ndarray, x: np.ndarray, w: Any, *_: Any, **__: Any) -> tuple[str, float]:
    return f"conv2d {w.shape[2]}x{w.shape[3]}", 2 * result.size * math.prod(w.shape[1:])


def _attention(result: np.ndarray, q: np.ndarray, k: np.ndarray, *_: Any, **__: Any) -> tuple[str, float]:
    kind = "self-attention" if q.shape[1] == k.shape[1] else "cross-attention"
    return kind, 4 * q.size * k.shape[1]


def _elementwise(name: str) -> Callable[..., tuple[str, float]]:
    return lambda *_, **__: (name, 0.0)


_COUNTERS: dict[str, Callable[..., tuple[str, float]]] = {
    "linear": _linear,
    "conv2d": _conv2d,
    "attention": _attention,
    "group_norm": _elementwise("norms"),
    "layer_norm": _elementwise("norms"),
    **{name: _elementwise("activations") for name in ("geglu", "gelu", "gelu_tanh", "quick_gelu", "silu")},
}


@contextmanager
def profile() -> Iterator[dict[str, Row]]:
    """Count what the networks do inside the ``with`` block; not for several threads at once.

    Yields
    ------
    dict of str to Row
        One row a kind of kernel, and the row ``everything`` with the time of the whole block at its end.
    """
    rows: dict[str, Row] = defaultdict(Row)
    originals = {name: getattr(kernels, name) for name in _COUNTERS}

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = originals[name](*args, **kwargs)
            seconds = time.perf_counter() - start
            kind, flop = _COUNTERS[name](result, *args, **kwargs)
            row = rows[kind]
            row.calls, row.seconds, row.gflop = row.calls + 1, row.seconds + seconds, row.gflop + flop / 1e9
            return result

        return call

    for name in _COUNTERS:
        setattr(kernels, name, counted(name))
    start = time.perf_counter()
    try:
        yield rows
    finally:
        for name, original in originals.items():
            setattr(kernels, name, original)
        seconds, gflop = time.perf_counter() - start, sum(row.gflop for row in rows.values())
        rows["everything"] = Row(sum(row.calls for row in rows.values()), seconds, gflop)


def table(rows: dict[str, Row], peak: float) -> str:
    """Format rows as lines of text, the longest first; `peak` is the machine's, in GFLOP/s.

    The GFLOP are those of the direct algorithms: convolutions that need fewer can exceed the peak.
    """
    lines = [f"{'':<16}{'calls':>7}{'seconds':>9}{'GFLOP':>9}{'GFLOP/s':>9}{'of peak':>9}"]
    for kind, row in sorted(rows.items(), key=lambda item: (item[0] == "everything", -item[1].seconds)):
        line = f"{kind:<16}{row.calls:>7}{row.seconds:>9.2f}"
        if row.gflop and row.seconds:
            rate = row.gflop / row.seconds
            line += f"{row.gflop:>9.0f}{rate:>9.0f}{rate / peak:>9.0%}"
        lines.append(line)
    lines.append(f"peak: {peak:.0f} GFLOP/s, measured; convolutions count as direct ones, though they do less")
    return "\n".join(lines)
