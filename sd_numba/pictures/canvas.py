"""The picture that a run starts from, at the size to work at, with the mask of what to paint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageChops

from ..checks import check_side
from .arrays import cover, expand, fit_size


@dataclass(frozen=True)
class Canvas:
    """What to start from: nothing, a picture, or a picture and a mask of its size."""

    picture: Image.Image | None = None
    mask: Image.Image | None = None


def lay_out(
    picture: Image.Image,
    mask: Image.Image | None,
    *,
    borders: Sequence[int] | None = None,
    height: int | None = None,
    width: int | None = None,
    own_size: tuple[int, int],
    factor: int,
) -> Canvas:
    """Bring a picture and its mask to the size to work at, and add borders to be painted.

    Parameters
    ----------
    picture : PIL.Image.Image
        Mode RGB, of any size.
    mask : PIL.Image.Image, optional
        Mode L; it is stretched to the size of the picture.
    borders : sequence of int, optional
        Pixels to add on the left, the top, the right and the bottom; rounded up to whole latent pixels.
    height, width : int, optional
        Size of the result, borders included. By default the picture keeps its size, or is scaled down to about the
        model's.
    own_size : tuple of int
        Height and width that the model was made for.
    factor : int
        The VAE's: both sides are multiples of it.

    Raises
    ------
    InputError
        A side is too small, too large, or not a multiple of `factor`.
    """
    mask = None if mask is None else mask.resize(picture.size)
    left, top, right, bottom = (-(-pixels // factor) * factor for pixels in borders or (0, 0, 0, 0))
    fit_height, fit_width = fit_size(picture.height, picture.width, factor, own_size[0] * own_size[1])
    inner_height = check_side("height", fit_height if height is None else height - top - bottom, factor)
    inner_width = check_side("width", fit_width if width is None else width - left - right, factor)
    picture = _fitted(picture, inner_height, inner_width)
    mask = None if mask is None else _fitted(mask, inner_height, inner_width)
    if left or top or right or bottom:
        picture, outside = expand(picture, None, left, top, right, bottom)
        if mask is not None:
            inside = Image.new("L", picture.size)
            inside.paste(mask, (left, top))
            outside = ImageChops.lighter(inside, outside)
        mask = outside
    return Canvas(picture, mask)


def _fitted(picture: Image.Image, height: int, width: int) -> Image.Image:
    """Bring a picture to a size: crop less than a latent pixel, otherwise scale."""
    right, below = picture.width - width, picture.height - height
    if 0 <= right < 8 and 0 <= below < 8:
        left, top = right // 2, below // 2
        return picture.crop((left, top, left + width, top + height))
    return cover(picture, height, width)
