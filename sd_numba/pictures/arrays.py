"""Pictures and masks to start from: read from files or arrays, and resized for a model.

Arrays are float32 in [0, 1], ``(b, h, w, 3)`` for pictures and ``(b, h, w)`` for masks, where 1 is painted and 0 kept.
Resizing follows diffusers' ``VaeImageProcessor`` for PIL images, so that the same files give the same pictures in both.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from ..checks import MAX_SIDE, check_whole
from ..errors import InputError
from .files import open_mask, open_picture, to_grey, to_rgb

LANCZOS = Image.Resampling.LANCZOS
SLACK = 1e-3  # tolerance for values outside 0 .. 1, from rounding
ROOMY = 2.25  # a picture of up to this many times the model's area keeps its size
OVERLAP = 8  # most pixels of the old picture that are repainted along a new border
BLUR = 1 / 16  # radius of the blur in a new border, as a share of its width
SOFT_EDGE = 4  # pixels over which a painted part fades in
PictureLike: TypeAlias = Image.Image | np.ndarray | str | os.PathLike[str] | Sequence[Any]


def as_pictures(value: PictureLike, name: str) -> np.ndarray:
    """Convert pictures in any supported form to one array.

    Parameters
    ----------
    value : PIL image, array, path, or list of these
        Arrays are ``(h, w, 3)`` or ``(b, h, w, 3)``, uint8 or float in [0, 1].
    name : str
        Name of the argument, for errors.

    Returns
    -------
    float32 array ``(b, h, w, 3)``
        In [0, 1].

    Raises
    ------
    InputError
        The value has another type, numbers out of range or pictures of several sizes, or a file cannot be used.
    """
    return _as_arrays(value, name, open_picture, to_rgb, _picture_array)


def as_masks(value: PictureLike, name: str) -> np.ndarray:
    """Convert masks in any supported form to one array.

    Parameters
    ----------
    value : PIL image, array, path, or list of these
        Arrays are ``(h, w)``, ``(h, w, 1)``, ``(b, h, w)`` or ``(b, h, w, 1)``; uint8, bool, or float in [0, 1].
    name : str
        Name of the argument, for errors.

    Returns
    -------
    float32 array ``(b, h, w)``
        In [0, 1].

    Raises
    ------
    InputError
        As from `as_pictures`.
    """
    return _as_arrays(value, name, open_mask, to_grey, _mask_array)


def resize_pictures(pictures: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize pictures ``(b, h, w, 3)`` as diffusers resizes PIL images: by Lanczos, in eight bits.

    Pictures that already have the size are returned unchanged.
    """
    if pictures.shape[1:3] == (height, width):
        return pictures
    return _resize(pictures, height, width)


def resize_masks(masks: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize masks ``(b, h, w)`` as diffusers resizes PIL images, then set values from 0.5 on to 1, others to 0."""
    if masks.shape[1:] != (height, width):
        masks = _resize(masks, height, width)
    return (masks >= 0.5).astype(np.float32)


def latent_masks(masks: np.ndarray, h: int, w: int) -> np.ndarray:
    """Scale masks ``(b, height, width)`` to latents: take the nearest pixel above and to the left, as torch does.

    Returns
    -------
    float32 array ``(b, 1, h, w)``
        Values 0 and 1.
    """
    rows, columns = (np.arange(n) * size // n for n, size in zip((h, w), masks.shape[1:], strict=True))
    return (masks[:, rows[:, None], columns] >= 0.5).astype(np.float32)[:, None]


def cover(picture: Image.Image, height: int, width: int) -> Image.Image:
    """Scale a picture to cover this size, and crop the excess equally on both sides."""
    return picture if picture.size == (width, height) else ImageOps.fit(picture, (width, height), LANCZOS)


def fit_size(height: int, width: int, factor: int, area: int) -> tuple[int, int]:
    """Choose the size to work at for a picture.

    Parameters
    ----------
    height, width : int
        Size of the picture.
    factor : int
        The VAE's downscaling factor: both sides become multiples of it.
    area : int
        Number of pixels that the model was trained for.

    Returns
    -------
    height, width : int
        The picture's size, rounded down; if it has far more pixels than `area`, a size of about `area` pixels with the
        same aspect ratio.
    """
    if height * width <= ROOMY * area:
        return max(height // factor, 1) * factor, max(width // factor, 1) * factor
    scale = math.sqrt(area / (height * width)) / factor
    return max(round(height * scale), 1) * factor, max(round(width * scale), 1) * factor


def expand(
    picture: Image.Image, mask: Image.Image | None, left: int, top: int, right: int, bottom: int
) -> tuple[Image.Image, Image.Image]:
    """Enlarge the canvas of a picture, so that the new borders can be painted.

    Parameters
    ----------
    picture : PIL.Image.Image
        Mode RGB.
    mask : PIL.Image.Image, optional
        Mode L, of the picture's size: the part of the picture itself to paint.
    left, top, right, bottom : int
        Pixels to add on each side.

    Returns
    -------
    picture : PIL.Image.Image
        With borders that continue the colours of its edges, blurred.
    mask : PIL.Image.Image
        White on the borders and on some pixels beside them, so that no seam remains.

    Raises
    ------
    InputError
        A border is not a whole number from 0 to 8192, or the mask has another size.
    """
    for name, value in (("left", left), ("top", top), ("right", right), ("bottom", bottom)):
        check_whole(name, value, 0, MAX_SIDE)
    mask = Image.new("L", picture.size) if mask is None else mask
    _check_same_size(picture, mask=mask)
    widths = ((top, bottom), (left, right))
    canvas = Image.fromarray(np.pad(np.asarray(picture), (*widths, (0, 0)), "edge"))
    canvas = canvas.filter(ImageFilter.GaussianBlur(BLUR * max(left, top, right, bottom)))
    canvas.paste(picture, (left, top))
    new = np.zeros((picture.height, picture.width), np.uint8)
    for axis, (before, after) in enumerate(widths):
        overlap = min(OVERLAP, new.shape[axis] // 4)
        lines = np.moveaxis(new, axis, 0)
        lines[: overlap if before else 0] = 255
        lines[len(lines) - (overlap if after else 0) :] = 255
    return canvas, Image.fromarray(np.pad(np.maximum(new, np.asarray(mask)), widths, constant_values=255))


def paste_back(original: Image.Image, painted: Image.Image, mask: Image.Image) -> Image.Image:
    """Keep the painted pixels inside a mask only: outside it, every pixel is the original's.

    The painted part fades in within a few pixels of the mask's edge, or fewer where the mask is thinner.

    Parameters
    ----------
    original, painted : PIL.Image.Image
        Mode RGB.
    mask : PIL.Image.Image
        Mode L; 128 and above is painted.

    Returns
    -------
    PIL.Image.Image
        Mode RGB.

    Raises
    ------
    InputError
        Their sizes differ.
    """
    _check_same_size(original, painted=painted, mask=mask)
    return Image.composite(painted, original, painted_share(mask))


def painted_share(mask: Image.Image) -> Image.Image:
    """Return how much of each pixel is painted, from 0 to 255, for a mask of mode L: see `paste_back`."""
    inside = mask.point([0] * 128 + [1] * 128)
    depth = np.zeros((mask.height, mask.width), np.uint8)  # pixels from the edge, at most SOFT_EDGE
    for _ in range(SOFT_EDGE):
        depth += np.asarray(inside)
        inside = inside.filter(ImageFilter.MinFilter(3))
    deepest = np.asarray(Image.fromarray(depth).filter(ImageFilter.MaxFilter(2 * SOFT_EDGE + 1)))
    return Image.fromarray(np.round(255.0 * depth / np.maximum(deepest, 1)).astype(np.uint8))


def to_pil(pictures: np.ndarray) -> list[Image.Image]:
    """Turn float pictures ``(b, h, w, 3)`` in [0, 1] into PIL images."""
    return [Image.fromarray(picture) for picture in (pictures * 255).round().astype(np.uint8)]


def masks_to_pil(masks: np.ndarray) -> list[Image.Image]:
    """Turn float masks ``(b, h, w)`` of 0 and 1 into PIL images of mode L."""
    return [Image.fromarray(mask) for mask in (masks * 255).astype(np.uint8)]


def _as_arrays(
    value: PictureLike,
    name: str,
    read: Callable[[str | os.PathLike[str]], Image.Image],
    convert: Callable[[Image.Image, str], Image.Image],
    check: Callable[[np.ndarray, str], np.ndarray],
) -> np.ndarray:
    """Return one batch of pictures or masks; `read` opens files, `convert` takes PIL images, `check` takes arrays."""
    if isinstance(value, (list, tuple)):
        parts = [_as_arrays(one, name, read, convert, check) for one in value]
        sizes = sorted({(part.shape[2], part.shape[1]) for part in parts})
        if len(sizes) != 1:
            found = " and ".join("{}x{}".format(*size) for size in sizes) or "an empty list"
            raise InputError(f"{name}: found {found:.80}, expected pictures of one size")
        return np.concatenate(parts)
    if isinstance(value, (str, os.PathLike)):
        value = read(value)
    elif isinstance(value, Image.Image):
        value = convert(value, name)
    elif not isinstance(value, np.ndarray):
        raise InputError(
            f"{name}: found {type(value).__name__}, expected a PIL image, an array, a path, or a list of such"
        )
    return check(np.asarray(value), name)


def _picture_array(array: np.ndarray, name: str) -> np.ndarray:
    if array.ndim not in {3, 4} or array.shape[-1] != 3 or 0 in array.shape:
        raise InputError(f"{name}: found shape {array.shape}, expected (h, w, 3) or (b, h, w, 3)")
    if array.dtype == bool:
        raise InputError(f"{name}: found bool, expected uint8 or float")
    return _unit(array if array.ndim == 4 else array[None], name)


def _mask_array(array: np.ndarray, name: str) -> np.ndarray:
    shape = array.shape
    if array.ndim in {3, 4} and shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in {2, 3} or 0 in shape or shape[2:] == (3,):  # colours: no batch of masks is 3 pixels wide
        raise InputError(f"{name}: found shape {shape}, expected (h, w), (h, w, 1) or (b, h, w)")
    return _unit(array if array.ndim == 3 else array[None], name)


def _unit(array: np.ndarray, name: str) -> np.ndarray:
    """Convert uint8, bool or float values to float32 in [0, 1], in a new array."""
    if array.dtype == np.uint8:
        return array.astype(np.float32) / 255
    if array.dtype != bool and not np.issubdtype(array.dtype, np.floating):
        raise InputError(f"{name}: found {array.dtype}, expected uint8 or float")
    values = array.astype(np.float32)
    least, most = float(values.min()), float(values.max())
    if not (least >= -SLACK and most <= 1 + SLACK):
        raise InputError(f"{name}: found values from {least:g} to {most:g}, expected floats from 0 to 1, or uint8")
    return np.clip(values, 0, 1, out=values)


def _resize(arrays: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize each array of a batch with values in [0, 1], by Lanczos in eight bits."""
    pictures = [Image.fromarray(one) for one in np.round(arrays * 255).astype(np.uint8)]
    return np.stack([np.asarray(one.resize((width, height), LANCZOS), np.float32) / 255 for one in pictures])


def _check_same_size(picture: Image.Image, **others: Image.Image) -> None:
    for name, other in others.items():
        if other.size != picture.size:
            found, expected = ("{}x{}".format(*image.size) for image in (other, picture))
            raise InputError(f"{name}: found {found} pixels, expected {expected}, the size of the picture")
