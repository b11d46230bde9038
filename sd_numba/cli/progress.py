"""What is seen and kept of a run while it goes: pace, previews, and the state to go on from."""

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

LONG = 60.0  # seconds of work, from which on the state is written after every step
BUSY, SHARE = 0.02, 20  # of seconds that writing may take to be done at every step; of other work for it, else


class Keeper:
    """Keeps the state of a run in a file, from which ``--resume`` goes on.

    Parameters
    ----------
    path : Path
        The file, which is replaced as a whole.
    order : Order
        What is being made.
    done : int
        Pictures of it that are made already.
    always : bool
        Whether it is kept from the first step on, however short the run is.
    state : mapping, optional
        That of the picture after these, as it is in the file.
    """

    def __init__(
        self, path: Path, order: Order, done: int = 0, always: bool = False, state: Mapping[str, Any] | None = None
    ) -> None:
        self.path, self.order, self.done, self.active, self.state = path, order, done, always, state
        self.takes = self.written = 0.0

    def see(self, step: Step, expected: float) -> None:
        """Take note of a finished step of a run that is expected to take so many seconds."""
        self.state = step.state
        waits = self.takes > BUSY and time.perf_counter() - self.written < SHARE * self.takes
        if (self.active or expected > LONG) and not waits:
            self._write_or_say()

    def finish(self, count: int) -> None:
        """Take note of so many pictures that are in their files."""
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
        """Write the state if there is anything to keep; returns whether there is."""
        if self.state is None and not self.done:
            return False
        self.write()
        return True

    def remove(self) -> None:
        """Remove the file when all is done."""
        if self.active or self.written:
            self.path.unlink(missing_ok=True)


class Previews:
    """Shows every so many steps what the network sees in the noise: in a file, and in a terminal that can."""

    def __init__(self, previewer: Previewer, interval: int, path: str, screen: Screen) -> None:
        self.previewer, self.interval, self.path, self.screen = previewer, interval, path, screen

    def see(self, step: Step) -> None:
        """Show a step, if it is its turn or the last one."""
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
        Length of the bar; corrected by the first step, as some samplers call the network more than once a step.
    see : callable
        Called with each step, and the seconds that all take at this pace.

    Returns
    -------
    float
        The seconds that the steps took.
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
