"""Saving pictures, with the text that says how they were made.

The text is the one that AUTOMATIC1111's web UI writes and many tools read: the prompt, a line ``Negative prompt: ...``
and a line of ``Key: value`` pairs, in the PNG chunk ``parameters`` (tEXt, or iTXt where Latin-1 does not suffice).
"""

from __future__ import annotations

import contextlib
import hashlib
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
NEGATIVE = "Negative prompt: "
# One pair of the last line; a value with a comma, colon or newline is written as a JSON string.
PAIR = re.compile(r'\s*(\w[\w \-/]*):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
AUTOMATIC = "Automatic"  # the web UI leaves this schedule type out
MIN_PAIRS = 3  # with fewer, the last line belongs to the prompt


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
    """
    sampler, schedule = DISPLAY_NAMES.get(name, (name, AUTOMATIC))
    return {"Sampler": sampler} | ({} if schedule == AUTOMATIC else {"Schedule type": schedule})


def format_parameters(parameters: Parameters) -> str:
    """The text for the PNG's ``parameters`` chunk."""
    lines = [parameters.prompt]
    if parameters.negative_prompt:
        lines.append(NEGATIVE + parameters.negative_prompt)
    lines.append(", ".join(f"{key}: {_quoted(str(value))}" for key, value in parameters.settings.items()))
    return "\n".join(lines)


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:\n"]', value) else value


def _unquoted(value: str) -> str:
    try:
        return str(json.loads(value)) if value.startswith('"') else value.strip()
    except ValueError:
        return value


def parse_parameters(text: str) -> Parameters:
    """Take such a text apart again, whichever program wrote it."""
    lines = text.strip().split("\n")
    settings = _parse_pairs(lines[-1])
    if len(settings) < MIN_PAIRS:
        settings = {}
    else:
        lines.pop()
    prompt, negative = lines, []
    for index, line in enumerate(lines):
        if line.startswith(NEGATIVE.strip()):
            prompt, negative = lines[:index], [line[len(NEGATIVE) :], *lines[index + 1 :]]
            break
    return Parameters("\n".join(prompt), "\n".join(negative), settings)


def _parse_pairs(line: str) -> dict[str, str]:
    # Not PAIR.findall: that takes quadratic time on a long line without pairs.
    settings = {}
    position = 0
    while position < len(line):
        match = PAIR.match(line, position)
        if match:
            settings[match[1]] = _unquoted(match[2])
            position = match.end()
        else:
            position = line.find(",", position) + 1 or len(line)
    return settings


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
    path: str | os.PathLike[str], image: np.ndarray | Image.Image, parameters: Parameters | str | None = None
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
        info.add_text(KEYWORD, text)
    try:
        if path.exists() and not path.is_file():  # a device or a pipe must not be replaced
            with path.open("wb") as file:
                picture.save(file, "PNG", pnginfo=info)
            return
        with unfinished(path, Path.unlink, replace=True) as temporary, temporary.open("xb") as file:
            picture.save(file, "PNG", pnginfo=info)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None


def read_parameters(path: str | os.PathLike[str]) -> str | None:
    """The ``parameters`` text of a PNG file, or None if it has none.

    Raises
    ------
    InputError
        The file is missing or no readable picture.
    """
    try:
        with Image.open(path) as image:
            text = image.info.get(KEYWORD)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"{path}: cannot be read as a picture: {error}") from None
    return None if text is None else str(text)


def model_hash(files: Sequence[Path]) -> str:
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
