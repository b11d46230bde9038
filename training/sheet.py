"""Sheets of small pictures with captions under them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .art import SIZE

FONT_SIZE, LINE, LETTERS = 11, 13, 22  # pixels, pixels, letters in a line
MARGIN = 4


def save_sheet(
    path: Path, pictures: Sequence[np.ndarray], captions: Sequence[tuple[str, ...]], columns: int = 8
) -> None:
    """Write pictures in rows, each with its caption below it: the first line in black, the others in red.

    Parameters
    ----------
    path
        A JPEG file, or whatever its ending says.
    pictures
        ``(SIZE, SIZE, 3)`` in 0 to 1 each.
    captions
        Texts for each picture; long ones are wrapped.
    columns
        The most pictures in a row.
    """
    font = ImageFont.load_default(size=FONT_SIZE)
    wrapped = [
        [(line, "black" if n == 0 else "#b00020") for n, text in enumerate(texts) for line in _wrap(text)]
        for texts in captions
    ]
    columns = min(columns, len(pictures))
    rows = [range(start, min(start + columns, len(pictures))) for start in range(0, len(pictures), columns)]
    heights = [SIZE + 2 * MARGIN + LINE * max(len(wrapped[index]) for index in row) for row in rows]
    sheet = Image.new("RGB", (columns * (SIZE + MARGIN) + MARGIN, sum(heights) + MARGIN), "#d8d8d8")
    draw = ImageDraw.Draw(sheet)
    top = MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, index in enumerate(row):
            left = MARGIN + column * (SIZE + MARGIN)
            picture = Image.fromarray(np.rint(pictures[index] * 255).clip(0, 255).astype(np.uint8))
            sheet.paste(picture, (left, top))
            for number, (line, colour) in enumerate(wrapped[index]):
                draw.text((left, top + SIZE + number * LINE), line, colour, font)
        top += height
    sheet.save(path, quality=88, optimize=True)


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, LETTERS)
