"""Pictures of things as they should be, in NumPy and Pillow: what `judge.py` compares with.

Pictures are float32 ``(SIZE, SIZE, 4)`` in 0 to 1, RGB premultiplied, and alpha.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from .art import SIZE, STYLES, Art
from .backdrops import scene_pictures, shape_pictures
from .captions import COLOURS, SCENES, SHAPES, TINTS
from .held_out import Thing
from .world import HALF_BELOW, LUMA


@dataclass(frozen=True)
class Placed:
    """A thing in a picture: its side and centre as shares of the picture's side."""

    thing: Thing
    size: float
    x: float
    y: float


class References:
    """Makes the picture of any thing, and pictures composed of them.

    Parameters
    ----------
    art : Art
        The concepts.
    """

    def __init__(self, art: Art):
        self.art = art
        self._index = {concept.label: index for index, concept in enumerate(art.concepts)}
        self._shapes = shape_pictures()
        self._layer = functools.lru_cache(maxsize=16)(self.picture)

    @functools.cached_property
    def scenes(self) -> dict[str, np.ndarray]:
        """All variants of each scene: uint8 ``(variants, 3, SIZE, SIZE)``."""
        return dict(zip(SCENES, scene_pictures(), strict=True))

    def picture(self, thing: Thing, reduced: int = 1) -> np.ndarray:
        """Return the picture of a thing, its sides divided by `reduced`."""
        if thing.is_shape:
            stored = self._shapes[SHAPES.index(thing.label)]
        else:
            stored = self.art.pictures[self._index[thing.label], STYLES.index(thing.style)]
        image = Image.frombytes("RGBa", (SIZE, SIZE), np.ascontiguousarray(stored.transpose(1, 2, 0)).tobytes())
        picture = np.asarray(image.reduce(reduced), np.float32) / 255
        if not thing.colour:
            return picture
        rgb = np.array(COLOURS[thing.colour], np.float32) / 255
        return picture * (*rgb, 1) if thing.is_shape else tint(picture, rgb)

    def rivals(self, thing: Thing) -> tuple[Thing, ...]:
        """Return everything that a thing might be mistaken for, and the thing itself.

        A shape: all shapes in all colours. A tinted thing: all concepts in that tint, and itself in all tints and in
        its own colours. Any other thing: all concepts in all styles.
        """
        labels = self._index
        if thing.is_shape:
            return tuple(Thing(shape, colour, is_shape=True) for shape in SHAPES for colour in COLOURS)
        if thing.colour:
            others = tuple(replace(thing, label=label) for label in labels if label != thing.label)
            return (*others, *(replace(thing, colour=colour) for colour in ("", *TINTS)))
        return tuple(Thing(label, style=style) for label in labels for style in STYLES)

    def paint(self, items: Sequence[Placed], background: np.ndarray) -> np.ndarray:
        """Paint things over a colour ``(3,)`` or a picture ``(SIZE, SIZE, 3)``: float32 ``(SIZE, SIZE, 3)``."""
        canvas = np.broadcast_to(background, (SIZE, SIZE, 3)).astype(np.float32)
        for item in items:
            layer = placed(self._layer(item.thing), item.size, item.x, item.y)
            canvas = canvas * (1 - layer[..., 3:]) + layer[..., :3]
        return canvas


def placed(picture: np.ndarray, size: float, x: float, y: float) -> np.ndarray:
    """Return a picture scaled and moved, on a transparent background."""
    image = _to_image(picture)
    if size < HALF_BELOW:
        image = image.reduce(2)
    scale = image.width / (size * SIZE)  # from pixels of the canvas to pixels of `image`
    left, top = (image.width / 2 - scale * SIZE * centre for centre in (x, y))
    moved = image.transform(
        (SIZE, SIZE), Image.Transform.AFFINE, (scale, 0, left, 0, scale, top), Image.Resampling.BILINEAR
    )
    return np.asarray(moved, np.float32) / 255


def _to_image(picture: np.ndarray) -> Image.Image:
    pixels = np.rint(picture * 255).astype(np.uint8)
    return Image.frombytes("RGBa", picture.shape[1::-1], pixels.tobytes())


def tint(picture: np.ndarray, rgb: np.ndarray) -> np.ndarray:
    """Recolour a picture but keep light and shade: the twin of `compose.tint` for one picture."""
    planes = np.ascontiguousarray(picture.transpose(2, 0, 1))
    alpha = planes[3]
    colour = planes[:3] / np.maximum(alpha, 1e-3)
    high, luma = colour.max(0), np.tensordot(LUMA, colour, 1)
    saturated = np.clip(((high - colour.min(0)) / np.maximum(high, 1e-3) - 0.12) / 0.2, 0, 1)
    light = np.clip((luma - 0.1) / 0.1, 0, 1)
    weight = saturated if (saturated * alpha).sum() > 0.35 * alpha.sum() else light
    usual = (luma * weight * alpha).sum() / max(float((weight * alpha).sum()), 1e-3)
    shade = np.clip(luma / max(float(usual), 0.05), 0.45, 1.35)
    painted = np.maximum(rgb, 0.09)[:, None, None] * shade
    painted = painted + 0.35 * np.maximum(painted - 1, 0).sum(0)
    mixed = colour * (1 - weight) + np.clip(painted, 0, 1) * weight
    return np.stack([*(mixed * alpha), alpha], -1).astype(np.float32)
