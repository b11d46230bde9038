"""Helpers with the same names as in ``diffusers.utils``, for scripts written for diffusers."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from PIL import Image

from .errors import InputError
from .pictures.files import open_picture, to_rgb


def load_image(image: str | os.PathLike[str] | Image.Image) -> Image.Image:
    """Open a picture: upright, in sRGB, with transparency on white.

    Parameters
    ----------
    image : path or PIL image

    Returns
    -------
    PIL.Image.Image
        Mode RGB.

    Raises
    ------
    InputError
        The image is a URL, or not a picture that can be read.
    """
    if isinstance(image, Image.Image):
        return to_rgb(image, "image")
    if re.match(r"[a-z]{2,}://", os.fspath(image), re.IGNORECASE):
        raise InputError(f"{image}: found a URL, expected a file: nothing is downloaded here; save the picture first")
    return open_picture(image)


def make_image_grid(images: Sequence[Image.Image], rows: int, cols: int, resize: int | None = None) -> Image.Image:
    """Lay out pictures of one size in rows, without gaps.

    Parameters
    ----------
    images : sequence of PIL images
        As many as rows times columns.
    rows, cols : int
    resize : int, optional
        Side in pixels of the squares that the pictures are resized to first.

    Raises
    ------
    InputError
        The number of pictures is not rows times columns.
    """
    if not images or len(images) != rows * cols:
        raise InputError(f"images: found {len(images)}, expected {rows} x {cols}; change rows and cols")
    if resize is not None:
        images = [image.resize((resize, resize)) for image in images]
    width, height = images[0].size
    grid = Image.new("RGB", (cols * width, rows * height))
    for index, image in enumerate(images):
        grid.paste(image, (index % cols * width, index // cols * height))
    return grid
