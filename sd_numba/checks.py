"""Checks of arguments: each returns what can be used, or raises an `InputError` of one line."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np

from .errors import InputError, Range
from .memory import available_memory

MAX_SIDE = 8192  # pixels


def check_choice(name: str, value: object, choices: Sequence[str]) -> str:
    """Return `value`; raise unless it is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise InputError(name=name, found=value, expected=" or ".join(choices))
    return value


def check_whole(name: str, value: Any, least: int, most: int) -> int:
    """Return `value` as an int; raise unless it is a whole number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not least <= value <= most:
        raise InputError(name=name, found=value, expected=Range("a whole number", least, most))
    return int(value)


def check_number(name: str, value: Any, least: float, most: float) -> float:
    """Return `value` as a float; raise unless it is a number from `least` to `most`."""
    number = not isinstance(value, bool) and isinstance(value, int | float | np.number)
    if not number or not math.isfinite(value) or not least <= value <= most:
        raise InputError(name=name, found=value, expected=Range("a number", float(least), float(most)))
    return float(value)


def check_prompts(name: str, value: str | Sequence[str]) -> list[str]:
    """Return the prompts as a list; raise unless they are a text or a list of texts."""
    prompts = [value] if isinstance(value, str) else list(value) if isinstance(value, Sequence) else []
    if not prompts or not all(isinstance(p, str) for p in prompts):
        raise InputError(name=name, found=value, expected="a text or a list of texts")
    return prompts


def check_side(name: str, value: int, factor: int) -> int:
    """Return a picture's height or width, in pixels; `factor` is the VAE's.

    Raises
    ------
    InputError
        If it is not a whole number, too small, too large, or not a multiple of `factor`.
    """
    value = check_whole(name, value, factor, MAX_SIDE)
    if value % factor:
        lower = value // factor * factor
        raise InputError(
            name=name, found=value, expected=f"a multiple of {factor}, such as {lower} or {lower + factor}"
        )
    return value


def check_size(height: int, width: int, factor: int, pixel_bytes: int) -> tuple[int, int]:
    """Return a picture's height and width, in pixels; raise unless both sides fit and memory suffices.

    `pixel_bytes` is the memory that decoding takes for a pixel.
    """
    check_side("height", height, factor)
    check_side("width", width, factor)
    needed, available = height * width * pixel_bytes, available_memory()
    if needed > available:
        raise InputError(
            f"size: {width}x{height} needs about {needed / 1e9:.1f} GB of memory, "
            f"{available / 1e9:.1f} GB are available; choose a smaller one"
        )
    return height, width


def resolve_seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """Return `count` seeds: those given, or counted on from the one given, or from a random one (None or negative)."""
    if seed is not None and not isinstance(seed, int | np.integer):
        seeds = [int(s) for s in seed]
        if len(seeds) != count:
            raise InputError(f"seed: found {len(seeds)} seeds for {count} pictures, expected as many or one")
        return seeds
    if seed is None or seed < 0:
        seed = secrets.randbelow(2**32 - count)
    if seed + count > 2**64:
        raise InputError(name="seed", found=seed, expected="a number below 2**64")
    return [int(seed) + i for i in range(count)]
