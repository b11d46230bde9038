"""The picture that a recipe starts from, at the size to work at, with the mask of what to paint."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from PIL import Image, ImageChops

from ..checks import check_side
from ..errors import InputError
from ..pictures.arrays import cover, expand, fit_size, paste_back
from ..pictures.files import open_mask, open_picture
from ..pipeline import StableDiffusionPipeline
from ..recipes.recipe import Recipe

STRENGTH = 0.75  # where none is given, as in stable-diffusion.cpp
MAX_EXPANSION = 4096  # pixels on a side


@dataclass(frozen=True)
class Canvas:
    """What to start from: neither, a picture, or a picture and a mask of its size."""

    picture: Image.Image | None = None
    mask: Image.Image | None = None

    def finish(self, painted: Image.Image) -> Image.Image:
        """Put what is not to be painted back, pixel by pixel."""
        if self.picture is None or self.mask is None:
            return painted
        return paste_back(self.picture, painted, self.mask)


def lay_out(recipe: Recipe, pipe: StableDiffusionPipeline) -> tuple[Recipe, Canvas]:
    """Open the pictures of a recipe; returns it with the size and the strength that it leaves open, too.

    The width and height of a recipe are those of the result, what it is expanded by included.

    Raises
    ------
    InputError
        A picture cannot be read, or the settings do not go together.
    """
    if recipe.init_image is None:
        for name in ("mask_image", "strength", "expand"):
            if getattr(recipe, name) is not None:
                raise InputError(f"{name}: found one without a picture to start from; give it with --init-img")
        height, width = pipe.default_size
        width = width if recipe.width is None else recipe.width
        height = height if recipe.height is None else recipe.height
        return replace(recipe, width=width, height=height), Canvas()
    files = recipe.init_image, recipe.mask_image
    stamps = tuple(_stamp(path) for path in files if path is not None)
    picture, mask = _fit(*files, stamps, recipe.expand, recipe.height, recipe.width, pipe.default_size, pipe.vae.factor)
    strength = STRENGTH if recipe.strength is None else recipe.strength
    return replace(recipe, width=picture.width, height=picture.height, strength=strength), Canvas(picture, mask)


def _stamp(path: str) -> tuple[str, int, int] | None:
    """Tell the versions of a file apart, so that what is remembered of one is not taken for another."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # opening it says what is wrong
        return None
    return os.path.abspath(path), found.st_size, found.st_mtime_ns


@lru_cache(maxsize=4)
def _fit(
    init_image: str,
    mask_image: str | None,
    stamps: tuple[object, ...],
    expansion: tuple[int, ...] | None,
    height: int | None,
    width: int | None,
    own: tuple[int, int],
    factor: int,
) -> tuple[Image.Image, Image.Image | None]:
    """Open a picture and its mask, and bring them to the size to work at; the jobs of a batch share them."""
    picture = open_picture(init_image)
    mask = None if mask_image is None else open_mask(mask_image).resize(picture.size)
    sides = _expansion(expansion, factor)
    inner = _inner_size(height, width, picture, sides, own, factor)
    picture = _fitted(picture, *inner)
    mask = None if mask is None else _fitted(mask, *inner)
    if any(sides):
        picture, outside = expand(picture, None, *sides)
        if mask is not None:
            inside = Image.new("L", picture.size)
            inside.paste(mask, sides[:2])
            outside = ImageChops.lighter(inside, outside)
        mask = outside
    return picture, mask


def _expansion(asked: Sequence[int] | None, factor: int) -> tuple[int, int, int, int]:
    """Round what is added to the sides up to whole latents."""
    if asked is None:
        return 0, 0, 0, 0
    for pixels in asked:
        if not 0 <= pixels <= MAX_EXPANSION:
            raise InputError(f"expand: found {pixels}, expected 0 to {MAX_EXPANSION} pixels on each side")
    left, top, right, bottom = (-(-pixels // factor) * factor for pixels in asked)
    return left, top, right, bottom


def _inner_size(
    height: int | None,
    width: int | None,
    picture: Image.Image,
    sides: tuple[int, int, int, int],
    own: tuple[int, int],
    factor: int,
) -> tuple[int, int]:
    """Return height and width of the picture without what it is expanded by."""
    left, top, right, bottom = sides
    fit_height, fit_width = fit_size(picture.height, picture.width, factor, own[0] * own[1])
    height = fit_height if height is None else height - top - bottom
    width = fit_width if width is None else width - left - right
    check_side("height", height, factor)
    check_side("width", width, factor)
    return height, width


def _fitted(picture: Image.Image, height: int, width: int) -> Image.Image:
    """Bring a picture to a size: cut off what is less than a latent, or else scale it."""
    right, below = picture.width - width, picture.height - height
    if 0 <= right < 8 and 0 <= below < 8:
        left, top = right // 2, below // 2
        return picture.crop((left, top, left + width, top + height))
    return cover(picture, height, width)
