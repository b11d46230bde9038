"""Where the time goes: seconds and floating-point operations of each kind of kernel."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..kernels.machine.ops import listening


@dataclass
class Row:
    """What one kind of kernel has cost: calls, seconds, and GFLOP of multiplications and additions."""

    calls: int = 0
    seconds: float = 0.0
    gflop: float = 0.0


@contextmanager
def profile() -> Iterator[dict[str, Row]]:
    """Count what the networks do inside the ``with`` block; not for several threads at once.

    Yields
    ------
    dict of str to Row
        One row a kind of kernel, and the row ``everything`` with the time of the whole block at its end.
    """
    rows: dict[str, Row] = defaultdict(Row)

    def count(kind: str, flop: float, seconds: float) -> None:
        row = rows[kind]
        row.calls, row.seconds, row.gflop = row.calls + 1, row.seconds + seconds, row.gflop + flop / 1e9

    start = time.perf_counter()
    try:
        with listening(count):
            yield rows
    finally:
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
