"""Progress of a run: its pace, previews, and the saved state to continue from."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import click

from ..errors import InputError
from ..generation.loop import Step
from ..generation.state import save_state
from ..memory import peak_memory
from ..pictures.contact_sheet import contact_sheet
from ..pictures.preview import Previewer
from ..recipes.png import save_png
from .plan import Order
from .terminal import Screen

LONG = 60.0  # seconds; a run that takes longer writes its state after every step
BUSY, SHARE = 0.02, 20  # a write of over BUSY seconds waits until SHARE times as long has passed


class Keeper:
    """Keeps the state of a run in a file, from which ``--resume`` continues.

    Parameters
    ----------
    path : Path
        The file, which is replaced as a whole.
    order : Order
        What is being made.
    done : int
        Number of its pictures that are already made.
    always : bool
        Whether to write the state from the first step on, however short the run is.
    state : mapping, optional
        State of the next picture, as read from the file.
    """

    def __init__(
        self, path: Path, order: Order, done: int = 0, always: bool = False, state: Mapping[str, Any] | None = None
    ) -> None:
        self.path, self.order, self.done, self.active, self.state = path, order, done, always, state
        self.takes = self.written = 0.0

    def see(self, step: Step, expected: float) -> None:
        """Record a finished step of a run that is expected to take `expected` seconds."""
        self.state = step.state
        waits = self.takes > BUSY and time.perf_counter() - self.written < SHARE * self.takes
        if (self.active or expected > LONG) and not waits:
            self._write_or_say()

    def finish(self, count: int) -> None:
        """Record that `count` more pictures are in their files."""
        self.done += count
        self.state = None
        if self.active:
            self._write_or_say()

    def _write_or_say(self) -> None:
        try:
            self.write()
        except InputError as error:
            if self.active or not self.written:
                click.echo(f"Note: the state of the run cannot be saved: {error}", err=True)
            self.active, self.takes, self.written = False, LONG, time.perf_counter()

    def write(self) -> None:
        """Write the state.

        Raises
        ------
        InputError
            The file cannot be written.
        """
        start = time.perf_counter()
        save_state(self.path, self.state, {**self._about, "done": self.done})
        self.written = time.perf_counter()
        self.takes, self.active = self.written - start, True

    @cached_property
    def _about(self) -> dict[str, Any]:
        return self.order.to_json()

    def keep(self) -> bool:
        """Write the state if there is anything to keep; return whether there is."""
        if self.state is None and not self.done:
            return False
        self.write()
        return True

    def remove(self) -> None:
        """Remove the file when all is done."""
        if self.active or self.written:
            self.path.unlink(missing_ok=True)


class Previews:
    """Shows the network's current estimate every few steps: in a file, and in a terminal that can show it."""

    def __init__(self, previewer: Previewer, interval: int, path: str, screen: Screen) -> None:
        self.previewer, self.interval, self.path, self.screen = previewer, interval, path, screen

    def see(self, step: Step) -> None:
        """Show a step if a preview is due or it is the last one."""
        if self.previewer.kind == "none" or ((step.index + 1) % self.interval and step.index + 1 < step.total):
            return
        sheet = contact_sheet(self.previewer(step.denoised))
        save_png(self.path, sheet, level=1)
        self.screen.show(sheet)


def watch(steps: Iterable[Step], label: str, expected: int, see: Callable[[Step, float], None]) -> float:
    """Run the steps under a progress bar.

    Parameters
    ----------
    expected : int
        Length of the bar; corrected at the first step, as some samplers call the network several times for each step.
    see : callable
        Called with each step and the seconds that all steps take at this pace.

    Returns
    -------
    float
        Duration of the steps in seconds.
    """
    taken, count = 0.0, 0
    bar: Any
    with click.progressbar(
        length=expected, label=label, file=sys.stderr, show_pos=True, show_eta=False, item_show_func=_pace
    ) as bar:
        for step in steps:
            taken, count = taken + step.seconds, count + 1
            mean = taken / count
            see(step, mean * step.total)
            bar.length = step.total
            bar.update(step.index + 1 - bar.pos, (mean, mean * (step.total - step.index - 1)))
    if count and not sys.stderr.isatty():  # where click shows only the label
        click.echo(f"{step.total} steps, {_pace((taken / count, 0))}", err=True)
    return taken


def _pace(times: tuple[float, float] | None) -> str | None:
    """Say how long a step takes on average, how long the rest will take, and how much memory was needed."""
    if times is None:
        return None
    mean, left = times
    hours, minutes = divmod(round(left) // 60, 60)
    clock = f"{hours}:{minutes:02}:{round(left) % 60:02}" if hours else f"{minutes}:{round(left) % 60:02}"
    memory = peak_memory()
    return ", ".join(
        [
            f"{mean:.2f} s/it",
            *([f"{clock} left"] if round(left) else []),
            *([f"peak memory {memory / 1e9:.2f} GB"] if memory else []),
        ]
    )
