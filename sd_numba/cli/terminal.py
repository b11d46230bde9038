r"""Pictures in the terminal itself: by the graphics protocol of kitty, as sixels, or in half blocks.

Kitty: https://sw.kovidgoyal.net/kitty/graphics-protocol/. Sixels: VT330/VT340 Programmer Reference Manual, volume 2,
chapter 14. Half blocks are characters whose upper half is the foreground and whose lower half the background, so that a
cell shows two pixels.

A picture is drawn over the one before: the cursor goes up by the rows of that one, and ends at the beginning of the
line below the new one, where the progress bar is.
"""

from __future__ import annotations

import base64
import io
import os
import secrets
import struct
from collections.abc import Iterator, Mapping
from typing import TextIO

import numpy as np
from PIL import Image

ESC = "\x1b"
RESET, CLEAR_LINE, SAVE, RESTORE = f"{ESC}[0m", f"\r{ESC}[2K", f"{ESC}7", f"{ESC}8"
OVERRIDE = "SD_NUMBA_GRAPHICS"
KINDS = ("kitty", "sixel", "blocks", "none")
KITTY_TERMS, KITTY_PROGRAMS = ("xterm-kitty", "xterm-ghostty"), ("ghostty", "WezTerm")
KITTY_VARIABLES = ("KITTY_WINDOW_ID", "KONSOLE_VERSION", "GHOSTTY_RESOURCES_DIR")
SIXEL_TERMS, SIXEL_PROGRAMS = ("foot", "mlterm", "contour", "yaft"), ("iTerm.app", "mintty")
SIXEL_VARIABLES = ("WT_SESSION",)  # Windows Terminal
MULTIPLEXERS = ("screen", "tmux")

CELL = (10, 20)  # pixels of a cell, wide and high, where the terminal does not say
MOST_CELLS = {"kitty": (60, 24), "sixel": (60, 24), "blocks": (40, 20)}  # columns and rows of a picture
MOST_PIXELS = 512  # in a row of a kitty or sixel picture
BELOW = 2  # rows to leave free below a picture
CHUNK = 4096  # bytes of base64 in one command of kitty's protocol
SIXEL_COLOURS = 64


def graphics_kind(stream: TextIO, env: Mapping[str, str]) -> str:
    """Return what a terminal can show, judged by its environment variables: one of `KINDS`."""
    try:
        if not stream.isatty():
            return "none"
    except ValueError:  # closed
        return "none"
    kind = env[OVERRIDE] if env.get(OVERRIDE) in KINDS else _kind_by_names(env)
    if kind == "blocks" and (stream.encoding or "").lower() not in ("utf-8", "utf8", "utf_8"):
        return "none"
    return kind


def _kind_by_names(env: Mapping[str, str]) -> str:
    term = env.get("TERM") or ("xterm" if "WT_SESSION" in env else "dumb")  # Windows has no TERM
    program = env.get("TERM_PROGRAM", "")
    if term == "dumb" or env.get("NO_COLOR"):
        return "none"
    if not (env.get("TMUX") or term.startswith(MULTIPLEXERS)):
        if term in KITTY_TERMS or program in KITTY_PROGRAMS or any(name in env for name in KITTY_VARIABLES):
            return "kitty"
        if term.startswith(SIXEL_TERMS) or program in SIXEL_PROGRAMS or any(name in env for name in SIXEL_VARIABLES):
            return "sixel"
    return "blocks"


class Screen:
    """The place of a picture in a terminal.

    Parameters
    ----------
    stream : text stream
        Stream of the terminal; nothing is shown if it is not a terminal.
    env : mapping, optional
        Environment variables that tell its kind, by default the process's own; `OVERRIDE` selects a kind.

    Attributes
    ----------
    kind : {"kitty", "sixel", "blocks", "none"}
    """

    def __init__(self, stream: TextIO, env: Mapping[str, str] | None = None) -> None:
        env = os.environ if env is None else env
        self.stream, self.kind = stream, graphics_kind(stream, env)
        self.deep = env.get("COLORTERM", "").lower() in ("truecolor", "24bit")
        self.rows = self.wide = 0  # rows of the current picture, and its columns of text
        self.image_id = _new_id()

    def show(self, image: Image.Image) -> None:
        """Draw a picture over the previous one, and clear the cursor's line below it.

        After a write error no more pictures are drawn: a preview must not end a run.
        """
        if self.kind == "none":
            return
        (columns, lines), cell = _size(self.stream)
        most = MOST_CELLS[self.kind]
        width, height = max(1, min(columns, most[0])), max(1, min(lines - BELOW, most[1]))
        if self.kind == "blocks":
            image = _fitted(image, width, 2 * height)
            rows, wide = -(-image.height // 2), image.width
        else:
            image = _fitted(image, min(width * cell[0], MOST_PIXELS), height * cell[1])
            rows, wide = -(-image.height // cell[1]), 0  # text is wrapped when a terminal gets narrow, pictures are not
        # rows of the previous picture that are still on the screen
        former = min(self.rows, lines - 1) if self.wide <= columns else 0
        up = f"{ESC}[{former}A" if former else ""
        clear = f"{CLEAR_LINE}\n" * max(rows, former)
        back = f"{ESC}[{max(rows, former)}A"  # the rows exist, even at the end of the screen
        try:
            self.stream.write(f"{CLEAR_LINE}{up}{clear}{back}{''.join(self._draw(image, rows))}")
            self.stream.flush()
        except (OSError, ValueError):  # ValueError: it is closed
            self.kind = "none"
        self.rows, self.wide = rows, wide

    def leave(self) -> None:
        """Keep the picture on the screen: the next one is drawn below it."""
        self.rows = self.wide = 0
        self.image_id = _new_id()

    def _draw(self, image: Image.Image, rows: int) -> Iterator[str]:
        """Yield the commands that draw a picture at the cursor and move the cursor below it."""
        if self.kind == "blocks":
            yield from half_blocks(np.asarray(image), self.deep)
            return
        yield SAVE
        yield from kitty(image, rows, self.image_id) if self.kind == "kitty" else sixels(image)
        yield f"{RESTORE}{ESC}[{rows}B\r"


def _new_id() -> int:
    """Return a random image number for the terminal, so that pictures that stay are not replaced."""
    return 1 + secrets.randbelow(2**31 - 1)


def _size(stream: TextIO) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the columns and lines of a terminal, and the width and height of a cell in pixels."""
    columns = lines = width = height = 0
    try:
        columns, lines = os.get_terminal_size(stream.fileno())
        import fcntl  # noqa: PLC0415  # not on Windows
        import termios  # noqa: PLC0415

        *_, width, height = struct.unpack("4H", fcntl.ioctl(stream.fileno(), termios.TIOCGWINSZ, bytes(8)))
    except (ImportError, OSError, ValueError):  # not a terminal, or it does not say
        pass
    columns, lines = columns or 80, lines or 24
    cell = (width // columns, height // lines)
    return (columns, lines), cell if all(cell) else CELL


def _fitted(image: Image.Image, width: int, height: int) -> Image.Image:
    """Scale a picture to fit into ``width`` by ``height`` pixels."""
    scale = min(width / image.width, height / image.height)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def half_blocks(pixels: np.ndarray, deep: bool) -> Iterator[str]:
    """Yield lines of half blocks for pixels ``(h, w, 3)``, in 24-bit colours or the 256-colour cube."""
    if len(pixels) % 2:
        pixels = np.concatenate([pixels, np.zeros_like(pixels[:1])])
    for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
        cells = (
            f"{ESC}[38;{_colour(above, deep)};48;{_colour(below, deep)}m▀"
            for above, below in zip(upper.tolist(), lower.tolist(), strict=True)
        )
        yield f"{''.join(cells)}{RESET}\r\n"


def _colour(rgb: list[int], deep: bool) -> str:
    if deep:
        return "2;{};{};{}".format(*rgb)
    red, green, blue = (0 if value < 48 else 1 if value < 115 else (value - 35) // 40 for value in rgb)
    return f"5;{16 + 36 * red + 6 * green + blue}"


def kitty(image: Image.Image, rows: int, number: int) -> Iterator[str]:
    """Yield the commands that delete image ``number`` and show a new one over ``rows`` rows."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    data = base64.standard_b64encode(file.getvalue()).decode()
    yield f"{ESC}_Ga=d,d=I,i={number},q=2{ESC}\\"
    for first in range(0, len(data), CHUNK):
        keys = "" if first else f"a=T,f=100,i={number},r={rows},C=1,q=2,"
        yield f"{ESC}_G{keys}m={int(first + CHUNK < len(data))};{data[first : first + CHUNK]}{ESC}\\"


def sixels(image: Image.Image) -> Iterator[str]:
    """Yield a picture as sixels: bands of six rows, each with a line for every colour in it."""
    reduced = image.quantize(SIXEL_COLOURS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    palette = np.array(reduced.getpalette() or [0, 0, 0]).reshape(-1, 3)
    indices = np.asarray(reduced)
    yield f'{ESC}P0;1q"1;1;{image.width};{image.height}'
    for number, rgb in enumerate(palette):
        yield "#{};2;{};{};{}".format(number, *(rgb * 100 + 127) // 255)
    for top in range(0, image.height, 6):
        yield _band(indices[top : top + 6])
    yield f"{ESC}\\"


def _band(rows: np.ndarray) -> str:
    """Encode up to six rows of colour indices: a line for each colour, with run lengths for repeated sixels."""
    colours = np.unique(rows)
    bits = (1 << np.arange(len(rows)))[:, None]
    lines = ((rows == colours[:, None, None]) * bits).sum(axis=1)
    width = lines.shape[1]
    changes = np.ones(lines.shape, bool)
    changes[:, 1:] = lines[:, 1:] != lines[:, :-1]
    starts = np.flatnonzero(changes)
    lengths = np.diff(starts, append=lines.size).tolist()
    runs = [
        f"!{length}{chr(63 + value)}" if length > 3 else chr(63 + value) * length
        for value, length in zip(lines.ravel()[starts].tolist(), lengths, strict=True)
    ]
    ends = [*np.searchsorted(starts, width * np.arange(1, len(colours))).tolist(), len(runs)]
    parts = zip(colours.tolist(), [0, *ends[:-1]], ends, strict=True)
    return "".join(f"#{colour}{''.join(runs[first:end])}$" for colour, first, end in parts) + "-"
