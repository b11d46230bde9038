"""Read pictures and masks from files of any format, mode, depth and colour profile."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageCms

from ..errors import InputError

WHITE, BLACK = (255, 255, 255), (0, 0, 0)
WORDS = 65535  # the largest value of 16 bits
HIGHLIGHT = 2  # highest value of a float picture in 0 to 1; above it, the range is taken as 0 to 255
SCRIPTS = ("EPS",)  # formats that are programs and need an external interpreter
ORIENTATION = 0x0112  # the tag in EXIF data
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_picture(path: str | os.PathLike[str]) -> Image.Image:
    """Open a picture of any format, mode and depth that Pillow reads.

    The picture is rotated as its EXIF data says, converted from its colour profile to sRGB, and composited on white.
    An animation gives its first frame.

    Parameters
    ----------
    path : path

    Returns
    -------
    PIL.Image.Image
        Mode RGB.

    Raises
    ------
    InputError
        The file is missing, not a picture, damaged, or too large for Pillow.
    """
    return _open(path, to_rgb)


def open_mask(path: str | os.PathLike[str]) -> Image.Image:
    """Open a mask as `open_picture` does, as luminance: white is painted, black and transparent are kept.

    Parameters
    ----------
    path : path

    Returns
    -------
    PIL.Image.Image
        Mode L.

    Raises
    ------
    InputError
        As from `open_picture`.
    """
    return _open(path, to_grey)


def _open(path: str | os.PathLike[str], convert: Callable[[Image.Image, str], Image.Image]) -> Image.Image:
    name = os.fspath(path)
    try:
        image = Image.open(name)
    except FileNotFoundError:
        raise InputError(f"{name}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{name}: is a folder, not a picture") from None
    except PermissionError:
        raise InputError(f"{name}: permission denied; make the file readable") from None
    except Image.DecompressionBombError as error:
        raise _unusable(name, error) from None
    except Exception:  # Pillow's parsers raise many kinds of errors
        raise InputError(f"{name}: not a picture in a known format, such as PNG, JPEG or WebP") from None
    with image:
        if image.format in SCRIPTS:
            raise InputError(f"{name}: found {image.format}, expected a bitmap format, such as PNG, JPEG or WebP")
        return convert(image, name)


def _unusable(name: str, error: Exception) -> InputError:
    """Return an error that says why Pillow could not read the pixels."""
    if isinstance(error, Image.DecompressionBombError) and (count := re.search(r"\d+", str(error))):
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        return InputError(f"{name}: found {count[0]} pixels, expected at most {most}; make the picture smaller")
    reason = " ".join(str(error).split()) or type(error).__name__
    return InputError(f"{name}: the picture is damaged ({reason:.120}); make or download it again")


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Convert a PIL image as `open_picture` does; errors start with `name`."""
    return _flatten(image, name, WHITE, colours=True)


def to_grey(image: Image.Image, name: str) -> Image.Image:
    """Convert a PIL image as `open_mask` does; errors start with `name`."""
    # A colour profile would distort the greys of a mask, which are blending weights.
    return _flatten(image, name, BLACK, colours=False).convert("L")


def _flatten(image: Image.Image, name: str, background: tuple[int, int, int], colours: bool) -> Image.Image:
    """Convert an image of any mode to upright RGB without transparency."""
    if 0 in image.size:
        raise InputError(f"{name}: the picture is empty ({image.width}x{image.height} pixels)")
    try:
        image.load()
        profile, turn = image.info.get("icc_profile"), _turn(image)
        if image.mode.startswith(("I", "F")):
            image = _eight_bits(image)
        if turn is not None:
            image = image.transpose(turn)
        image, alpha = _split_alpha(image)
        image = _to_srgb(image, profile if colours else None)
        return image if alpha is None else Image.composite(image, Image.new("RGB", image.size, background), alpha)
    except Exception as error:  # decoders raise many kinds of errors on damaged data
        raise _unusable(name, error) from None


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Return the transposition that turns a picture upright."""
    try:
        return TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF data does not make a picture unusable
        return None


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit, 32-bit or float greys to 8 bits: Pillow would clip them."""
    values = np.nan_to_num(np.asarray(image).astype(np.float64))
    floats = 255 if values.max() > HIGHLIGHT else 1
    white = floats if image.mode == "F" else max(values.max(), WORDS)
    return Image.fromarray(np.clip(np.round(255 / white * values), 0, 255).astype(np.uint8))


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Split an 8-bit image into its colours and its alpha channel, or None if it has no transparency."""
    if "transparency" not in image.info and image.mode not in {"LA", "La", "PA", "RGBA", "RGBa"}:
        return image, None
    grey = image.mode in {"L", "LA", "La"}
    image = image.convert("LA" if grey else "RGBA")
    return image.convert("L" if grey else "RGB"), image.getchannel("A")


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert colours to sRGB; a profile that is damaged or does not match the mode is ignored."""
    if image.mode in {"1", "P"}:
        image = image.convert("L" if image.mode == "1" else "RGB")
    if profile and image.mode in {"L", "RGB", "CMYK", "LAB"}:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if "sRGB" not in ImageCms.getProfileDescription(source):
                converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
                return converted or image.convert("RGB")
        except (ImageCms.PyCMSError, ImportError, OSError, ValueError):
            pass
    return image.convert("RGB")
