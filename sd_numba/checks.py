"""Checks of what callers ask for: each raises an `InputError` of one line that says what was found and expected."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np

from .errors import InputError
from .memory import available_memory

MAX_SIDE = 8192  # pixels


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise InputError(f"{name}: found {value!r:.80}, expected {' or '.join(choices)}")


def check_whole(name: str, value: object, least: int, most: int) -> None:
    """Raise unless `value` is a whole number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not least <= value <= most:
        raise InputError(f"{name}: found {value!r:.80}, expected a whole number from {least} to {most}")


def check_number(name: str, value: Any, least: float, most: float, default: float | None = None) -> float:
    """Return `value`, or the default for None; raise unless it is a number from `least` to `most`."""
    value = default if value is None else value
    number = not isinstance(value, bool) and isinstance(value, (int, float, np.number))
    if not number or not least <= value <= most:
        raise InputError(f"{name}: found {value!r:.80}, expected a number from {least:g} to {most:g}")
    return float(value)


def check_prompts(name: str, value: str | Sequence[str]) -> list[str]:
    """Return the prompts as a list; raise unless they are a text or a list of texts."""
    prompts = [value] if isinstance(value, str) else list(value) if isinstance(value, Sequence) else []
    if not prompts or not all(isinstance(p, str) for p in prompts):
        raise InputError(f"{name}: found {value!r:.80}, expected a text or a list of texts")
    return prompts


def check_side(name: str, value: int, factor: int) -> None:
    """Check a picture's height or width, in pixels; `factor` is the VAE's.

    Raises
    ------
    InputError
        If it is not a whole number, too small, too large, or not a multiple of `factor`.
    """
    check_whole(name, value, factor, MAX_SIDE)
    if value % factor:
        lower = value // factor * factor
        raise InputError(f"{name}: found {value}, expected a multiple of {factor}, such as {lower} or {lower + factor}")


def check_size(height: int, width: int, factor: int, pixel_bytes: int) -> tuple[int, int]:
    """Return a picture's height and width, in pixels; raise unless both sides are right and memory suffices.

    `pixel_bytes` is what decoding takes of it for a pixel.
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
    if seed is not None and not isinstance(seed, (int, np.integer)):
        seeds = [int(s) for s in seed]
        if len(seeds) != count:
            raise InputError(f"seed: found {len(seeds)} seeds for {count} pictures, expected as many or one")
        return seeds
    if seed is None or seed < 0:
        seed = secrets.randbelow(2**32 - count)
    if seed + count > 2**64:
        raise InputError(f"seed: found {seed}, expected a number below 2**64")
    return [int(seed) + i for i in range(count)]
