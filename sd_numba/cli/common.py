"""What the commands have in common."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from .. import kernels
from ..errors import SdNumbaError
from ..generation.settings import settings_of
from ..recipes.recipe import Recipe

EXAMPLE = 'sd-numba generate "a red apple on a blue background"'


_TYPED = "sd_numba.typed"  # key of the context

# Our own errors say in one line what is wrong with a path; click's take four.
ANY_PATH = click.Path(readable=False)


def printable(text: str) -> str:
    """Return text for a terminal: control characters, with which a file could command it, become escapes."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


class Command(click.Command):
    """A command whose errors name the flags that were typed."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep what was typed."""
        ctx.meta[_TYPED] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except SdNumbaError as error:
            about = settings_of(Recipe).get(getattr(error, "name", None) or "")
            text = error.spelled(lambda name: flag_of(ctx, name), about.offset if about else 0)
            raise click.ClickException(text) from None


# A method that a message names -> the parameter of `generate` that calls it.
METHODS = {"load_lora_weights": "loras", "load_textual_inversion": "embedding_dir"}


def flag_of(ctx: click.Context, name: str) -> str:
    """Return the flag that was typed for a parameter, or else its first long one; other names as they are.

    What the command has no flag for may be one of `generate`.
    """
    root = ctx.find_root()
    generate = root.command.get_command(root, "generate") if isinstance(root.command, click.Group) else None
    params = [*ctx.command.params, *(generate.params if generate else ())]
    flags: list[str] = next((param.opts for param in params if param.name == METHODS.get(name, name)), [])
    flags = [flag for flag in flags if flag.startswith("-")]
    for arg in ctx.meta.get(_TYPED, ()):
        for flag in flags:
            if arg == flag or arg.startswith(f"{flag}=" if flag.startswith("--") else flag):
                return flag
    return next((flag for flag in flags if flag.startswith("--")), name)


class Group(click.Group):
    """Turns errors meant for users into one line and an exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; SIGTERM ends it like an error, so that no unfinished file stays."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            return super().invoke(ctx)
        except MemoryError:
            raise click.ClickException("out of memory; choose a smaller size, or --weights mmap") from None
        except KeyboardInterrupt as stop:
            click.echo(f"\nstopped by Ctrl-C; {stop or 'nothing unfinished was written'}", err=True)
            ctx.exit(130)
        except OSError as error:
            if error.errno == errno.EPIPE:  # `| head`: click ends quietly
                raise
            what = f"{error.filename}: " if error.filename else "output cannot be written: "
            raise click.ClickException(f"{what}{error.strerror or error}") from None


def warm_up(*precisions: str) -> None:
    """Compile missing kernels for products of these precisions and float32, and print the progress."""
    start = time.perf_counter()
    compiled = 0
    with _ctrl_c_kept() as raise_kept:
        for index, total, name in kernels.warmup(*precisions):
            raise_kept()
            if not index:
                click.echo(f"First run on this machine: compiling {total} kernels, once.", err=True)
            click.echo(f"  kernel {index + 1} of {total}: {name}", err=True)
            compiled = total
        raise_kept()
    if compiled:
        click.echo(f"  done in {time.perf_counter() - start:.1f} s", err=True)


@contextmanager
def _ctrl_c_kept() -> Iterator[Callable[[], None]]:
    """Keep a Ctrl-C until the function that this yields is called; a second one ends the process at once.

    LLVM calls back into Python, and a KeyboardInterrupt that arises there is printed as a traceback and then lost.
    """
    kept = False

    def keep(*_: Any) -> None:
        nonlocal kept
        kept = True
        os.write(2, b"\nstopping after this kernel; Ctrl-C again stops at once\n")
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def raise_kept() -> None:
        if kept:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # only there can handlers be set
        yield raise_kept
        return
    previous = signal.signal(signal.SIGINT, keep)
    try:
        yield raise_kept
    finally:
        signal.signal(signal.SIGINT, previous)


def model_argument(command: Any) -> Any:
    """Add the argument MODEL."""
    return click.argument("model", required=False, type=ANY_PATH)(command)


def threads_option(command: Any) -> Any:
    """Add the option ``--threads``."""
    return click.option(
        "-t", "--threads", type=int, default=0, show_default=True, help="Threads; 0 or less: all physical cores."
    )(command)
