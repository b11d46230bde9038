"""A judge of pictures: does a picture show what its prompt asks for, and how well is it drawn?

On a plain background
    Its colour is the median of the border, called by the nearest colour name (CIE Lab). What differs from it is cut
    into connected pieces; how far apart the parts of one thing may be is not known, nor how much of a halo belongs to
    it, so that several limits are tried, and the reading with the fewest faults counts. Each piece, scaled to a square,
    is compared (RMS of pixels) with all that it might be taken for (`References.rivals`), drawn on the same colour: the
    nearest says what it is, if it is not too far. Number, order and places follow from the boxes of the pieces. Things
    that touch each other are taken for one.

In a scene
    The scene is the one whose border is nearest among all variants of all scenes. The thing is the one that, drawn
    over that variant where training draws things, makes the nearest picture; one of the rivals is no thing at all.
    A thing elsewhere is not recognised.

Passing says that the picture is nearest to the right artwork, not that it is beautiful. Two numbers tell how clean it
is, both on plain backgrounds only:

fidelity
    PSNR in dB of each thing, in its box, to the artwork drawn in the same place, if the picture passes.
specks
    The share of the background that is off its colour by more than 8% of the range in some channel.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from . import segments as seg
from .art import SIZE, STYLES
from .captions import COLOURS, SCENES
from .held_out import Prompt, Thing
from .references import Placed, References, placed
from .world import STEP

OUTSTANDING = (seg.STANDS_OUT, 0.16, 0.3)  # of the range: things with a halo touch if all that is not background counts
UNLIKE = 0.5  # squared distance: of the artwork from plain background; good pictures are below 0.4, most below 0.15
RADII = (0, 1, 3, 6, 12)  # pixels, half of the largest distance between parts of one thing
SMALL_BELOW, BIG_ABOVE = 0.55, 0.88  # sides of things, as shares of the picture's
COARSE = 4  # pixels of a scene that are compared as one
RING = 4  # coarse pixels, width of a scene's border
IN_SCENES = tuple(itertools.product((0.56, 0.62, 0.68), (0.5,), (0.5, 0.54, 0.58)))  # sizes, x, y tried
BEST_FIDELITY = 60.0  # dB: of a thing that is the artwork itself


@dataclass(frozen=True)
class Verdict:
    """What the judge found; the picture passes if there are no faults."""

    faults: tuple[str, ...] = ()
    fidelity: float | None = None
    specks: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the picture shows what it should."""
        return not self.faults


class Judge:
    """Judges pictures of the world that `references` draws.

    Parameters
    ----------
    references : References
        Draws things as they should be.
    """

    def __init__(self, references: References):
        self.references = references
        self._lab = {name: _to_lab(np.array(rgb) / 255) for name, rgb in COLOURS.items()}
        self._reference = functools.cache(self._make_reference)
        self._crops = functools.lru_cache(maxsize=8)(self._all_crops)

    def __call__(self, picture: np.ndarray, prompt: Prompt) -> Verdict:
        """Judge a picture ``(SIZE, SIZE, 3)`` in 0 to 1."""
        if prompt.background in SCENES:
            return self._in_scene(picture, prompt)
        return self._on_colour(picture, prompt)

    # ---- on a plain background

    def _on_colour(self, picture: np.ndarray, prompt: Prompt) -> Verdict:
        background = seg.background_colour(picture)
        name = self._colour_name(background)
        best = self._best_reading(picture, background, prompt)
        faults = best.faults
        if prompt.background and prompt.background != name:
            faults = (f"the background is {name}", *faults)
        specks = seg.share_of_specks(seg.outstanding(picture, background), best.found)
        if faults:
            return Verdict(faults, specks=specks)
        pairs = zip(best.found, best.things, strict=True)
        fidelity = np.mean([self._fidelity(picture, segment, thing, background) for segment, thing in pairs])
        return Verdict(fidelity=float(fidelity), specks=specks)

    def _best_reading(self, picture: np.ndarray, background: np.ndarray, prompt: Prompt) -> Reading:
        readings, name = [], self._colour_name(background)
        for least, radius in itertools.product(OUTSTANDING, RADII):
            found = seg.segments(seg.outstanding(picture, background, least), radius)
            reading = self._read(picture, found, name, prompt)
            if not reading.faults:
                return reading
            readings.append(reading)
        return min(readings, key=lambda reading: (reading.is_miscounted, len(reading.faults)))

    def _read(self, picture: np.ndarray, found: list[seg.Segment], background: str, prompt: Prompt) -> Reading:
        """Compare the pieces found with the expected things."""
        if len(found) != len(prompt.things):
            return Reading(found, (), (_number(len(found)),), is_miscounted=True)
        axis = {"across": 0, "down": 1}.get(prompt.order)
        if axis is not None:
            found = sorted(found, key=lambda segment: segment.centre[axis])
        rivals = self.references.rivals(prompt.things[0])  # all things of a prompt have one kind
        nearest = [self._nearest(picture, segment, rivals, background) for segment in found]
        things = tuple(thing for thing, _ in nearest)
        asked, seen = ([_name(thing, prompt) for thing in some] for some in (prompt.things, things))
        faults = [] if (seen == asked if prompt.order else Counter(seen) == Counter(asked)) else [_list(things)]
        faults += [f"unlike the nearest, {thing}" for thing, distance in nearest if distance > UNLIKE]
        if axis is not None and not _is_along(found, axis):
            faults.append(f"not {prompt.order}")
        if prompt.place is not None or prompt.size:
            faults += _misplaced(self.locate(found[0], prompt.things[0], background), prompt)
        return Reading(found, things, tuple(faults))

    def _nearest(
        self, picture: np.ndarray, segment: seg.Segment, rivals: Sequence[Thing], background: str
    ) -> tuple[Thing, float]:
        """Return what a piece is nearest to, and how far it is: 1 for plain background in its place."""
        rgb = seg.background_colour(picture)
        cropped = seg.crop(seg.isolated(picture, segment, rgb), segment, rgb).astype(np.float32)
        crops = self._crops(rivals, background)
        distances = np.square(crops - cropped).mean((1, 2, 3))
        nearest = int(distances.argmin())
        without = np.square(crops[nearest] - np.array(COLOURS[background])).mean()
        return rivals[nearest], float(distances[nearest] / max(without, 1.0))

    def _all_crops(self, rivals: tuple[Thing, ...], background: str) -> np.ndarray:
        return np.stack([self._reference(thing, background)[0] for thing in rivals]).astype(np.float32)

    def _make_reference(self, thing: Thing, background: str) -> tuple[np.ndarray, seg.Segment]:
        """Return a thing's crop, and the box of its visible part on a colour when it fills the picture."""
        rgb = np.array(COLOURS[background], np.float32) / 255
        layer = self.references.picture(thing, reduced=2)
        picture = rgb * (1 - layer[..., 3:]) + layer[..., :3]
        mask = seg.outstanding(picture, rgb)
        segment = seg.Segment.of(mask if mask.any() else ~mask)
        return seg.crop(picture, segment, rgb), segment

    def locate(self, segment: seg.Segment, thing: Thing, background: str) -> Placed:
        """Return where a thing was drawn, from the box of its visible part."""
        _, reference = self._reference(thing, background)
        size = segment.side / reference.side
        x, y = (centre - size * (own - 0.5) for centre, own in zip(segment.centre, reference.centre, strict=True))
        return Placed(thing, size, x, y)

    def _fidelity(self, picture: np.ndarray, segment: seg.Segment, thing: Thing, background: np.ndarray) -> float:
        """Return the PSNR in dB to the artwork, moved and scaled a little until it fits best."""
        alone = seg.isolated(picture, segment, background, seg.AROUND)
        box = np.array([segment.left, segment.top, segment.right, segment.bottom]) * SIZE + np.array([-2, -2, 2, 2])
        left, top, right, bottom = box.clip(0, SIZE).astype(int)
        target = alone[top:bottom, left:right]

        def error(where: tuple[float, float, float]) -> float:
            drawn = self.references.paint([Placed(thing, *where)], background)[top:bottom, left:right]
            return float(np.square(drawn - target).mean())

        start = self.locate(segment, thing, self._colour_name(background))
        best = start.size, start.x, start.y
        for step in (1 / SIZE, 0.5 / SIZE, 0.25 / SIZE):
            while True:
                moved = min((_moved(best, step, move) for move in _MOVES), key=error)
                if error(moved) >= error(best):
                    break
                best = moved
        return float(min(-10 * np.log10(max(error(best), 1e-9)), BEST_FIDELITY))

    def _colour_name(self, rgb: np.ndarray) -> str:
        lab = _to_lab(rgb)
        return min(self._lab, key=lambda name: float(np.square(self._lab[name] - lab).sum()))

    # ---- in a scene

    def _in_scene(self, picture: np.ndarray, prompt: Prompt) -> Verdict:
        coarse = _coarse(picture)
        ring = np.ones(coarse.shape[:2], bool)
        ring[RING:-RING, RING:-RING] = False
        names, scenes = self._scenes
        variant = int(np.square(scenes[:, ring] - coarse[ring]).mean((1, 2)).argmin())
        things, layers = self._layers
        drawn = layers[..., :3] / 255 + scenes[variant] * (1 - layers[..., 3:] / 255)
        thing = things[int(np.square(drawn - coarse).mean((1, 2, 3)).argmin())]
        faults = []
        if names[variant] != prompt.background:
            faults.append(f"the scene is {names[variant]}")
        if thing != prompt.things[0]:
            faults.append(_list([thing]) if thing else _number(0))
        return Verdict(tuple(faults))

    @functools.cached_property
    def _scenes(self) -> tuple[list[str], np.ndarray]:
        names = [name for name, variants in self.references.scenes.items() for _ in variants]
        pictures = (variant for variants in self.references.scenes.values() for variant in variants)
        return names, np.stack([_coarse(picture.transpose(1, 2, 0) / 255) for picture in pictures])

    @functools.cached_property
    def _layers(self) -> tuple[list[Thing | None], np.ndarray]:
        """All things in all places tried, and nothing: coarse float32 ``(n, h, w, 4)`` in 0 to 255."""
        things: list[Thing | None] = [None]
        layers = [np.zeros((SIZE // COARSE, SIZE // COARSE, 4), np.float32)]
        for concept in self.references.art.concepts:
            thing = Thing(concept.label, style=STYLES[0])
            picture = self.references.picture(thing)
            for where in IN_SCENES:
                things.append(thing)
                layers.append(_coarse(placed(picture, *where)) * 255)
        return things, np.stack(layers)


@dataclass(frozen=True)
class Reading:
    """The pieces of a picture, what each is, and what is wrong with that."""

    found: list[seg.Segment]
    things: tuple[Thing, ...]
    faults: tuple[str, ...] = field(default=())
    is_miscounted: bool = False


_MOVES = tuple(itertools.product((-2, 0, 2), (-1, 0, 1), (-1, 0, 1)))  # of size, x and y


def _moved(where: tuple[float, float, float], step: float, move: tuple[int, int, int]) -> tuple[float, float, float]:
    size, x, y = (value + step * steps for value, steps in zip(where, move, strict=True))
    return size, x, y


def _name(thing: Thing, prompt: Prompt) -> tuple[str, ...]:
    """Return what has to be correct about a thing."""
    return (thing.label, thing.colour, thing.style if prompt.style_asked else "")


def _list(things: Sequence[Thing]) -> str:
    counted = Counter(map(str, things))
    return "found " + ", ".join(f"{count} x {name}" if count > 1 else name for name, count in counted.items())


def _number(things: int) -> str:
    return "1 thing" if things == 1 else f"{things or 'no'} things"


def _is_along(found: Sequence[seg.Segment], axis: int) -> bool:
    """Return whether each thing is farther from the one before along this axis than along the other."""
    moves = (np.subtract(second.centre, first.centre) for first, second in itertools.pairwise(found))
    return all(move[axis] > abs(move[1 - axis]) for move in moves)


def _misplaced(where: Placed, prompt: Prompt) -> list[str]:
    faults = []
    steps = tuple(int(np.clip(np.rint((centre - 0.5) / STEP), -1, 1)) for centre in (where.x, where.y))
    if prompt.place is not None and steps != prompt.place:
        faults.append(f"the centre is at {where.x:.2f}, {where.y:.2f}")
    if (prompt.size == "small" and where.size > SMALL_BELOW) or (prompt.size == "big" and where.size < BIG_ABOVE):
        faults.append(f"the size is {where.size:.2f}")
    return faults


def _coarse(picture: np.ndarray) -> np.ndarray:
    """Return means of squares of pixels."""
    h, w, c = picture.shape
    means = picture.reshape(h // COARSE, COARSE, w // COARSE, COARSE, c).mean((1, 3))
    return means.astype(np.float32)


def _to_lab(rgb: np.ndarray) -> np.ndarray:
    """Return an sRGB colour in CIE Lab (D65)."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = linear @ np.array([[0.4339, 0.2126, 0.0178], [0.3762, 0.7152, 0.1095], [0.1899, 0.0722, 0.8727]])
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])
