"""The test: prompts, each with what its picture must show, written as data so that a judge can measure it.

The tables below are written by hand, but for the names of single things, which are drawn by lot with a fixed seed.
Things are called by their label (`art.Concept.label`). The prompts on `world.HELD_OUT_...` show what no picture in
training showed, and are marked `unseen`; others may have been in training by chance, and single things surely were.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from . import captions as words
from . import world
from .art import STYLES, Art, Concept

T = TypeVar("T")
SINGLE_THINGS, OTHER_NAMES = 36, 18  # numbers of prompts


@dataclass(frozen=True)
class Thing:
    """What can be drawn: a concept by its label, or a shape by its name; `colour` tints the one and fills the other."""

    label: str
    colour: str = ""
    style: str = STYLES[0]
    is_shape: bool = False

    def __str__(self) -> str:
        style = "" if self.style == STYLES[0] else f" ({self.style})"
        return f"{self.colour} {self.label}".strip() + style


@dataclass(frozen=True)
class Prompt:
    """A prompt and what its picture must show.

    Attributes
    ----------
    category, text : str
    things : tuple of Thing
        What there is to see, a thing as often as it is to be seen.
    background : str
        A colour, or a scene. "" is plain white, and not judged as the prompt does not ask for it.
    order : str
        "across" or "down" if the things must stand in the order of `things`.
    place : tuple of int, optional
        Where one thing must be: steps from the centre, as in `captions.PLACES`.
    size : str
        "small" or "big" if one thing must be.
    style_asked : bool
        The style must be right as well.
    unseen : bool
        Training never sees this composition.
    """

    category: str
    text: str
    things: tuple[Thing, ...]
    background: str = ""
    order: str = ""
    place: tuple[int, int] | None = None
    size: str = ""
    style_asked: bool = False
    unseen: bool = False


# Held-out tints and backgrounds come on top, from `world`
BACKGROUNDS = {
    **{"red": "polar bear", "orange": "whale", "yellow": "eggplant", "green": "strawberry", "blue": "lemon"},
    **{"purple": "sunflower", "pink": "frog", "brown": "swan", "black": "carrot", "white": "tiger", "gray": "tomato"},
    **{"light blue": "doughnut", "dark blue": "duck", "light green": "octopus", "dark green": "flamingo"},
    **{"turquoise": "crab", "beige": "turtle", "magenta": "koala"},
}
TINTS = {  # on white, or on a colour
    "red": (("dolphin", ""), ("sailboat", "yellow")),
    "orange": (("koala", ""), ("backpack", "light blue")),
    "yellow": (("pig", ""), ("tractor", "black")),
    "green": (("horse", ""), ("guitar", "pink")),
    "blue": (("strawberry", ""), ("tulip", "yellow")),
    "purple": (("duck", ""), ("bus", "light green")),
    "pink": (("crocodile", ""), ("rocket", "dark blue")),
    "brown": (("t-rex", ""), ("teddy bear", "turquoise")),
    "black": (("swan", ""), ("running shoe", "orange")),
    "white": (("crab", "blue"), ("butterfly", "red")),
    "gray": (("carrot", ""), ("frog", "yellow")),
    "turquoise": (("camel", ""), ("castle", "red")),
}
COUNTS = {
    2: (("pineapple", ""), ("owl", "light blue"), ("rocket", ""), ("cupcake", "green")),
    3: (("carrot", ""), ("crab", "yellow"), ("turtle", ""), ("banana", "pink")),
    4: (("strawberry", ""), ("butterfly", "beige"), ("soccer ball", "green"), ("hedgehog", "")),
    5: (("lemon", ""), ("lady beetle", "light blue"), ("tulip", ""), ("cookie", "turquoise"), ("pear", "")),
    6: (("tomato", ""), ("balloon", "yellow"), ("pretzel", ""), ("cactus", "beige"), ("crab", "")),
}
PAIRS = (("penguin", "pineapple"), ("helicopter", "giraffe"), ("trophy", "snail"), ("ghost", "cactus"))
ORDERED = {
    "across": (
        *(("elephant", "cupcake"), ("guitar", "frog"), ("tulip", "hammer"), ("lion", "umbrella")),
        *(("fox", "banana"), ("banana", "fox"), ("robot", "pizza"), ("castle", "unicorn"), ("guitar", "penguin")),
    ),
    "down": (
        *(("rocket", "tractor"), ("owl", "pear"), ("crown", "kangaroo"), ("strawberry", "whale")),
        *(
            ("banana", "red apple"),
            ("balloon", "bear"),
            ("penguin", "guitar"),
            ("pizza", "robot"),
            ("unicorn", "castle"),
        ),
    ),
}
RELATIONS = {"across": ("to the left of", "to the right of"), "down": ("above", "below")}
ROWS = (
    ("dog", "carrot", "rocket"),
    ("crab", "tulip", "owl"),
    ("pear", "hammer", "turtle"),
    ("frog", "crown", "cookie"),
)
SIZES = {"small": ("elephant", "strawberry", "robot", "tulip"), "big": ("hamburger", "lion", "snail", "pineapple")}
PLACED = {
    **{(0, 0): ("pear", "lion"), (-1, 0): ("deciduous tree", "crab"), (1, 0): ("penguin", "guitar")},
    **{(0, -1): ("helicopter", "owl"), (0, 1): ("turtle", "rocket"), (-1, -1): ("butterfly", "tomato")},
    **{(1, -1): ("balloon", "whale"), (-1, 1): ("snail", "robot"), (1, 1): ("hedgehog", "dog")},
}
SCENES = {
    **{"meadow": "cow", "beach": "crab", "night": "owl", "space": "rocket", "snow": "penguin", "desert": "camel"},
    **{"underwater": "octopus", "sunset": "sailboat", "forest": "fox", "city": "bus", "rain": "snail"},
    **{"table": "pineapple", "sky": "helicopter", "mountains": "locomotive", "rainbow": "horse"},
}
STYLED = {
    "fluent": ("cat", "hamburger", "castle", "robot"),
    "noto": ("cat", "dragon", "strawberry", "automobile", "owl", "guitar", "house", "frog", "sunflower", "robot"),
    "twemoji": ("octopus", "dog", "rocket", "pizza", "turtle", "lion", "bicycle", "tulip", "penguin", "unicorn"),
}
SHAPES = (  # one, or two in an order
    *((("red", "circle"),), (("blue", "square"),), (("green", "triangle"),), (("purple", "hexagon"),)),
    *((("magenta", "heart"),), (("brown", "oval"),), (("turquoise", "ring"),), (("orange", "diamond"),)),
    (("red", "circle"), ("blue", "square")),
    (("yellow", "star"), ("purple", "heart")),
    (("black", "cross"), ("pink", "pentagon")),
    (("green", "rectangle"), ("orange", "circle")),
)


def exam(art: Art) -> tuple[Prompt, ...]:
    """Return all prompts, category by category."""
    makers = (
        _single,
        _backgrounds,
        _tints,
        _counts,
        _pairs,
        _ordered,
        _rows,
        _sizes,
        _places,
        _scenes,
        _styles,
        _shapes,
    )
    concepts = {concept.label: concept for concept in art.concepts}
    return tuple(prompt for maker in makers for prompt in maker(concepts))


def roll_call(art: Art) -> tuple[Prompt, ...]:
    """Return a prompt for every single thing, by its usual name."""
    return tuple(Prompt("roll call", _noun(concept), (Thing(concept.label),)) for concept in art.concepts)


def some_of_each(ordered: Sequence[T], number: int) -> tuple[T, ...]:
    """Return `number` items of a list in the order of categories, spread evenly over them."""
    number = min(number, len(ordered))
    return tuple(ordered[index * len(ordered) // number] for index in range(number))


Concepts = dict[str, Concept]


def _noun(concept: Concept, adjective: str = "") -> str:
    """Return the usual name with its article; with an adjective, a name that says no colour."""
    name = next(name for name in concept.names if not (adjective in words.COLOURS and name.coloured))
    noun = f"{adjective} {name.text}".strip()
    return noun if name.uncounted else words.with_article(noun)


def _on(colour: str) -> str:
    return f" on {words.with_article(colour)} background" if colour else ""


def _single(concepts: Concepts) -> Iterator[Prompt]:
    rng = random.Random(0)
    for concept in rng.sample(list(concepts.values()), SINGLE_THINGS):
        yield Prompt("things", _noun(concept), (Thing(concept.label),))
    for concept in rng.sample([c for c in concepts.values() if len(c.names) > 1], OTHER_NAMES):
        name = concept.names[-1]
        text = name.text if name.uncounted else words.with_article(name.text)
        yield Prompt("other names", text, (Thing(concept.label),))


def _backgrounds(concepts: Concepts) -> Iterator[Prompt]:
    seen = ((label, colour) for colour, label in BACKGROUNDS.items())
    for label, colour in (*seen, *sorted(world.HELD_OUT_BACKGROUNDS)):
        unseen = (label, colour) in world.HELD_OUT_BACKGROUNDS
        yield Prompt("backgrounds", _noun(concepts[label]) + _on(colour), (Thing(label),), colour, unseen=unseen)


def _tints(concepts: Concepts) -> Iterator[Prompt]:
    seen = ((label, tint, background) for tint, things in TINTS.items() for label, background in things)
    for label, tint, background in (*seen, *((*pair, "") for pair in sorted(world.HELD_OUT_TINTS))):
        unseen = (label, tint) in world.HELD_OUT_TINTS
        text = _noun(concepts[label], tint) + _on(background)
        yield Prompt("tints", text, (Thing(label, tint),), background, unseen=unseen)


def _counts(concepts: Concepts) -> Iterator[Prompt]:
    seen = ((label, number, background) for number, things in COUNTS.items() for label, background in things)
    unseen = ((*pair, "") for pair in sorted(world.HELD_OUT_COUNTS))
    for label, number, background in sorted((*seen, *unseen), key=lambda count: count[1]):
        text = f"{words.NUMBERS[number][0]} {words.plural(concepts[label].names[0].text)}{_on(background)}"
        category = "counts 2-4" if number < 5 else "counts 5-6"
        things = (Thing(label),) * number
        yield Prompt(category, text, things, background, unseen=(label, number) in world.HELD_OUT_COUNTS)


def _pairs(concepts: Concepts) -> Iterator[Prompt]:
    unseen = (tuple(sorted(pair)) for pair in world.HELD_OUT_PAIRS)
    for index, (first, second) in enumerate((*PAIRS, *sorted(unseen))):
        text = f"{_noun(concepts[first])} {('next to', 'and')[index % 2]} {_noun(concepts[second])}"
        yield Prompt("pairs", text, (Thing(first), Thing(second)), unseen={first, second} in world.HELD_OUT_PAIRS)


def _ordered(concepts: Concepts) -> Iterator[Prompt]:
    for order, pairs in ORDERED.items():
        for index, (first, second) in enumerate(pairs):
            relation = RELATIONS[order][index % 2]
            text = f"{_noun(concepts[first])} {relation} {_noun(concepts[second])}"
            things = Thing(first), Thing(second)
            unseen = {first, second} in world.HELD_OUT_PAIRS
            yield Prompt(
                "left, right" if order == "across" else "above, below",
                text,
                things[::-1] if index % 2 else things,
                order=order,
                unseen=unseen,
            )


def _rows(concepts: Concepts) -> Iterator[Prompt]:
    for labels in ROWS:
        text = "{}, {} and {}".format(*(_noun(concepts[label]) for label in labels))
        yield Prompt("three in a row", text, tuple(map(Thing, labels)))


def _sizes(concepts: Concepts) -> Iterator[Prompt]:
    for size, labels in SIZES.items():
        for label in labels:
            yield Prompt("sizes", _noun(concepts[label], size), (Thing(label),), size=size)


def _places(concepts: Concepts) -> Iterator[Prompt]:
    for place, labels in PLACED.items():
        for index, label in enumerate(labels):
            phrases = words.PLACES[place]
            text = f"{_noun(concepts[label])} {phrases[index % len(phrases)]}"
            yield Prompt("places", text, (Thing(label),), place=place)


def _scenes(concepts: Concepts) -> Iterator[Prompt]:
    seen = ((label, scene) for scene, label in SCENES.items())
    for label, scene in (*seen, *sorted(world.HELD_OUT_SCENES)):
        unseen = (label, scene) in world.HELD_OUT_SCENES
        text = f"{_noun(concepts[label])} {words.SCENES[scene][0]}"
        yield Prompt("scenes", text, (Thing(label),), scene, unseen=unseen)


def _styles(concepts: Concepts) -> Iterator[Prompt]:
    for style, labels in STYLED.items():
        for label in labels:
            text = f"{_noun(concepts[label])}, {style} style"
            yield Prompt("styles", text, (Thing(label, style=style),), style_asked=True)


def _shapes(_: Concepts) -> Iterator[Prompt]:
    for index, shapes in enumerate(SHAPES):
        things = tuple(Thing(shape, colour, is_shape=True) for colour, shape in shapes)
        relation, order = (" to the left of ", "across") if index % 2 else (" above ", "down")
        text = relation.join(words.with_article(str(thing)) for thing in things)
        yield Prompt("shapes", text, things, order=order if len(things) > 1 else "")
