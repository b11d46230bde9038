"""The words of captions: colours, numbers, places, styles, and a little English grammar."""

from __future__ import annotations

import re

COLOURS = {  # sRGB
    "red": (222, 45, 38),
    "orange": (255, 140, 20),
    "yellow": (255, 221, 51),
    "green": (52, 168, 83),
    "blue": (45, 110, 225),
    "purple": (135, 60, 190),
    "pink": (255, 130, 180),
    "brown": (130, 85, 50),
    "black": (20, 20, 20),
    "white": (255, 255, 255),
    "gray": (140, 140, 140),
    "light blue": (150, 205, 250),
    "dark blue": (20, 35, 95),
    "light green": (165, 225, 140),
    "dark green": (15, 85, 45),
    "turquoise": (60, 200, 195),
    "beige": (240, 225, 195),
    "magenta": (225, 40, 150),
}
OTHER_COLOUR_NAMES = {
    "gray": ("grey",),
    "light blue": ("sky blue", "pale blue"),
    "dark blue": ("navy", "navy blue"),
    "turquoise": ("cyan", "teal"),
    "beige": ("cream",),
    "purple": ("violet",),
    "light green": ("pale green",),
    "magenta": ("hot pink",),
}
TINTS = (
    *("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray", "turquoise"),
)
BACKGROUND_WEIGHTS = {
    **dict.fromkeys(COLOURS, 0.8),
    **{"blue": 2.0, "red": 1.6, "yellow": 1.6, "green": 1.6, "purple": 1.3, "pink": 1.3, "black": 1.2, "orange": 1.2},
    "white": 1.0,
}

SCENES = {
    "meadow": ("on the grass", "in a meadow", "in a green field", "on a green hill", "in a park"),
    "beach": ("on the beach", "at the beach", "on a sandy beach"),
    "night": ("at night", "under the stars", "in the night", "under a night sky"),
    "space": ("in space", "in outer space", "among the stars"),
    "snow": ("in the snow", "in a snowy landscape", "in winter"),
    "desert": ("in the desert", "in a desert", "on sand dunes"),
    "underwater": ("underwater", "under the sea", "in the sea", "in the ocean"),
    "sunset": ("at sunset", "in front of a sunset", "at dusk"),
    "forest": ("in the forest", "in a forest", "in the woods"),
    "city": ("in the city", "in a city", "in front of a city skyline"),
    "rain": ("in the rain", "on a rainy day"),
    "table": ("on a table", "on a wooden table", "on the table"),
    "sky": ("in the sky", "in the clouds", "with clouds"),
    "mountains": ("in the mountains", "in front of mountains"),
    "rainbow": ("under a rainbow", "in front of a rainbow"),
}
SCENES_ALONE = {
    "meadow": "a green meadow",
    "beach": "a sandy beach",
    "night": "a night sky with stars",
    "space": "outer space",
    "snow": "a snowy landscape",
    "desert": "a desert with sand dunes",
    "underwater": "the sea floor",
    "sunset": "a sunset over the sea",
    "forest": "a forest",
    "city": "a city skyline",
    "rain": "rain",
    "table": "a wooden table",
    "sky": "a blue sky with clouds",
    "mountains": "a mountain landscape",
    "rainbow": "a rainbow over a meadow",
}
SHAPES = (
    *("circle", "square", "triangle", "rectangle", "oval", "diamond"),
    *("star", "heart", "hexagon", "pentagon", "cross", "ring"),
)

NUMBERS = {
    2: ("two", "two", "2", "a pair of", "a couple of"),
    3: ("three", "three", "3"),
    4: ("four", "four", "4"),
    5: ("five", "five", "5"),
    6: ("six", "six", "6", "half a dozen"),
}
SMALL = ("small", "tiny", "little")
BIG = ("big", "large", "huge", "giant")
PLACES = {  # steps from the centre, to the right and down
    (0, 0): ("in the center", "in the middle", "centered"),
    (-1, 0): ("on the left", "on the left side"),
    (1, 0): ("on the right", "on the right side"),
    (0, -1): ("at the top",),
    (0, 1): ("at the bottom",),
    (-1, -1): ("in the top left corner", "in the upper left"),
    (1, -1): ("in the top right corner", "in the upper right"),
    (-1, 1): ("in the bottom left corner", "in the lower left"),
    (1, 1): ("in the bottom right corner", "in the lower right"),
}

ON_COLOUR = (  # {a}: with an article
    *(" on {a} background", " on {a} background", " on {a} background", " with {a} background"),
    *(" against {a} background", ", {c} background", " on {a} backdrop", " in front of {a} background"),
    *(" on {c}", " over {a} background", " on {c} background"),
)
ON_GRADIENT = (" on a {} to {} gradient", " on a {} to {} gradient background", " on a gradient from {} to {}")
COLOUR_ALONE = (" background", " background", " color", " wall")
BESIDE = (" next to ", " next to ", " and ", " and ", " beside ", " to the left of ", " with ", ", ")
RIGHT_OF = (" to the right of ", " right of ")
ABOVE = (" above ", " on top of ", " over ")
BELOW = (" below ", " under ", " beneath ")
INSIDE = (" inside ", " in ")
RIDING = (" riding ", " riding ", " on ")
HOLDING = (" holding ", " holding ", " with ")
WEARING = (" wearing ", " wearing ", " with ")

ADJECTIVES = (*("cute", "beautiful", "simple", "nice", "lovely", "funny", "colorful", "pretty", "cool", "realistic"),)
BEGINNINGS = (
    *("a picture of ", "an image of ", "a photo of ", "an illustration of ", "a drawing of ", "an icon of "),
    *("an emoji of ", "a sticker of ", "clipart of ", "a cartoon of ", "a painting of ", "digital art of "),
    *("a render of ", "a simple drawing of ", "picture of ", "photo of "),
)
ENDINGS = (
    *(", flat design", ", vector art", ", high quality", ", highly detailed", ", 4k", ", emoji", ", icon"),
    *(", minimalist", ", clipart", ", digital art", ", best quality", ", cartoon style", ", simple", ", centered"),
)
IN_STYLE = (", {} style", " in {} style", ", {} emoji style", ", {}", " in the style of {}")

_IRREGULAR = {
    **{"mouse": "mice", "goose": "geese", "foot": "feet", "tooth": "teeth", "child": "children", "person": "people"},
    **{"wolf": "wolves", "knife": "knives", "leaf": "leaves", "loaf": "loaves", "ox": "oxen", "cactus": "cacti"},
    **{"tomato": "tomatoes", "potato": "potatoes", "mango": "mangoes", "volcano": "volcanoes"},
    **{same: same for same in ("sheep", "fish", "deer", "shrimp", "squid")},
}
_TAIL = re.compile(r"(.+?)( (?:of|with|in|on|behind|from|over) .+)")


def with_article(noun: str) -> str:
    """Put "a" or "an" before a noun phrase."""
    vowel = noun[0] in "aeiou8" and not noun.startswith(("uni", "ufo", "one"))
    return f"{'an' if vowel else 'a'} {noun}"


def plural(noun: str) -> str:
    """Return the plural of a noun phrase, such as "slices of pizza"."""
    if match := _TAIL.fullmatch(noun):
        return plural(match[1]) + match[2]
    before, space, word = noun.rpartition(" ")
    if word in _IRREGULAR:
        word = _IRREGULAR[word]
    elif word == "man" or word.endswith(("woman", "policeman")):
        word = f"{word[:-2]}en"
    elif word.endswith(("s", "x", "ch", "sh")):
        word += "es"
    elif word.endswith("y") and word[-2:-1] not in "aeiou":
        word = f"{word[:-1]}ies"
    else:
        word += "s"
    return before + space + word
