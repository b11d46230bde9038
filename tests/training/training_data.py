"""Miniature artwork for the tests of ``training``: drawn at once, or as npm packages to make it from."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from training.art import SIZE, STYLES, Art, Concept, Name
from training.packages import Package

# Label, names, synonyms, group, colour. The first three are popular.
THINGS = (
    ("red apple", (Name("apple"), Name("red apple", coloured=True)), (), "food-fruit", (220, 40, 40)),
    ("cat", (Name("cat"),), ("kitty",), "animal-mammal", (240, 180, 60)),
    ("automobile", (Name("car"), Name("automobile")), (), "transport-ground", (60, 90, 200)),
    ("star", (Name("star"),), (), "sky-weather", (250, 220, 50)),
    ("fish", (Name("fish"),), (), "animal-marine", (80, 180, 220)),
    ("grapes", (Name("grapes", uncounted=True),), ("grape",), "food-fruit", (130, 60, 180)),
    ("deciduous tree", (Name("tree"),), (), "plant-other", (60, 160, 80)),
)


def tiny_art() -> Art:
    """Seven things, each a disc of its own colour in one style, a square and a triangle in the others."""
    concepts = tuple(
        Concept(label, names, synonyms, ("thing",), group, popular=index < 3)
        for index, (label, names, synonyms, group, _) in enumerate(THINGS)
    )
    pictures = np.stack([[_draw(style, thing[-1]) for style in range(len(STYLES))] for thing in THINGS])
    return Art(concepts, pictures)


def _draw(style: int, colour: tuple[int, int, int]) -> np.ndarray:
    picture = Image.new("RGBA", (SIZE, SIZE))
    draw = ImageDraw.Draw(picture)
    low, high = SIZE // 8, SIZE - SIZE // 8
    if style == 0:
        draw.ellipse((low, low, high, high), fill=(*colour, 255))
    elif style == 1:
        draw.rectangle((low, low, high, high), fill=(*colour, 255))
    else:
        draw.polygon(((SIZE // 2, low), (high, high), (low, high)), fill=(*colour, 255))
    return np.asarray(picture).transpose(2, 0, 1)


def write_package(folder: Path, name: str, members: dict[str, Any], licence: str = "MIT") -> Package:
    """Write JSON files into a package as ``npm pack`` would download it."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        for member, content in {"package.json": {"name": name, "license": licence}, **members}.items():
            text = json.dumps(content).encode()
            entry = tarfile.TarInfo(f"package/{member}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text))
    integrity = "sha512-" + base64.b64encode(hashlib.sha512(data.getvalue()).digest()).decode()
    package = Package(name, "1.0.0", "MIT", "nobody", "tests", integrity)
    (folder / package.file_name).write_bytes(data.getvalue())
    return package
