"""Compare our networks with PyTorch's and OpenVINO's, on the same weights, inputs and cores.

    pip install ".[peers]"
    python -m bench.compare_peers FOLDER [--work text unet step vae image] [--runs 3] [--ours f32] [--write]

FOLDER is a Stable Diffusion 1.5 model; `bench/make_random_model.py` makes one with random weights. ``text`` encodes
2x77 tokens, ``unet`` is a pass over two samples, ``step`` one over two copies of a sample, as each step with guidance
needs (ours takes the sample once), ``vae`` decodes one picture, and ``image`` does it all, with our own sampler around
everybody's networks. Progress goes to stderr, a Markdown section to stdout; ``--write``
also puts the section into ``bench/RESULTS.md``. The exit code is 1 if results disagree or ours fails; a peer that fails
is reported in the table.

Every contestant lives in a process of its own (`bench/peers.py`), because thread pools disturb each other in one. The
processes of one work take turns, one call each a round, while the others block on a pipe, so that a busy moment of the
machine hits all alike. The first round compares the results and warms up; that of ``image`` counts. One work after the
other, as all networks of all contestants would not fit into memory.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bench.peers import PACKAGES, PEERS, SAMPLER, WORKS, Job, Reply, convert, report, serve
from bench.quantise import quantise
from bench.results import RESULTS, circumstances, command, write

LIMITS = {"f32": 1e-3, "bf16": 1e-1, "int8": 4e-1}  # of the largest difference, relative to the largest value
PAUSE = 0.1  # seconds between turns: thread pools spin for some milliseconds before they sleep


@dataclass
class Contestant:
    """Our end of a contestant: its process and its answers."""

    name: str
    job: Job
    seconds: list[float] = field(default_factory=list)
    first: Reply | None = None
    load: float = 0.0
    resident: float = 0.0
    note: str = ""
    failure: str = ""

    def start(self) -> None:
        """Start the process and wait until it has loaded."""
        context = multiprocessing.get_context("spawn")
        self.connection, far = context.Pipe()
        self.process = context.Process(target=serve, args=(far, self.job, self.name), daemon=True)
        self.process.start()
        far.close()
        if reply := self._receive("load"):
            self.load, self.note = reply.seconds, reply.note

    def ask(self, command: str, what: str = "") -> Reply | None:
        """Send a command and wait for the answer; None if it has failed, now or before."""
        if self.failure:
            return None
        time.sleep(PAUSE)
        with suppress(BrokenPipeError):
            self.connection.send(command)
        return self._receive(what)

    def _receive(self, what: str) -> Reply | None:
        try:
            reply = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            reply = f"the process ended by itself, exit code {self.process.exitcode} (-9: out of memory?)"
        if isinstance(reply, str):
            self.failure = reply
            report(f"{self.job.work}, {self.name}: {reply}")
            return None
        self.resident = reply.resident
        if what:
            spun = f", and {reply.spun:.2f} s of CPU time while waiting" if reply.spun > PAUSE / 2 else ""
            report(f"{self.job.work}, {self.name}, {what}: {reply.seconds:.2f} s{spun} {reply.note}")
        return reply

    def stop(self) -> None:
        with suppress(OSError):
            self.connection.send("stop")
        self.process.join(10)
        self.process.kill()
        self.process.join()

    @property
    def precision(self) -> str:
        return self.name.split()[1]


def prepare_openvino(job: Job, names: list[str]) -> None:
    """Fill the cache for the OpenVINO contestants, each step in a process of its own, so that its memory is freed."""
    steps = [convert] * any(name.startswith("openvino") for name in names) + [quantise] * ("openvino int8" in names)
    for step in steps:
        process = multiprocessing.get_context("spawn").Process(target=step, args=(job,))
        process.start()
        process.join()


def compete(job: Job, names: list[str], runs: int) -> tuple[list[Contestant], list[float]]:
    """Run a work's rounds; return the contestants, ours first, and the machine's peak in each round."""
    prepare_openvino(job, names)
    contestants, peaks = [Contestant(name, job) for name in names], []
    try:
        for contestant in contestants:
            contestant.start()
        for contestant in contestants:
            contestant.first = contestant.ask("first", "first")
            if job.work == "image" and contestant.first is not None:
                contestant.seconds.append(contestant.first.seconds)
        for run in range(runs - (job.work == "image")):
            if peak := contestants[0].ask("peak"):
                peaks.append(peak.gflop)
            for contestant in contestants:
                if reply := contestant.ask("call", f"round {run + 1} of {runs}"):
                    contestant.seconds.append(reply.seconds)
    finally:
        for contestant in contestants:
            contestant.stop()
    return contestants, peaks


def differences(contestants: list[Contestant]) -> tuple[str, dict[str, float]]:
    """Return whose result is the reference, and how far each is from it, relative to its largest value.

    The reference has the highest precision; among equals, a peer is preferred to ours.
    """
    outputs = {c.name: c.first.output for c in contestants if c.first is not None}
    ranks = {c.name: (list(LIMITS).index(c.precision), c.name not in PEERS) for c in contestants}
    reference = min(outputs, key=ranks.__getitem__, default="")
    scale = np.abs(outputs[reference]).max() if reference else 1
    return reference, {name: float(np.abs(x - outputs[reference]).max() / scale) for name, x in outputs.items()}


def ratio(ours: Contestant, theirs: Contestant) -> str:
    """Return the median over the rounds of our time divided by theirs."""
    pairs = [a / b for a, b in zip(ours.seconds, theirs.seconds, strict=False)]
    return f"{statistics.median(pairs):.2f}" if pairs and not ours.failure + theirs.failure else "?"


# ---- the section of the results


def title(job: Job) -> str:
    """Return a description of a work."""
    return {
        "text": "Text encoder, 2x77 tokens",
        "unet": f"UNet pass, {job.size} px, batch 2, two different samples",
        "step": f"UNet pass of a step with guidance, {job.size} px: one sample, two contexts",
        "vae": f"VAE decode to {job.size} px",
        "image": f"A whole picture: {job.size} px, {job.steps} steps of {SAMPLER} with guidance, decoded",
    }[job.work]


def table(job: Job, contestants: list[Contestant], peaks: list[float], far: dict[str, float], reference: str) -> str:
    """Return a work's table with its title and a summary."""
    ours = contestants[0]
    gflop = ours.first.gflop if ours.first else 0.0
    lines = [f"### {title(job)}", ""]
    if peaks:
        spread = f"{min(peaks):.0f} .. {max(peaks):.0f}"
        lines += [f"{gflop:.0f} GFLOP; peak {statistics.median(peaks):.0f} GFLOP/s ({spread}).", ""]
    head = ("contestant", "median", "from .. to", f"{ours.name} / it", "GFLOP/s", "difference", "peak resident", "load")
    rows = [head, ("---",) * len(head)]
    for c in contestants:
        if c.failure or not c.seconds:
            rows.append((c.name, f"failed: {c.failure or 'no rounds'}", *[""] * (len(head) - 2)))
            continue
        median = statistics.median(c.seconds)
        digits = 3 if median < 1 else 2
        spread = f"{min(c.seconds):.{digits}f} .. {max(c.seconds):.{digits}f}"
        difference = "reference" if c.name == reference else f"{far[c.name]:.1e}"
        memory, load = f"{c.resident:.0f} MB", f"{c.load:.1f} s"
        rate = f"{gflop / median:.0f}"
        rows.append((c.name, f"{median:.{digits}f} s", spread, ratio(ours, c), rate, difference, memory, load))
    lines += [f"| {' | '.join(row)} |" for row in rows]
    notes = [f"{c.name}: {c.note}" for c in contestants if c.note]
    return "\n".join([*lines, "", *verdicts(contestants), *notes])


def verdicts(contestants: list[Contestant]) -> list[str]:
    """Compare ours with the fastest peer of the same precision; ours in float32 with that of every precision."""
    finished = [c for c in contestants if c.seconds and not c.failure]
    lines = []
    for ours in (c for c in finished if c.name.startswith("ours")):
        for precision in LIMITS if ours.precision == "f32" else (ours.precision,):
            peers = [c for c in finished if c.name in PEERS and c.precision == precision]
            if peers:
                best = min(peers, key=lambda c: statistics.median(c.seconds))
                lines.append(f"{ours.name} / best {precision} peer ({best.name}): {ratio(ours, best)}  ")
    return lines


def section(tables: list[str], threads: int, paths: tuple[Path, ...]) -> str:
    """Return the whole section: the circumstances, then the tables."""
    body = "\n\n".join(tables)
    return f"""## Compared with PyTorch and OpenVINO

{circumstances(threads, (*PACKAGES, "numpy", "numba"))}

```console
{command("compare_peers", paths)}
```

Times of one call; the contestants took turns, and ratios are medians over the rounds (below 1, ours is faster). GFLOP
count the direct algorithm, the same for all. Differences are the largest, relative to the reference's largest value.
Resident memory counts what is mapped from files, and what loading took.

{body}"""


def main() -> None:
    from sd_numba.networks.layers import PRECISIONS  # noqa: PLC0415 - not in the contestants' processes, which import this file

    parser = argparse.ArgumentParser(description="Compare our networks with PyTorch's and OpenVINO's.")
    parser.add_argument("folder", type=Path, help="a model in diffusers layout")
    parser.add_argument("--work", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--runs", type=int, default=3, help="rounds that count")
    parser.add_argument("--size", type=int, default=512, help="pixels on each side")
    parser.add_argument("--steps", type=int, default=20, help="of the whole picture")
    parser.add_argument("--ours", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="all by default")
    parser.add_argument(
        "--peers", nargs="+", choices=PEERS, help="all by default; for image, which takes most memory, OpenVINO"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--cache", type=Path, default=Path(tempfile.gettempdir()) / "sd-numba-peers", help="for converted networks"
    )
    parser.add_argument("--write", action="store_true", help=f"also into {RESULTS.name}")
    arguments = parser.parse_args()
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f'compare_peers: {", ".join(missing)} not installed: pip install ".[peers]"')
    tables, wrong = [], []
    for work in arguments.work:
        job = Job(work, arguments.folder, arguments.cache, arguments.size, arguments.steps, arguments.threads)
        peers = arguments.peers or [name for name in PEERS if work != "image" or name.startswith("openvino")]
        contestants, peaks = compete(job, [*(f"ours {p}" for p in arguments.ours), *peers], arguments.runs)
        reference, far = differences(contestants)
        tables.append(table(job, contestants, peaks, far, reference))
        wrong += [f"{work}, {c.name} failed" for c in contestants if c.failure and c.name.startswith("ours")]
        wrong += [
            f"{work}, {name}: {d:.1e} from {reference}" for name, d in far.items() if not d <= LIMITS[name.split()[1]]
        ]
    text = section(tables, arguments.threads, (arguments.folder, arguments.cache))
    print(text)
    if arguments.write:
        write("compare_peers", text)
    if wrong:
        sys.exit(f"compare_peers: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
