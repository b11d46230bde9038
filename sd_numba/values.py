"""Kinds of values: how each is read from what people and other programs write, and how it is checked.

`read` takes what comes from outside, where numbers may be text, and returns a value of the right type; whether it is in
range is not its business. `check` takes a Python value of an argument and returns it if it can be used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from .checks import check_choice, check_number, check_whole
from .errors import InputError

LARGEST = 1 << 62


class UnfitError(ValueError):
    """A value cannot be read; the text says what was expected."""


def read_value(name: str, value: object, read: Callable[[Any], Any]) -> Any:
    """Return `value` as `read` gives it.

    Raises
    ------
    InputError
        `read` refuses it.
    """
    try:
        return read(value)
    except InputError as error:
        raise InputError(error.text, name=f"{name:.80}", found=error.found, expected=error.expected) from None
    except (ValueError, OverflowError) as error:
        expected = error.args[0] if isinstance(error, UnfitError) else "a number of fewer digits"
        raise InputError(name=f"{name:.80}", found=value, expected=expected) from None


class Kind:
    """Any value; base of the kinds below."""

    def read(self, value: Any) -> Any:
        """Return a value that comes from outside; raise UnfitError if it is of another kind."""
        return value

    def check(self, name: str, value: Any) -> Any:
        """Return a Python value; raise InputError unless it can be used."""
        return value


class Text(Kind):
    """Text."""

    def read(self, value: Any) -> str:
        """Return a text."""
        if not isinstance(value, str):
            raise UnfitError("a text")
        return value


class File(Text):
    """The path of a file, or what was made of it already."""


@dataclass(frozen=True)
class Whole(Kind):
    """A whole number in a range."""

    least: int = -LARGEST
    most: int = LARGEST

    def read(self, value: Any) -> int:
        """Return a whole number; numbers with more digits than float64 holds are read only without a decimal point."""
        if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d+\s*", value):
            return int(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        try:
            found = NUMBER.read(value)
        except UnfitError:
            found = math.nan
        if not found.is_integer() or abs(found) >= 2**53:
            raise UnfitError("a whole number")
        return int(found)

    def check(self, name: str, value: Any) -> int:
        """Return a whole number in the range."""
        return check_whole(name, value, self.least, self.most)


@dataclass(frozen=True)
class Number(Kind):
    """A finite number in a range."""

    least: float = -math.inf
    most: float = math.inf

    def read(self, value: Any) -> float:
        """Return a finite number."""
        try:
            found = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
        except ValueError:
            found = math.nan
        if not math.isfinite(found):
            raise UnfitError("a number")
        return found

    def check(self, name: str, value: Any) -> float:
        """Return a number in the range, as a float."""
        return check_number(name, value, self.least, self.most)


TEXT, NUMBER, WHOLE = Text(), Number(), Whole()


def number_text(value: float) -> str:
    """Return a number with every digit and without an exponent, as it stands in a picture's text."""
    return format(Decimal(repr(float(value))), "f").removesuffix(".0")


class Flag(Kind):
    """True or false."""

    def read(self, value: Any) -> bool:
        """Return a truth value, which may be written as a word."""
        word = str(value).strip().lower()
        if word not in {"true", "yes", "on", "1", "false", "no", "off", "0"}:
            raise UnfitError("true or false")
        return word in {"true", "yes", "on", "1"}


@dataclass(frozen=True)
class Choice(Kind):
    """One of a few words."""

    words: tuple[str, ...]

    def read(self, value: Any) -> str:
        """Return one of the words, which may be written in any case."""
        if str(value).lower() not in self.words:
            raise UnfitError(" or ".join(self.words))
        return str(value).lower()

    def check(self, name: str, value: Any) -> str:
        """Return one of the words."""
        return check_choice(name, value, self.words)


@dataclass(frozen=True)
class Several(Kind):
    """A fixed number of values of one kind.

    Attributes
    ----------
    kind : Kind
    count : int
    expected : str
        What would fit, for messages.
    example : str
        How it is typed: values with commas between them.
    """

    kind: Kind
    count: int
    expected: str
    example: str

    def read(self, value: Any) -> tuple[Any, ...]:
        """Return a tuple of what may be a list, or a text with commas."""
        items = value.split(",") if isinstance(value, str) else value
        try:
            if isinstance(items, list | tuple) and len(items) == self.count:
                return tuple(self.kind.read(item) for item in items)
        except UnfitError:
            pass
        raise UnfitError(self.expected)

    def check(self, name: str, value: Any) -> tuple[Any, ...]:
        """Return a tuple of values that can be used."""
        if not isinstance(value, list | tuple) or len(value) != self.count:
            raise InputError(name=name, found=value, expected=f"{self.expected}, such as ({self.example})")
        return tuple(self.kind.check(name, item) for item in value)
