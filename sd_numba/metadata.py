"""Saving pictures, with the text that says how they were made.

The text is the one that AUTOMATIC1111's web UI writes and many tools read: the prompt, a line ``Negative prompt: ...``
and a line of ``Key: value`` pairs, in the PNG chunk ``parameters`` (tEXt, or iTXt where Latin-1 does not suffice).
What the pairs mean is in :mod:`sd_numba.infotext`.
"""

from __future__ import annotations

import contextlib
import hashlib
import html
import json
import os
import re
import stat
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from kernels.jit import user_cache

from .errors import InputError
from .samplers import DISPLAY_NAMES
from .storage import digest_file, unfinished

KEYWORD = "parameters"
PROMPT_KEY, NEGATIVE_KEY = "Prompt", "Negative prompt"
NEGATIVE = f"{NEGATIVE_KEY}:"
# One pair of the last line; a value with a comma, colon or newline is written as a JSON string.
PAIR = re.compile(r'\s*(\w[\w \-/]*):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
END = re.compile(r"\s*(?:,|$)")
AUTOMATIC = "Automatic"  # the web UI leaves this schedule type out
# What the web UI takes since version 1.9 where no schedule type is named; Uniform for all other samplers.
AUTOMATIC_TYPES = {"DPM++ 2M": "Karras", "DPM++ 2M SDE": "Exponential"}
MIN_PAIRS = 3  # with fewer, the last line belongs to the prompt
EXIF_IFD, USER_COMMENT = 0x8769, 0x9286
# stable-diffusion.cpp's place in a WebP file
XMP = re.compile(rb"<sdcpp:parameters>(.*?)</sdcpp:parameters>", re.DOTALL)


@dataclass(frozen=True)
class Parameters:
    """How a picture was made.

    ``settings`` keeps its order. Its usual keys are Steps, Sampler, Schedule type, CFG scale, Seed, Size (as
    ``512x512``), Model hash, Model, Denoising strength, Clip skip, RNG and Version.
    """

    prompt: str
    negative_prompt: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


def sampler_title(name: str) -> dict[str, str]:
    """A sampler of ours as the web UI calls it.

    Examples
    --------
    >>> sampler_title("dpm++2m-karras")
    {'Sampler': 'DPM++ 2M', 'Schedule type': 'Karras'}
    >>> sampler_title("dpm++2m")
    {'Sampler': 'DPM++ 2M', 'Schedule type': 'Uniform'}
    >>> sampler_title("euler-a")
    {'Sampler': 'Euler a'}
    """
    sampler, schedule = DISPLAY_NAMES.get(name, (name, AUTOMATIC))
    if schedule == AUTOMATIC and sampler in AUTOMATIC_TYPES:
        schedule = "Uniform"
    return {"Sampler": sampler} | ({} if schedule == AUTOMATIC else {"Schedule type": schedule})


def format_parameters(parameters: Parameters) -> str:
    """The text for the PNG's ``parameters`` chunk.

    A prompt that would be read back as another one (because it starts with a blank, or a line of it with ``Negative
    prompt:``) is repeated among the settings, under ``Prompt`` and ``Negative prompt``: there the web UI, too, finds
    it, and takes it instead.
    """
    text = _join(parameters, parameters.settings)
    if parameters.settings:
        read = parse_parameters(text)
        if (read.prompt, read.negative_prompt) != (parameters.prompt, parameters.negative_prompt):
            exact = {PROMPT_KEY: parameters.prompt, NEGATIVE_KEY: parameters.negative_prompt}
            text = _join(parameters, {**parameters.settings, **exact})
    return text


def _join(parameters: Parameters, settings: Mapping[str, Any]) -> str:
    lines = [parameters.prompt]
    if parameters.negative_prompt:
        lines.append(f"{NEGATIVE} {parameters.negative_prompt}")
    lines.append(", ".join(f"{key}: {_quoted(str(value))}" for key, value in settings.items()))
    return "\n".join(lines)


def _quoted(value: str) -> str:
    plain = not re.search(r'[,:\n"]', value) and value == value.strip()
    return value if plain else json.dumps(value, ensure_ascii=False)


def _unquoted(value: str) -> str:
    try:
        return str(json.loads(value)) if value.startswith('"') else value.strip()
    except ValueError:
        return value


def parse_parameters(text: str) -> Parameters:
    """Take such a text apart again, whichever program wrote it.

    What cannot be told apart: a prompt whose last line looks like settings, in a text without settings; and, of other
    programs, a prompt that has a line beginning with ``Negative prompt:``.
    """
    lines = [line.removesuffix("\r") for line in text.strip().split("\n")]
    lines, settings = _split_settings(lines)
    prompt, negative = lines, []
    for index, line in enumerate(lines):
        if line.startswith(NEGATIVE):
            first = line.removeprefix(NEGATIVE).removeprefix(" ")
            prompt, negative = lines[:index], [first, *lines[index + 1 :]]
            break
    texts = (settings.pop(PROMPT_KEY, "\n".join(prompt)), settings.pop(NEGATIVE_KEY, "\n".join(negative)))
    return Parameters(*texts, settings)


def _split_settings(lines: list[str]) -> tuple[list[str], dict[str, str]]:
    """Take the line of settings away, the last one; some extensions of the web UI add lines behind it."""
    for index in range(len(lines) - 1, -1, -1):
        last = index == len(lines) - 1
        if lines[index].startswith(NEGATIVE) or not (last or lines[index].startswith("Steps: ")):
            continue
        settings = _parse_pairs(lines[index])
        if len(settings) >= MIN_PAIRS:
            return lines[:index], settings
    return lines, {}


def _parse_pairs(line: str) -> dict[str, str]:
    # Not PAIR.findall: that takes quadratic time on a long line without pairs.
    settings = {}
    position = 0
    while position < len(line):
        match = PAIR.match(line, position)
        if match:
            value, position = _parse_json(line, match.start(2)) or (_unquoted(match[2]), match.end())
            settings[match[1]] = value
        else:
            position = line.find(",", position) + 1 or len(line)
    return settings


def _parse_json(line: str, start: int) -> tuple[str, int] | None:
    """Give the text of an object or a list that begins here, and where the next pair does; None: there is none."""
    if line[start : start + 1] not in ("{", "["):
        return None
    try:
        _, stop = json.JSONDecoder().raw_decode(line, start)
    except (ValueError, RecursionError):
        return None
    end = END.match(line, stop)
    return (line[start:stop], end.end()) if end else None


def check_output(path: str | os.PathLike[str]) -> None:
    """Find out before hours of work whether a picture can be saved under this name.

    Raises
    ------
    InputError
        The folder is missing or not writable, the path is a folder, or its ending is another format's.
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
    """Write a picture as PNG, whole or not at all: a failure leaves neither half a file nor a temporary one.

    Parameters
    ----------
    path
        The file; one that is there is replaced.
    image
        A PIL image, or uint8 (h, w, 3).
    parameters
        How the picture was made; None leaves the text out.
    level
        Of compression, 1 (in a third of the time) to 9.

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
        info.add_text(KEYWORD, text.encode("utf-8", "replace").decode())  # a half of a pair of surrogates has no code
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
        The file is missing or no readable picture.
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
    except Exception:  # damaged EXIF: whatever Pillow runs into
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


def files_hash(files: Sequence[Path]) -> str:
    """First ten hexadecimal digits of the SHA-256 over a model's files: pass those of the UNet.

    Hashing takes seconds for gigabytes, so the result is remembered in ``$XDG_CACHE_HOME/sd-numba/hashes.json``
    (``~/.cache`` by default) under the files' paths, sizes and times; where that cannot be written, it is not.
    """
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(repr(stats).encode()).hexdigest()
    cache = (user_cache() or Path(os.devnull)) / "sd-numba" / "hashes.json"
    try:
        known = dict(json.loads(cache.read_text()))
    except (OSError, ValueError, TypeError):
        known = {}
    if isinstance(known.get(key), str):
        return known[key]
    known[key] = _sha256(files)[:10]
    with contextlib.suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        temporary = cache.with_name(f"{cache.name}.{os.getpid()}")
        temporary.write_text(json.dumps(known))
        os.replace(temporary, cache)
    return known[key]


def _sha256(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest_file(digest, path)
    return digest.hexdigest()
