"""The world of the model: random captions, each with the composition that it describes.

A composition is a background and up to MAX_ITEMS pictures, painted one over the other. Some compositions are held out,
never to be trained on, so that `evaluate.py` can ask for them.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from . import captions as words
from .art import STYLES, Concept, Name

MAX_ITEMS = 6
VARIANTS = 24  # of each scene
FULL, IN_SCENE, PART, SMALL, BIG = 0.8, 0.62, 0.44, 0.36, 0.97  # sides of pictures, as a share of the whole picture's
STEP = 0.26  # from the centre to where a part is
STYLE_WEIGHTS = (0.6, 0.2, 0.2)
HALF_BELOW = 0.58  # smaller pictures are scaled from a half-size copy, so that they do not flicker
LUMA = (0.3, 0.59, 0.11)  # weights of red, green and blue, for tints
FLOATING = {"space", "underwater", "sky", "night"}  # scenes without ground

ARRANGEMENTS = {
    2: ((0.26, 0.5), (0.74, 0.5)),
    3: ((0.5, 0.27), (0.26, 0.73), (0.74, 0.73)),
    4: ((0.26, 0.27), (0.74, 0.27), (0.26, 0.73), (0.74, 0.73)),
    5: ((0.2, 0.22), (0.8, 0.22), (0.5, 0.5), (0.2, 0.78), (0.8, 0.78)),
    6: tuple((x, y) for y in (0.28, 0.72) for x in (0.18, 0.5, 0.82)),
}
COUNT_SIZES = {2: PART, 3: PART, 4: PART, 5: 0.33, 6: 0.31}

ROOMY = ("circle", "square", "oval", "diamond", "star", "heart", "hexagon")
CAN_BE_TINTED = (  # beginnings of groups
    *("animal", "plant", "food-fruit", "food-vegetable", "transport", "clothing", "place-building", "musical"),
    *("household", "computer", "phone", "tool", "sport", "game", "dishware", "book"),
)
MOUNTS = {"bicycle", "motorcycle", "motor scooter", "horse", "elephant", "camel", "skateboard", "racing car", "rocket"}
RIDERS = ("animal-mammal", "animal-bird", "animal-reptile", "animal-amphibian", "person", "face-costume", "monkey")
HATS = {"top hat", "crown", "woman’s hat", "graduation cap"}
CAN_BE_HELD = (
    *("food-fruit", "food-vegetable", "food-sweet", "food-prepared", "drink", "plant-flower", "musical-instrument"),
    *("tool", "sport", "event"),
)

# By the labels of concepts.
HELD_OUT_PAIRS = {
    frozenset(pair)
    for pair in (
        *(("fox", "banana"), ("robot", "pizza"), ("unicorn", "castle"), ("penguin", "guitar")),
        *(("red apple", "banana"), ("cat", "bicycle"), ("bear", "balloon"), ("dog", "rocket"), ("owl", "books")),
    )
}
HELD_OUT_SCENES = {
    *(("rocket", "underwater"), ("panda", "space"), ("penguin", "desert"), ("fox", "snow"), ("snowman", "beach")),
    *(("pizza", "table"), ("castle", "sunset"), ("unicorn", "rainbow"), ("whale", "sky"), ("robot", "forest")),
}
HELD_OUT_TINTS = {
    *(("elephant", "purple"), ("cat", "blue"), ("automobile", "green"), ("rabbit", "pink")),
    *(("banana", "red"), ("frog", "orange"), ("house", "turquoise"), ("dog", "green")),
}
HELD_OUT_BACKGROUNDS = {
    *(("owl", "purple"), ("automobile", "yellow"), ("panda", "red"), ("guitar", "green")),
    *(("strawberry", "blue"), ("cat", "orange"), ("pizza", "pink"), ("rocket", "turquoise")),
}
HELD_OUT_COUNTS = {("cat", 3), ("red apple", 2), ("star", 4), ("fish", 5), ("duck", 6), ("mushroom", 3)}


@dataclass(frozen=True, slots=True)
class Item:
    """A picture in a composition.

    Attributes
    ----------
    picture : int
        ``concept * len(STYLES) + style``; the shapes of `backdrops.py` come after all concepts.
    size, x, y : float
        Side and centre, as shares of the whole picture's side.
    paint : str
        "" as it is, "tint" keeps light and shade, "fill" is flat.
    rgb : tuple of float
        The colour to paint with, 0 to 255.
    """

    picture: int
    size: float
    x: float
    y: float
    paint: str = ""
    rgb: tuple[float, float, float] = (0, 0, 0)


@dataclass(frozen=True, slots=True)
class Background:
    """A vertical gradient, or if it is not -1 a scene (``scene * VARIANTS + variant``); `name` is what it shows."""

    top: tuple[float, float, float] = (255, 255, 255)
    bottom: tuple[float, float, float] = (255, 255, 255)
    scene: int = -1
    name: str = "white"


@dataclass(frozen=True, slots=True)
class Composition:
    """A caption, and the composition that it describes, in one of `STYLES`."""

    caption: str
    background: Background
    items: tuple[Item, ...] = ()
    style: int = 0


class UnsuitableError(Exception):
    """The random choices do not go together: draw again."""


class World:
    """Draws random compositions.

    Parameters
    ----------
    concepts
        What there is to draw.
    rng
        Its state says what comes next.
    """

    def __init__(self, concepts: Sequence[Concept], rng: random.Random):
        self.concepts, self.rng = concepts, rng
        self._index = {concept.label: index for index, concept in enumerate(concepts)}
        self._weights = list(itertools.accumulate(_weight(concept) for concept in concepts))
        self._mounts = [c for c in concepts if c.label in MOUNTS]
        self._riders = [c for c in concepts if c.group.startswith(RIDERS)]
        self._hats = [c for c in concepts if c.label in HATS]
        self._held = [c for c in concepts if c.group.startswith(CAN_BE_HELD)]
        self._kinds = (
            *((self._one, 0.47), (self._several, 0.12), (self._two, 0.19), (self._three, 0.02)),
            *((self._together, 0.035), (self._shape, 0.06), (self._shapes, 0.075), (self._on_shape, 0.015)),
            (self._nothing, 0.015),
        )

    def compose(self) -> Composition:
        """Return the next composition."""
        kinds, weights = zip(*self._kinds, strict=True)
        while True:
            try:
                composition = self.rng.choices(kinds, weights)[0]()
            except UnsuitableError:
                continue
            return replace(composition, caption=self._embellish(composition.caption, composition.style))

    # ---- contents

    def _one(self) -> Composition:
        concept, style = self._concept(), self._style()
        tint = self._tint(concept, 0.25)
        background, phrase = self._background([concept], tint, (0.36, 0.42, 0.18))
        place = ""
        size_words: tuple[str, ...] = ()
        ground = 0.0 if background.scene < 0 or background.name in FLOATING else 1.0
        match self._lot((0.72, 0.12, 0.16)):
            case 0:
                size, x, y = (FULL, 0.5, 0.5) if background.scene < 0 else (IN_SCENE, 0.5, 0.5 + 0.08 * ground)
                if not tint and concept.keywords and self._chance(0.05):
                    some = self.rng.sample(concept.keywords, min(len(concept.keywords), self.rng.randint(1, 3)))
                    caption = ", ".join([concept.names[0].text, *some]) + ("," + phrase if phrase else "")
                    return Composition(caption, background, (self._item(concept, style, tint, size, x, y),), style)
            case 1:
                big = self._chance(0.4)
                size, x, y = (BIG, 0.5, 0.5) if big else (SMALL, 0.5, 0.5 + 0.18 * ground)
                size_words = words.BIG if big else words.SMALL
            case _:
                right, down = self.rng.choice(list(words.PLACES))
                size, x, y = PART, 0.5 + STEP * right, 0.5 + STEP * down
                size_words = words.SMALL if self._chance(0.3) else ()
                place = self.rng.choice((" ", ", ")) + self.rng.choice(words.PLACES[right, down])
        noun = self._noun_phrase(concept, tint, size_words)
        swapped = phrase.startswith(" on ") and self._chance(0.2)
        caption = noun + (phrase + place if swapped else place + phrase)
        return Composition(caption, background, (self._item(concept, style, tint, size, x, y),), style)

    def _several(self) -> Composition:
        concept, style = self._concept(), self._style()
        number = self.rng.choices((2, 3, 4, 5, 6), (0.3, 0.25, 0.2, 0.13, 0.12))[0]
        if (concept.label, number) in HELD_OUT_COUNTS:
            raise UnsuitableError
        tint = self._tint(concept, 0.2)
        background, phrase = self._background([concept], tint, (0.5, 0.4, 0.08))
        name = self._name(concept, tint)
        if name.uncounted:
            raise UnsuitableError
        colour = f"{self._colour_name(tint)} " if tint else ""
        caption = f"{self.rng.choice(words.NUMBERS[number])} {colour}{words.plural(name.text)}{phrase}"
        size = COUNT_SIZES[number]
        items = tuple(self._item(concept, style, tint, size, x, y) for x, y in ARRANGEMENTS[number])
        return Composition(caption, background, items, style)

    def _two(self) -> Composition:
        first, second = self._concept(), self._concept()
        if first is second or {first.label, second.label} in HELD_OUT_PAIRS:
            raise UnsuitableError
        style = self._style()
        tints = self._tint(first, 0.15), self._tint(second, 0.15)
        background, phrase = self._background([first, second], tints[0] or tints[1], (0.5, 0.36, 0.11))
        if background.name in tints:
            raise UnsuitableError
        relation, places = self._relation()
        nouns = self._noun_phrase(first, tints[0], plain=True), self._noun_phrase(second, tints[1], plain=True)
        items = tuple(
            self._item(concept, style, tint, PART, x, y)
            for concept, tint, (x, y) in zip((first, second), tints, places, strict=True)
        )
        return Composition(nouns[0] + relation + nouns[1] + phrase, background, items, style)

    def _three(self) -> Composition:
        concepts = [self._concept() for _ in range(3)]
        if len({concept.label for concept in concepts}) < 3:
            raise UnsuitableError
        style = self._style()
        background, phrase = self._background(concepts, None, (0.6, 0.3, 0.05))
        form = self.rng.choice(("{}, {} and {}", "{} and {} and {}", "{}, {}, {}"))
        caption = form.format(*(self._noun_phrase(concept, plain=True) for concept in concepts)) + phrase
        items = tuple(
            self._item(concept, style, None, 0.32, x, 0.5)
            for concept, x in zip(concepts, (0.17, 0.5, 0.83), strict=True)
        )
        return Composition(caption, background, items, style)

    def _together(self) -> Composition:
        """Draw someone who rides, holds or wears something."""
        kind = self._lot((0.35, 0.4, 0.25))
        fitting = (self._mounts, self._held, self._hats)[kind]
        if not self._riders or not fitting:
            raise UnsuitableError
        who, what = self.rng.choice(self._riders), self.rng.choice(fitting)
        if who is what or {who.label, what.label} in HELD_OUT_PAIRS:
            raise UnsuitableError
        style = self._style()
        background, phrase = self._background([who, what], None, (0.5, 0.3, 0.17))
        if kind == 0:
            verbs, first, second = words.RIDING, (what, 0.6, 0.5, 0.68), (who, 0.52, 0.5, 0.34)
        elif kind == 1:
            verbs, first, second = words.HOLDING, (who, 0.68, 0.42, 0.5), (what, 0.36, 0.79, 0.62)
        else:
            verbs, first, second = words.WEARING, (who, 0.64, 0.5, 0.62), (what, 0.36, 0.5, 0.2)
        nouns = self._noun_phrase(who, plain=True), self._noun_phrase(what, plain=True)
        items = tuple(self._item(concept, style, None, size, x, y) for concept, size, x, y in (first, second))
        return Composition(nouns[0] + self.rng.choice(verbs) + nouns[1] + phrase, background, items, style)

    def _shape(self) -> Composition:
        """One geometric shape, or several alike."""
        background, phrase = self._background([], None, (0.5, 0.42, 0.02))
        shape, colour = self._coloured_shape(background)
        noun = self._shape_noun(shape, colour)
        if self._chance(0.25):
            number = self.rng.choice((2, 3, 4, 5, 6))
            caption = f"{self.rng.choice(words.NUMBERS[number])} {words.plural(noun)}{phrase}"
            size = COUNT_SIZES[number] - 0.04
            items = tuple(self._shape_item(shape, colour, size, x, y) for x, y in ARRANGEMENTS[number])
            return Composition(caption, background, items)
        size, x, y, place = 0.7, 0.5, 0.5, ""
        match self._lot((0.6, 0.15, 0.1, 0.15)):
            case 1:
                size, noun = 0.34, f"{self.rng.choice(words.SMALL)} {noun}"
            case 2:
                size, noun = 0.95, f"{self.rng.choice(words.BIG)} {noun}"
            case 3:
                right, down = self.rng.choice(list(words.PLACES))
                size, x, y = 0.4, 0.5 + STEP * right, 0.5 + STEP * down
                place = f" {self.rng.choice(words.PLACES[right, down])}"
        noun = words.with_article(noun) if self._chance(0.8) else noun
        return Composition(noun + place + phrase, background, (self._shape_item(shape, colour, size, x, y),))

    def _shapes(self) -> Composition:
        """Two geometric shapes."""
        background, phrase = self._background([], None, (0.5, 0.42, 0.02))
        first, second = self._coloured_shape(background), self._coloured_shape(background)
        if first == second:
            raise UnsuitableError
        nouns = [words.with_article(self._shape_noun(shape, colour)) for shape, colour in (first, second)]
        if self._chance(0.14):
            if first[1] == second[1] or words.SHAPES[second[0]] in ("ring", "cross"):
                raise UnsuitableError
            relation = self.rng.choice(words.INSIDE)
            items = self._shape_item(*second, 0.85, 0.5, 0.5), self._shape_item(*first, 0.36, 0.5, 0.52)
        else:
            relation, places = self._relation()
            items = self._shape_item(*first, 0.4, *places[0]), self._shape_item(*second, 0.4, *places[1])
        return Composition(nouns[0] + relation + nouns[1] + phrase, background, items)

    def _on_shape(self) -> Composition:
        """A thing on a geometric shape."""
        concept, style = self._concept(), self._style()
        background, phrase = self._background([concept], None, (0.6, 0.4, 0.0))
        shape, colour = self._coloured_shape(background)
        if words.SHAPES[shape] not in ROOMY:
            raise UnsuitableError
        ground = words.with_article(self._shape_noun(shape, colour))
        relation = self.rng.choice((*words.INSIDE, " on "))
        caption = self._noun_phrase(concept, plain=True) + relation + ground + phrase
        items = (
            self._shape_item(shape, colour, 0.95, 0.5, 0.5),
            self._item(concept, style, None, 0.46, 0.5, 0.52),
        )
        return Composition(caption, background, items, style)

    def _nothing(self) -> Composition:
        if self._chance(0.7):
            name = self.rng.choice(list(words.SCENES))
            return Composition(words.SCENES_ALONE[name], self._scene(name))
        colour = self._background_colour()
        caption = words.with_article(self._colour_name(colour)) + self.rng.choice(words.COLOUR_ALONE)
        rgb = self._shade(colour)
        return Composition(caption, Background(rgb, rgb, name=colour))

    # ---- random choices

    def _chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def _lot(self, weights: Sequence[float]) -> int:
        return self.rng.choices(range(len(weights)), weights)[0]

    def _concept(self) -> Concept:
        return self.rng.choices(self.concepts, cum_weights=self._weights)[0]

    def _style(self) -> int:
        return self._lot(STYLE_WEIGHTS)

    def _tint(self, concept: Concept, probability: float) -> str | None:
        if not self._chance(probability) or not concept.group.startswith(CAN_BE_TINTED):
            return None
        if all(name.coloured for name in concept.names):
            return None
        tint = self.rng.choice(words.TINTS)
        if (concept.label, tint) in HELD_OUT_TINTS:
            raise UnsuitableError
        return tint

    def _background(
        self, concepts: Sequence[Concept], tint: str | None, weights: tuple[float, float, float]
    ) -> tuple[Background, str]:
        """A background, and the phrase for it; `weights` of plain white, of a colour, of a scene (else a gradient)."""
        match self._lot((*weights, max(0.0, 1 - sum(weights)))):
            case 0:
                background, phrase = Background(), ""
            case 1:
                colour = self._background_colour()
                if any((concept.label, colour) in HELD_OUT_BACKGROUNDS for concept in concepts):
                    raise UnsuitableError
                rgb, name = self._shade(colour), self._colour_name(colour)
                phrase = self.rng.choice(words.ON_COLOUR).format(a=words.with_article(name), c=name)
                background = Background(rgb, rgb, name=colour)
            case 2:
                scene = self.rng.choice(list(words.SCENES))
                if any((concept.label, scene) in HELD_OUT_SCENES for concept in concepts):
                    raise UnsuitableError
                background, phrase = self._scene(scene), f" {self.rng.choice(words.SCENES[scene])}"
            case _:
                top, bottom = self.rng.sample(list(words.COLOURS), 2)
                phrase = self.rng.choice(words.ON_GRADIENT).format(self._colour_name(top), self._colour_name(bottom))
                background = Background(self._shade(top), self._shade(bottom), name="gradient")
        if tint and background.name == tint:
            raise UnsuitableError
        return background, phrase

    def _scene(self, name: str) -> Background:
        scene = list(words.SCENES).index(name) * VARIANTS + self.rng.randrange(VARIANTS)
        return Background(scene=scene, name=name)

    def _background_colour(self) -> str:
        return self.rng.choices(list(words.BACKGROUND_WEIGHTS), list(words.BACKGROUND_WEIGHTS.values()))[0]

    def _coloured_shape(self, background: Background) -> tuple[int, str]:
        colour = self.rng.choice(list(words.COLOURS))
        if colour == background.name:
            raise UnsuitableError
        return self.rng.randrange(len(words.SHAPES)), colour

    def _relation(self) -> tuple[str, tuple[tuple[float, float], tuple[float, float]]]:
        """Return the relation of two things, and their places."""
        left, right, top, bottom = (0.26, 0.5), (0.74, 0.5), (0.5, 0.27), (0.5, 0.73)
        match self._lot((0.58, 0.12, 0.17, 0.13)):
            case 0:
                return self.rng.choice(words.BESIDE), (left, right)
            case 1:
                return self.rng.choice(words.RIGHT_OF), (right, left)
            case 2:
                return self.rng.choice(words.ABOVE), (top, bottom)
            case _:
                return self.rng.choice(words.BELOW), (bottom, top)

    def _shade(self, colour: str, spread: float = 6) -> tuple[float, float, float]:
        """Return a random colour of that name."""
        spread = min(spread, 3) if colour in ("white", "black") else spread
        red, green, blue = (min(255, max(0, v + self.rng.uniform(-spread, spread))) for v in words.COLOURS[colour])
        return red, green, blue

    def _colour_name(self, colour: str) -> str:
        others = words.OTHER_COLOUR_NAMES.get(colour)
        return self.rng.choice((colour, colour, *others)) if others else colour

    def _item(self, concept: Concept, style: int, tint: str | None, size: float, x: float, y: float) -> Item:
        picture = self._index[concept.label] * len(STYLES) + style
        item = Item(picture, size * self.rng.uniform(0.96, 1.04), self._near(x), self._near(y))
        return replace(item, paint="tint", rgb=self._shade(tint, 8)) if tint else item

    def _shape_item(self, shape: int, colour: str, size: float, x: float, y: float) -> Item:
        picture = len(self.concepts) * len(STYLES) + shape
        size *= self.rng.uniform(0.95, 1.05)
        return Item(picture, size, self._near(x), self._near(y), "fill", self._shade(colour, 8))

    def _near(self, place: float) -> float:
        return place + self.rng.uniform(-0.015, 0.015)

    # ---- words

    def _name(self, concept: Concept, tint: str | None) -> Name:
        """Return one of its names, the usual one most often; never one that names a colour if it is tinted."""
        names = [name for name in concept.names if not (tint and name.coloured)]
        return names[0] if self._chance(0.6) else self.rng.choice(names)

    def _noun_phrase(
        self, concept: Concept, tint: str | None = None, size_words: Sequence[str] = (), plain: bool = False
    ) -> str:
        name = self._name(concept, tint)
        noun, uncounted = name.text, name.uncounted
        if not plain and concept.synonyms and self._chance(0.07):
            noun, uncounted = self.rng.choice(concept.synonyms), False
        if tint:
            noun = f"{self._colour_name(tint)} {noun}"
        if not plain and self._chance(0.06):
            noun = f"{self.rng.choice(words.ADJECTIVES)} {noun}"
        if size_words:
            noun = f"{self.rng.choice(size_words)} {noun}"
        if uncounted:
            return noun if self._chance(0.75) else f"some {noun}"
        return (words.with_article(noun), noun, f"the {noun}")[self._lot((0.72, 0.22, 0.06))]

    def _shape_noun(self, shape: int, colour: str) -> str:
        return f"{self._colour_name(colour)} {words.SHAPES[shape]}"

    def _embellish(self, caption: str, style: int) -> str:
        """Name the style, unless it is the first, and add words that do not change the meaning of a caption."""
        if style or self._chance(0.12):
            name = STYLES[style]
            at_end = self._chance(0.85)
            caption = caption + self.rng.choice(words.IN_STYLE).format(name) if at_end else f"{name} style {caption}"
        if self._chance(0.16):
            caption = self.rng.choice(words.BEGINNINGS) + caption
        if self._chance(0.1):
            caption += "".join(self.rng.sample(words.ENDINGS, 2 if self._chance(0.3) else 1))
        return caption + "." if self._chance(0.05) else caption


def _weight(concept: Concept) -> float:
    if concept.popular:
        return 3.0
    return 1.3 if concept.group.startswith(("animal", "food", "plant", "transport", "sky", "place")) else 0.9
