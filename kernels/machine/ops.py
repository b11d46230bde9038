"""The public operations that cost time: what each call counts as, and who listens to the calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

Counter = Callable[..., tuple[str, float]]  # (result, *arguments) -> kind of operation, floating-point operations
Listener = Callable[[str, float, float], None]  # (kind, floating-point operations, seconds)

_listener: Listener | None = None


def op(count: Counter | str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a decorator of public operations that reports their calls to a listener, if there is one.

    Parameters
    ----------
    count : callable or str
        Takes the result and the arguments of a call; returns the kind of operation and its multiplications and
        additions, as the direct algorithm makes them. A string is the kind of an operation whose arithmetic is not
        counted.
    """
    counter: Counter = (lambda *_, **__: (count, 0.0)) if isinstance(count, str) else count

    def wrap(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if _listener is None:
                return function(*args, **kwargs)
            return _observed(function, counter, args, kwargs)

        return call

    return wrap


def _observed(function: Callable[..., R], counter: Counter, args: tuple[Any, ...], kwargs: dict[str, Any]) -> R:
    """Call an operation and report it; the operations that it calls itself are part of it and are not reported."""
    global _listener  # noqa: PLW0603
    listener, _listener = _listener, None
    try:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        seconds = time.perf_counter() - start
    finally:
        _listener = listener
    if listener is not None:
        listener(*counter(result, *args, **kwargs), seconds)
    return result


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Report each public operation inside the ``with`` block to `listener`; not for several threads at once."""
    global _listener  # noqa: PLW0603
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before
