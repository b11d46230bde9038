"""The picture that a recipe starts from, at the size to work at, with the mask of what to paint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from PIL import Image, ImageChops

from ..arguments import check_side
from ..errors import InputError
from ..images import cover, expand, fit_size, paste_back
from ..picture_files import open_mask, open_picture
from ..pipeline import StableDiffusionPipeline
from ..recipe import Recipe

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


@lru_cache(maxsize=4)
def _picture(path: str) -> Image.Image:
    return open_picture(path)


@lru_cache(maxsize=4)
def _mask(path: str) -> Image.Image:
    return open_mask(path)


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
    picture = _picture(recipe.init_image)
    mask = None if recipe.mask_image is None else _mask(recipe.mask_image).resize(picture.size)
    sides = _expansion(recipe.expand, pipe.vae.factor)
    height, width = _inner_size(recipe, picture, sides, pipe)
    picture = _fitted(picture, height, width)
    mask = None if mask is None else _fitted(mask, height, width)
    if any(sides):
        picture, outside = expand(picture, None, *sides)
        if mask is not None:
            inside = Image.new("L", picture.size)
            inside.paste(mask, sides[:2])
            outside = ImageChops.lighter(inside, outside)
        mask = outside
    strength = STRENGTH if recipe.strength is None else recipe.strength
    return replace(recipe, width=picture.width, height=picture.height, strength=strength), Canvas(picture, mask)


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
    recipe: Recipe, picture: Image.Image, sides: tuple[int, int, int, int], pipe: StableDiffusionPipeline
) -> tuple[int, int]:
    """Return height and width of the picture without what it is expanded by."""
    left, top, right, bottom = sides
    own_height, own_width = pipe.default_size
    height, width = fit_size(picture.height, picture.width, pipe.vae.factor, own_height * own_width)
    if recipe.height is not None:
        height = recipe.height - top - bottom
    if recipe.width is not None:
        width = recipe.width - left - right
    check_side("height", height, pipe.vae.factor)
    check_side("width", width, pipe.vae.factor)
    return height, width


def _fitted(picture: Image.Image, height: int, width: int) -> Image.Image:
    """Bring a picture to a size: cut off what is less than a latent, or else scale it."""
    right, below = picture.width - width, picture.height - height
    if 0 <= right < 8 and 0 <= below < 8:
        left, top = right // 2, below // 2
        return picture.crop((left, top, left + width, top + height))
    return cover(picture, height, width)
