"""Procedural drawings: geometric shapes, and the scenes behind things."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable

import numpy as np
from PIL import Image, ImageDraw

from .art import SIZE
from .captions import SCENES, SHAPES
from .world import VARIANTS

Colour = tuple[int, int, int]
FINER = 4  # supersampling: drawn this many times larger, then scaled down


def shape_pictures() -> np.ndarray:
    """Draw every shape in white: uint8 ``(shapes, 4, SIZE, SIZE)``, RGB premultiplied, and alpha."""
    masks = [np.asarray(_shrink(_draw_shape(shape))) for shape in SHAPES]
    return np.stack([np.stack([mask] * 4) for mask in masks])


def scene_pictures() -> np.ndarray:
    """Draw every scene in its variants: uint8 ``(scenes, VARIANTS, 3, SIZE, SIZE)``."""
    scenes = [[_Scene(name, variant).draw() for variant in range(VARIANTS)] for name in SCENES]
    return np.asarray(scenes).transpose(0, 1, 4, 2, 3)


def _shrink(image: Image.Image) -> Image.Image:
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


# ---- shapes


def _draw_shape(shape: str) -> Image.Image:
    side = SIZE * FINER
    image = Image.new("L", (side, side))
    draw = ImageDraw.Draw(image)

    def box(left: float, top: float, right: float, bottom: float) -> tuple[float, ...]:
        return left * side, top * side, right * side, bottom * side

    def polygon(points: Iterable[tuple[float, float]]) -> None:
        draw.polygon([(x * side, y * side) for x, y in points], fill=255)

    match shape:
        case "circle":
            draw.ellipse(box(0.02, 0.02, 0.98, 0.98), fill=255)
        case "oval":
            draw.ellipse(box(0.02, 0.2, 0.98, 0.8), fill=255)
        case "ring":
            draw.ellipse(box(0.02, 0.02, 0.98, 0.98), fill=255)
            draw.ellipse(box(0.22, 0.22, 0.78, 0.78), fill=0)
        case "square":
            draw.rectangle(box(0.07, 0.07, 0.93, 0.93), fill=255)
        case "rectangle":
            draw.rectangle(box(0.02, 0.24, 0.98, 0.76), fill=255)
        case "cross":
            draw.rectangle(box(0.34, 0.04, 0.66, 0.96), fill=255)
            draw.rectangle(box(0.04, 0.34, 0.96, 0.66), fill=255)
        case "triangle":
            polygon([(0.5, 0.05), (0.98, 0.92), (0.02, 0.92)])
        case "diamond":
            polygon([(0.5, 0.02), (0.88, 0.5), (0.5, 0.98), (0.12, 0.5)])
        case "pentagon":
            polygon(_corners(5, -90, 0.49))
        case "hexagon":
            polygon(_corners(6, 0, 0.49))
        case "star":
            outer, inner = _corners(5, -90, 0.5), _corners(5, -54, 0.21)
            polygon(point for pair in zip(outer, inner, strict=True) for point in pair)
        case "heart":
            polygon(_heart())
    return image


def _corners(number: int, first: float, radius: float) -> list[tuple[float, float]]:
    angles = (math.radians(first + 360 * corner / number) for corner in range(number))
    return [(0.5 + radius * math.cos(angle), 0.5 + radius * math.sin(angle)) for angle in angles]


def _heart() -> list[tuple[float, float]]:
    t = np.linspace(0, 2 * np.pi, 400)
    x = 0.5 + 0.464 * np.sin(t) ** 3
    y = 0.47 - 0.029 * (13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return list(zip(x.tolist(), y.tolist(), strict=True))


# ---- scenes

SKY = ((0.0, (90, 175, 245)), (1.0, (200, 232, 255)))
WHITE = (255, 255, 255)


class _Scene:
    """One variant of a scene; positions and sizes are shares of the side."""

    def __init__(self, name: str, variant: int):
        self.name = name
        self.rng = random.Random(f"{name} {variant}")
        self.side = SIZE * FINER

    def draw(self) -> np.ndarray:
        """Return uint8 ``(SIZE, SIZE, 3)``."""
        painter: Callable[[], None] = getattr(self, f"_{self.name}")
        painter()
        return np.asarray(_shrink(self.image))

    # -- brushes

    def _vary(self, colour: Colour, by: float = 8) -> Colour:
        red, green, blue = (int(min(255, max(0, v + self.rng.uniform(-by, by)))) for v in colour)
        return red, green, blue

    def _gradient(self, *stops: tuple[float, Colour], by: float = 8) -> None:
        """Begin with a gradient from top to bottom."""
        positions, colours = zip(*((position, self._vary(colour, by)) for position, colour in stops), strict=True)
        y = np.linspace(0, 1, self.side)
        column = np.stack([np.interp(y, positions, channel) for channel in np.transpose(colours)], axis=1)
        rows = np.repeat(column.round().astype(np.uint8)[:, None], self.side, axis=1)
        self.image = Image.fromarray(rows)
        self.brush = ImageDraw.Draw(self.image)

    def _scaled(self, *values: float) -> tuple[float, ...]:
        return tuple(value * self.side for value in values)

    def _rectangle(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        self.brush.rectangle(self._scaled(left, top, right, bottom), fill=colour)

    def _ellipse(self, x: float, y: float, width: float, height: float, colour: Colour) -> None:
        """Draw an ellipse from its centre and its two radii."""
        self.brush.ellipse(self._scaled(x - width, y - height, x + width, y + height), fill=colour)

    def _polygon(self, *points: tuple[float, float], colour: Colour) -> None:
        self.brush.polygon([self._scaled(*point) for point in points], fill=colour)

    def _hill(self, height: float, swing: float, colour: Colour) -> None:
        """Draw the ground, with a wavy upper edge."""
        phase, frequency = self.rng.uniform(0, 2 * math.pi), self.rng.uniform(0.7, 1.3)
        x = np.linspace(0, 1, 60)
        y = height + swing * np.sin(phase + 2 * math.pi * frequency * x)
        self._polygon((0, 1), *zip(x.tolist(), y.tolist(), strict=True), (1, 1), colour=colour)

    def _clouds(self, number: int, top: float, bottom: float, colour: Colour = WHITE) -> None:
        for _ in range(number):
            x, y = self.rng.uniform(0.05, 0.95), self.rng.uniform(top, bottom)
            width = self.rng.uniform(0.08, 0.14)
            for right, down, size in ((-1, 0.15, 0.7), (0, -0.2, 1), (1, 0.1, 0.75)):
                self._ellipse(x + right * width, y + down * width, size * width, 0.6 * size * width, colour)

    def _dots(self, number: int, top: float, bottom: float, colour: Colour, sizes: tuple[float, float]) -> None:
        for _ in range(number):
            x, y, size = self.rng.uniform(0, 1), self.rng.uniform(top, bottom), self.rng.uniform(*sizes)
            self._ellipse(x, y, size, size, colour)

    # -- one painter for each scene

    def _meadow(self) -> None:
        self._gradient(*SKY)
        self._clouds(2, 0.08, 0.3)
        self._hill(0.62, 0.04, self._vary((120, 195, 85)))
        self._hill(0.74, 0.04, self._vary((88, 170, 65)))

    def _beach(self) -> None:
        self._gradient(*SKY)
        self._rectangle(0, 0.48, 1, 1, self._vary((35, 140, 205)))
        self._hill(0.68, 0.02, self._vary((120, 205, 225)))
        self._hill(0.71, 0.02, self._vary((240, 215, 150)))

    def _night(self) -> None:
        self._gradient((0, (12, 16, 52)), (1, (45, 55, 120)))
        self._dots(45, 0, 0.75, (255, 250, 215), (0.003, 0.008))
        self._hill(0.84, 0.04, self._vary((15, 25, 40)))

    def _space(self) -> None:
        self._gradient((0, (8, 6, 22)), (1, (32, 14, 62)), by=5)
        self._dots(70, 0, 1, (235, 235, 255), (0.003, 0.008))

    def _snow(self) -> None:
        self._gradient((0, (150, 190, 225)), (1, (215, 232, 245)))
        self._hill(0.66, 0.04, self._vary((228, 238, 248), 4))
        self._hill(0.76, 0.04, (250, 252, 255))
        self._dots(50, 0, 0.7, WHITE, (0.006, 0.012))

    def _desert(self) -> None:
        self._gradient((0, (255, 200, 110)), (1, (255, 235, 185)))
        self._hill(0.6, 0.06, self._vary((225, 165, 85)))
        self._hill(0.74, 0.05, self._vary((205, 140, 65)))

    def _underwater(self) -> None:
        self._gradient((0, (60, 175, 225)), (1, (12, 60, 130)))
        self._hill(0.88, 0.03, self._vary((215, 190, 130)))
        self._dots(22, 0.05, 0.85, (170, 225, 245), (0.008, 0.02))

    def _sunset(self) -> None:
        self._gradient((0, (90, 50, 130)), (0.35, (225, 90, 100)), (0.62, (255, 170, 80)), (1, (255, 205, 120)))
        self._ellipse(self.rng.uniform(0.35, 0.65), 0.6, 0.14, 0.14, (255, 235, 150))
        self._rectangle(0, 0.66, 1, 1, self._vary((70, 40, 95)))

    def _forest(self) -> None:
        self._gradient((0, (180, 220, 200)), (1, (120, 180, 120)))
        for ground, colour, number in ((0.62, (70, 140, 90), 9), (0.75, (35, 105, 60), 7)):
            for tree in range(number):
                x, height = (tree + self.rng.uniform(0.2, 0.8)) / number, self.rng.uniform(0.4, 0.58)
                self._rectangle(x - 0.013, ground - 0.05, x + 0.013, ground + 0.05, (95, 65, 40))
                crown = (x - 0.085, ground), (x, ground - height), (x + 0.085, ground)
                self._polygon(*crown, colour=self._vary(colour))
        self._hill(0.74, 0.02, self._vary((75, 130, 60)))

    def _city(self) -> None:
        self._gradient((0, (120, 185, 240)), (1, (225, 238, 250)))
        left, street = 0.0, 0.82
        while left < 1:
            width, height = self.rng.uniform(0.09, 0.17), self.rng.uniform(0.3, 0.66)
            self._rectangle(left, street - height, left + width, street, self._vary((95, 110, 140), 22))
            for x in np.arange(left + 0.02, left + width - 0.02, 0.04):
                for y in np.arange(street + 0.02 - height, street - 0.04, 0.06):
                    lit = self.rng.random() < 0.6
                    self._rectangle(x, y, x + 0.018, y + 0.03, (250, 225, 130) if lit else (70, 85, 110))
            left += width + 0.006
        self._rectangle(0, street, 1, 1, self._vary((85, 88, 95)))

    def _rain(self) -> None:
        self._gradient((0, (90, 105, 125)), (1, (155, 168, 182)))
        self._clouds(4, 0.02, 0.14, self._vary((70, 80, 98)))
        for _ in range(70):
            x, y = self.rng.uniform(0, 1), self.rng.uniform(0.15, 1)
            line = self._scaled(x, y, x - 0.015, y + 0.06)
            self.brush.line(line, fill=(195, 215, 240), width=round(0.008 * self.side))
        self._rectangle(0, 0.86, 1, 1, self._vary((95, 108, 118)))

    def _table(self) -> None:
        self._gradient((0, (245, 232, 208)), (1, (232, 214, 184)))
        self._rectangle(0, 0.68, 1, 1, self._vary((160, 102, 58)))
        self._rectangle(0, 0.68, 1, 0.71, self._vary((185, 125, 75)))
        for y in (0.78, 0.86, 0.94):
            self._rectangle(0, y, 1, y + 0.01, self._vary((138, 85, 46)))

    def _sky(self) -> None:
        self._gradient((0, (70, 155, 240)), (1, (175, 220, 252)))
        self._clouds(6, 0.08, 0.92)

    def _mountains(self) -> None:
        self._gradient(*SKY)
        foot = 0.78
        for mountain in range(3):
            x = 0.15 + 0.35 * mountain + self.rng.uniform(-0.06, 0.06)
            height, width = self.rng.uniform(0.42, 0.58), self.rng.uniform(0.3, 0.4)
            top = (x, foot - height)
            self._polygon((x - width, foot), top, (x + width, foot), colour=self._vary((115, 120, 140)))
            snow = [
                *((x - 0.28 * width, foot - 0.72 * height), top, (x + 0.28 * width, foot - 0.72 * height)),
                *((x + 0.1 * width, foot - 0.66 * height), (x - 0.08 * width, foot - 0.62 * height)),
            ]
            self._polygon(*snow, colour=(245, 248, 252))
        self._hill(0.74, 0.02, self._vary((95, 150, 80)))

    def _rainbow(self) -> None:
        self._gradient(*SKY)
        bands = (230, 55, 55), (250, 150, 40), (250, 225, 60), (75, 180, 85), (60, 120, 230), (140, 75, 190)
        for band, colour in enumerate((*bands, self._vary((160, 210, 250), 3))):
            radius = 0.5 - 0.035 * band
            self._ellipse(0.5, 0.72, radius, radius, colour)
        self._hill(0.72, 0.02, self._vary((105, 185, 80)))
