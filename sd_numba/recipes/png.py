"""Pictures in files, with the text that says how they were made: in a PNG's ``parameters`` chunk, or in EXIF data."""

from __future__ import annotations

import html
import os
import re
import stat
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..errors import InputError
from ..files.writing import unfinished
from .a1111 import Parameters, format_parameters

KEYWORD = "parameters"
EXIF_IFD, USER_COMMENT = 0x8769, 0x9286
# where stable-diffusion.cpp puts the text in a WebP file
XMP = re.compile(rb"<sdcpp:parameters>(.*?)</sdcpp:parameters>", re.DOTALL)


def check_output(path: str | os.PathLike[str]) -> None:
    """Check, before hours of work, that a picture can be saved under this name.

    Raises
    ------
    InputError
        The folder is missing or not writable, the path is a folder, or its extension belongs to another format.
    """
    path = Path(path)
    if path.suffix.lower() in (".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"):
        raise InputError(f"{path}: pictures are written as PNG; choose a name that ends in .png")
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from None
    if stat.S_ISDIR(mode):
        raise InputError(f"{path}: is a folder; expected the name of a picture, such as {path / 'output.png'}")
    if not stat.S_ISREG(mode):  # a device or a pipe, such as /dev/stdout
        return
    if not path.parent.is_dir():
        raise InputError(f"{path}: its folder {path.parent} does not exist; make it first")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise InputError(f"{path}: its folder {path.parent} is not writable: {error.strerror or error}") from None


def save_png(
    path: str | os.PathLike[str],
    image: np.ndarray | Image.Image,
    parameters: Parameters | str | None = None,
    *,
    level: int = 6,
) -> None:
    """Write a picture as PNG, atomically: a failure leaves neither a partial nor a temporary file.

    Parameters
    ----------
    path
        The file; an existing one is replaced.
    image
        A PIL image, or uint8 (h, w, 3).
    parameters
        How the picture was made; None leaves the text out.
    level
        Compression level, 1 (takes a third of the time) to 9.

    Raises
    ------
    InputError
        The file cannot be written: folder missing, not allowed, disk full.
    """
    path = Path(path)
    check_output(path)
    picture = image if isinstance(image, Image.Image) else Image.fromarray(np.ascontiguousarray(image))
    info = PngInfo()
    if parameters is not None:
        text = parameters if isinstance(parameters, str) else format_parameters(parameters)
        info.add_text(KEYWORD, text.encode("utf-8", "replace").decode())  # a lone surrogate cannot be encoded
    try:
        if path.exists() and not path.is_file():  # a device or a pipe must not be replaced
            with path.open("wb") as file:
                picture.save(file, "PNG", pnginfo=info, compress_level=level)
            return
        with unfinished(path, Path.unlink, replace=True) as temporary, temporary.open("xb") as file:
            picture.save(file, "PNG", pnginfo=info, compress_level=level)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None


def read_parameters(path: str | os.PathLike[str]) -> str | None:
    """Read the text that says how a picture was made, or None if it has none.

    It is in a PNG's ``parameters`` chunk, or in the EXIF UserComment of a JPEG, WebP, AVIF or PNG file.

    Raises
    ------
    InputError
        The file is missing or not a readable picture.
    """
    try:
        with Image.open(path) as image:
            return _find_text(image)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be read as a picture: {error}") from None


def _find_text(image: Image.Image) -> str | None:
    if KEYWORD not in image.info and image.format == "PNG":
        image.load()  # text may come after the pixels
    text = image.info.get(KEYWORD)
    if isinstance(text, str):
        return text
    try:
        comment = image.getexif().get_ifd(EXIF_IFD).get(USER_COMMENT)
    except Exception:  # Pillow raises many kinds of errors on damaged EXIF data
        comment = None
    if comment:
        return (_decode_comment(comment) if isinstance(comment, bytes) else str(comment)) or None
    found = XMP.search(image.info.get("xmp") or b"")
    return html.unescape(found[1].decode("utf-8", "replace")) if found else None


def _decode_comment(comment: bytes) -> str:
    """Read an EXIF UserComment: eight bytes that name the encoding, then the text.

    ``UNICODE`` is UTF-16 of either byte order; the web UI (piexif) writes the most significant byte first. The order is
    told from the zero bytes: the keys of the settings are ASCII, whatever the prompt is.
    """
    code, data = comment[:8], comment[8:]
    if code != b"UNICODE\0":
        known = code in (b"ASCII\0\0\0", bytes(8))
        return (data if known else comment).decode("utf-8", "replace").rstrip("\0")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", "replace")
    first, second = data[::2].count(0), data[1::2].count(0)
    encoding = "utf-16-be" if first > second else "utf-16-le" if second else "utf-8"
    return data.decode(encoding, "replace").rstrip("\0")
