"""Contact sheets: several pictures in one image."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image

GAP = 4  # pixels between the pictures


def contact_sheet(pictures: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Lay out pictures in rows on white. Pictures smaller than a cell are centred in it.

    Parameters
    ----------
    pictures : sequence of Image
        At least one.
    columns : int, optional
        Pictures in a row; by default about as many as there are rows.
    """
    if len(pictures) == 1:
        return pictures[0]
    columns = min(len(pictures), math.ceil(math.sqrt(len(pictures))) if columns is None else columns)
    rows = -(-len(pictures) // columns)
    width, height = (max(picture.size[axis] for picture in pictures) for axis in (0, 1))
    sheet = Image.new("RGB", (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP), "white")
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        left = column * (width + GAP) + (width - picture.width) // 2
        sheet.paste(picture, (left, row * (height + GAP) + (height - picture.height) // 2))
    return sheet
