"""Typed reading of a component's ``config.json``, with one clear error for each unsupported value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from .errors import ModelError

MAX_SIZE = 1 << 20  # for widths and counts: far above any real model, and too low to exhaust memory
MAX_LAYERS = 256


class ConfigReader:
    """Reads values of a parsed config by key and type. An absent key, or null, gives the default.

    Parameters
    ----------
    values : dict
        The parsed JSON.
    component : str
        What the config belongs to ("unet"), named in errors.

    Raises
    ------
    ModelError
        From every method: names the component, the key, the value found and what is supported.
    """

    def __init__(self, values: Mapping[str, Any], component: str) -> None:
        self.component = component
        if not isinstance(values, Mapping):
            raise ModelError(f"{component} config: found {type(values).__name__}, expected a JSON object")
        self.values = values

    def fail(self, key: str, expected: str) -> NoReturn:
        """Raise the error for the value of ``key``."""
        raise ModelError(f"{self.component} config: {key} is {self.values.get(key)!r:.120}, expected {expected}")

    def integer(self, key: str, default: int, minimum: int = 1, maximum: int = MAX_SIZE) -> int:
        """Return the integer at ``key``."""
        value: int = self._get(key, default)
        if not _is_integer(value, minimum, maximum):
            self.fail(key, f"an integer from {minimum} to {maximum}")
        return value

    def sides(self, key: str, default: int | tuple[int, int]) -> int | tuple[int, int]:
        """Return the side of a square, or ``(height, width)``; the file may hold a square as ``[side, side]``."""
        value = self._get(key, default)
        sides = tuple(value) if isinstance(value, list | tuple) and len(value) == 2 else (value, value)
        if not all(_is_integer(side, 1, MAX_SIZE) for side in sides):
            self.fail(key, "a positive integer, or two: height and width")
        return sides[0] if sides[0] == sides[1] else (sides[0], sides[1])

    def number(self, key: str, default: float) -> float:
        """Return the finite number at ``key`` as a float."""
        value = self._get(key, default)
        if not _is_number(value):
            self.fail(key, "a number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Return the boolean at ``key``."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            self.fail(key, "true or false")
        return value

    def word(self, key: str, default: str, supported: Sequence[str]) -> str:
        """Return the string at ``key``, one of ``supported``."""
        value: str = self._get(key, default)
        if value not in supported:
            self.fail(key, _listed(supported))
        return value

    def words(self, key: str, default: Sequence[str], supported: Sequence[str]) -> tuple[str, ...]:
        """Return the list of strings at ``key``, each one of ``supported``."""
        value: str = self._get(key, default)
        if not isinstance(value, list | tuple) or not value or any(word not in supported for word in value):
            self.fail(key, f"a list of {_listed(supported)}")
        return tuple(value)

    def integers(self, key: str, default: Sequence[int]) -> tuple[int, ...]:
        """Return the list of positive integers at ``key``."""
        value = self._get(key, default)
        if not isinstance(value, list | tuple) or not value or not all(_is_integer(v, 1, MAX_SIZE) for v in value):
            self.fail(key, "a list of positive integers")
        return tuple(value)

    def table(self, key: str, rows: int, columns: int) -> tuple[tuple[float, ...], ...] | None:
        """Return the rows of finite numbers at ``key``, or None if there are none."""
        value = self.values.get(key)
        if value is None:
            return None
        lists = value if isinstance(value, list | tuple) else []
        if len(lists) != rows or not all(isinstance(row, list | tuple) and len(row) == columns for row in lists):
            self.fail(key, f"{rows} lists of {columns} numbers")
        if not all(_is_number(number) for row in lists for number in row):
            self.fail(key, f"{rows} lists of {columns} numbers")
        return tuple(tuple(float(number) for number in row) for row in lists)

    def per_level(self, key: str, default: int, levels: int, maximum: int = MAX_SIZE) -> tuple[int, ...]:
        """Return one integer for each level; the file may hold one integer for all of them."""
        value = self._get(key, default)
        numbers = tuple(value) if isinstance(value, list | tuple) else (value,) * levels
        if len(numbers) != levels or not all(_is_integer(v, 1, maximum) for v in numbers):
            self.fail(key, f"an integer from 1 to {maximum}, or a list of {levels} of them, one a level")
        return numbers

    def only(self, key: str, *supported: Any) -> None:
        """Demand that ``key`` is absent or has (in a list: has everywhere) one of the ``supported`` values."""
        value = self.values.get(key, supported[0])
        if any(v not in supported for v in (value if isinstance(value, list | tuple) else [value])):
            shown = ["null" if v is None else str(v).lower() if isinstance(v, bool) else repr(v) for v in supported]
            self.fail(key, f"{' or '.join(shown)}: no supported kind of model has another value")

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        return default if value is None else value


def _is_integer(value: Any, minimum: int, maximum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= maximum


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _listed(words: Sequence[str]) -> str:
    return " or ".join(repr(word) for word in words)
