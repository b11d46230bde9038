"""The errors that sd-numba raises for its users: one clear line each that says what is wrong and what to do.

SdNumbaError
├── ModelError      a model's files
├── InputError      an argument; also a ValueError
└── DownloadError   the network
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass


def argument(name: str) -> str:
    """Return a mark that stands for an argument's name in the text of an error: see `SdNumbaError.spelled`."""
    return f"\0{name}\0"


class SdNumbaError(Exception):
    """Base of every error meant for a user; ``str(error)`` is one complete line.

    Parameters
    ----------
    text : str
        The message; names of arguments in it are marked by `argument`.
    """

    def __init__(self, text: str = "") -> None:
        self.text = text
        super().__init__(self.spelled(str))

    def spelled(self, spell: Callable[[str], str], offset: int = 0) -> str:
        """Return the message with the arguments' names as the reader knows them.

        Parameters
        ----------
        spell : callable
            Turns the name of an argument into what the reader calls it, such as a flag. `argument` keeps the marks, for
            an error that quotes this one.
        offset : int
            What the reader counts more: see `sd_numba.generation.settings.Setting.offset`.
        """
        return re.sub("\0(.*?)\0", lambda mark: spell(mark[1]), self._message(offset))

    def _message(self, offset: int) -> str:
        return self.text


class ModelError(SdNumbaError):
    """A model's files, weights or configuration cannot be used."""


@dataclass(frozen=True)
class Range:
    """The numbers that an argument accepts, both ends included."""

    noun: str
    least: float
    most: float

    def __str__(self) -> str:
        least, most = (f"{end}" if isinstance(end, int) else f"{end:g}" for end in (self.least, self.most))
        return f"{self.noun} of at least {least}" if math.isinf(self.most) else f"{self.noun} from {least} to {most}"

    def shifted(self, offset: int) -> Range:
        """Return the range for people who count from `offset`."""
        return Range(self.noun, self.least + offset, self.most + offset)


class InputError(SdNumbaError, ValueError):
    """An argument cannot be used: a size, a number of steps, a sampler's name, an output path.

    Parameters
    ----------
    text : str
        The whole message; other arguments in it are marked by `argument`. Without a text, the message says what was
        found and what is expected.
    name : str, optional
        The argument at fault.
    found : object
        Its value.
    expected : str or Range
        What would fit.
    """

    def __init__(
        self, text: str = "", *, name: str | None = None, found: object = None, expected: str | Range = ""
    ) -> None:
        self.name, self.found, self.expected = name, found, expected
        super().__init__(text)

    def _message(self, offset: int) -> str:
        if self.text:
            return self.text
        found, expected = self.found, self.expected
        if offset and isinstance(found, int):
            found, expected = found + offset, expected.shifted(offset) if isinstance(expected, Range) else expected
        shown = " ".join(repr(found).split())  # arrays have several lines
        return f"{argument(str(self.name))}: found {shown:.80}, expected {expected}"


class DownloadError(SdNumbaError):
    """A model cannot be fetched: no network, no such model, no access, a wrong checksum, no room on the disk."""
