"""Markdown tables of the judge's results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .held_out import Prompt
from .judge import Verdict


@dataclass(frozen=True)
class Setting:
    """How pictures are sampled."""

    scheduler: str = "dpm++2m"
    steps: int = 20
    guidance: float = 4.0

    def __str__(self) -> str:
        return f"{self.scheduler}, {self.steps} steps, CFG {self.guidance:g}"


@dataclass(frozen=True)
class Judged:
    """A picture of a prompt, and the judge's verdict."""

    prompt: Prompt
    picture: np.ndarray
    verdict: Verdict


@dataclass(frozen=True)
class Run:
    """Pictures, how they were made, and the seconds that each took."""

    title: str
    judged: tuple[Judged, ...]
    seconds: float

    @property
    def failures(self) -> list[Judged]:
        """The pictures that did not pass."""
        return [one for one in self.judged if not one.verdict.passed]


def passes(judged: Iterable[Judged]) -> str:
    """Return the number that passed, and the total."""
    verdicts = [one.verdict.passed for one in judged]
    return f"{sum(verdicts)} of {len(verdicts)}" if verdicts else ""


def fidelity(judged: Iterable[Judged]) -> float | None:
    """Return the mean PSNR in dB of the things that were recognised."""
    return _mean(one.verdict.fidelity for one in judged)


def specks(judged: Iterable[Judged]) -> float | None:
    """Return the mean share of plain backgrounds that is off its colour, in thousandths."""
    share = _mean(one.verdict.specks for one in judged)
    return None if share is None else 1000 * share


def by_category(judged: Sequence[Judged]) -> dict[str, list[Judged]]:
    """Return pictures by category, then "unseen" for those that training cannot have shown, then "all"."""
    groups: dict[str, list[Judged]] = {}
    for one in judged:
        groups.setdefault(one.prompt.category, []).append(one)
    groups["unseen"] = [one for one in judged if one.prompt.unseen]
    groups["all"] = list(judged)
    return groups


def run_table(run: Run) -> str:
    """Return a run, category by category, and its failures by name."""
    rows = [
        (
            name,
            passes(some),
            passes(one for one in some if one.prompt.unseen),
            _digits(fidelity(some)),
            _digits(specks(some)),
        )
        for name, some in by_category(run.judged).items()
    ]
    head = ("category", "passed", "of them unseen", "fidelity, dB", "specks, ‰")
    failures = "\n".join(f"- {one.prompt.text}: {'; '.join(one.verdict.faults)}" for one in run.failures)
    return f"{run.title}, {run.seconds:.2f} s a picture\n\n{_table(head, rows)}\n\nFailures:\n\n{failures or 'none'}\n"


def sweep_table(runs: Sequence[Run]) -> str:
    """Return one row for each setting."""
    categories = [by_category(run.judged) for run in runs]
    names = list(categories[0])
    counts = [f"{name} ({len(some)})" for name, some in categories[0].items()]
    rows = []
    for run, groups in zip(runs, categories, strict=True):
        passed = [str(sum(one.verdict.passed for one in groups[name])) for name in names]
        clean = _digits(fidelity(run.judged)), _digits(specks(run.judged))
        rows.append((run.title, *passed, *clean, f"{run.seconds:.2f}"))
    return _table(("setting", *counts, "fidelity, dB", "specks, ‰", "s a picture"), rows)


def comparison_table(names: tuple[str, str], first: Run, second: Run) -> str:
    """Return two models, A and B, side by side, what only one of them can draw, and which is better."""
    rows = []
    for (category, some), others in zip(
        by_category(first.judged).items(), by_category(second.judged).values(), strict=True
    ):
        measures = [
            *(passes(group) for group in (some, others)),
            *(_digits(fidelity(group)) for group in _both_passed(some, others)),
            *(_digits(specks(group)) for group in (some, others)),
        ]
        rows.append((category, *measures))
    head = [f"{measure} {model}" for measure in ("passed", "fidelity, dB,", "specks, ‰,") for model in "AB"]
    lines = [f"A is {names[0]}, B is {names[1]}; {first.title}\n", _table(("category", *head), rows), ""]
    for model, mine, other in (("A", first, second), ("B", second, first)):
        pairs = zip(mine.judged, other.judged, strict=True)
        only = [one.prompt.text for one, its in pairs if one.verdict.passed and not its.verdict.passed]
        lines += [f"Only {model} draws ({len(only)}): {'; '.join(only) or 'nothing'}.", ""]
    lines.append(f"Better by the rule: {'AB'[better(first, second)]}.")
    return "\n".join(lines) + "\n"


def better(first: Run, second: Run) -> int:
    """Return 0 or 1: the model that passes more prompts or, if equal, has the higher fidelity where both pass."""
    failures = len(first.failures), len(second.failures)
    if failures[0] != failures[1]:
        return int(failures[1] < failures[0])
    mine, other = (fidelity(group) or 0.0 for group in _both_passed(first.judged, second.judged))
    return int(other > mine)


def _both_passed(some: Iterable[Judged], others: Iterable[Judged]) -> tuple[list[Judged], list[Judged]]:
    pairs = [(a, b) for a, b in zip(some, others, strict=True) if a.verdict.passed and b.verdict.passed]
    return [a for a, _ in pairs], [b for _, b in pairs]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _digits(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
