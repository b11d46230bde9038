"""The artwork: things, their names, and a picture of each in three styles.

``python -m training.art`` makes it from npm packages of emoji (``packages.py``) and our choice of what to draw
(``vocabulary.toml``); that needs npm, resvg_py and Python 3.11.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from .icons import IconSet, rasterise
from .options import read_arrays
from .packages import PACKAGES, Package, fetch_packages, read_members

STYLES = ("fluent", "noto", "twemoji")  # the first is the one that is drawn if a caption names none
SIZE = 128

VOCABULARY = Path(__file__).with_name("vocabulary.toml")
COLOUR = re.compile(r"\b(red|green|blue|yellow|white|black|brown|pink|purple|orange|gold)\b")
WORD = re.compile(r"[a-z][a-z -]{2,18}")
COMMON = 40  # a keyword shared by more things than this is too vague


@dataclass(frozen=True)
class Name:
    """A name of a thing: whether it takes no article and no number ("grapes"), and whether it says a colour."""

    text: str
    uncounted: bool = False
    coloured: bool = False


@dataclass(frozen=True)
class Concept:
    """A thing that can be drawn.

    Attributes
    ----------
    label : str
        Its name in Unicode, which identifies it.
    names : tuple of Name
        Its names in captions, the usual one first.
    synonyms, keywords : tuple of str
        Words that mean this thing alone, and words that have to do with it.
    group : str
        Its subgroup in Unicode, such as ``animal-mammal``.
    popular : bool
        Captions name it more often.
    """

    label: str
    names: tuple[Name, ...]
    synonyms: tuple[str, ...]
    keywords: tuple[str, ...]
    group: str
    popular: bool


@dataclass(frozen=True)
class Art:
    """All concepts, and their pictures: uint8 ``(concepts, styles, 4, SIZE, SIZE)``, RGB premultiplied, and alpha."""

    concepts: tuple[Concept, ...]
    pictures: np.ndarray

    def save(self, path: Path) -> None:
        """Write an ``.npz``."""
        concepts = json.dumps([dataclasses.asdict(concept) for concept in self.concepts], ensure_ascii=False)
        np.savez_compressed(path, pictures=self.pictures, concepts=np.frombuffer(concepts.encode(), np.uint8))

    @classmethod
    def load(cls, path: Path) -> Art:
        """Read a file that ``save`` wrote."""
        concepts, pictures = read_arrays(path, "art", "concepts", "pictures")
        return cls(tuple(_concept(concept) for concept in json.loads(concepts.tobytes())), pictures)


def _concept(stored: dict) -> Concept:
    names = tuple(Name(**name) for name in stored.pop("names"))
    synonyms, keywords = tuple(stored.pop("synonyms")), tuple(stored.pop("keywords"))
    return Concept(names=names, synonyms=synonyms, keywords=keywords, **stored)


@dataclass(frozen=True)
class Emoji:
    """What Unicode says about an emoji; ``code`` is its code points in hexadecimal, without variation selectors."""

    label: str
    code: str
    group: str
    tags: tuple[str, ...]


@dataclass(frozen=True)
class Vocabulary:
    """What to draw, and its names: the tables of ``vocabulary.toml``, which explains them."""

    popular: list[str]
    uncounted: list[str]
    unfit: list[str]
    whole: dict[str, list[str]]
    parts: dict[str, list[str]]
    names: dict[str, list[str]]

    @classmethod
    def load(cls, path: Path = VOCABULARY) -> Vocabulary:
        """Read the file."""
        import tomllib  # noqa: PLC0415  # since Python 3.11

        return cls(**tomllib.loads(path.read_text(encoding="utf-8")))

    def has(self, emoji: Emoji) -> bool:
        """Whether to draw it."""
        if emoji.group in self.whole:
            return emoji.label not in self.whole[emoji.group]
        return emoji.label in self.parts.get(emoji.group, ())

    def names_of(self, emoji: Emoji) -> list[str]:
        """Its names in captions, the usual one first."""
        return self.names.get(emoji.label) or [emoji.label.replace("’", "'")]

    def check(self, emoji: Sequence[Emoji]) -> None:
        """Raise a ValueError that lists all entries that match no emoji, are repeated, or would mean two things."""
        chosen = [one for one in emoji if self.has(one)]
        names = [name for one in chosen for name in self.names_of(one)]
        listed = [(group, label) for table in (self.whole, self.parts) for group in table for label in table[group]]
        absent = set(listed) - {(one.group, one.label) for one in emoji}
        lists = ([label for _, label in listed], self.popular, self.uncounted, self.unfit)
        wrong = {
            "no such subgroup": {*self.whole, *self.parts} - {one.group for one in emoji},
            "no such emoji in its subgroup": {label for _, label in absent},
            "not chosen": {*self.popular, *self.names} - {one.label for one in chosen},
            "not a name": set(self.uncounted) - set(names),
            "not a keyword": set(self.unfit) - {tag for one in chosen for tag in one.tags},
            "twice": {word for words in lists for word in _repeated(words)},
            "name of two things": _repeated(names),
        }
        found = [f"{what}: {', '.join(sorted(words))}" for what, words in wrong.items() if words]
        if found:
            raise ValueError(f"the vocabulary has errors; {'; '.join(found)}")


def _repeated(words: Iterable[str]) -> set[str]:
    return {word for word, count in collections.Counter(words).items() if count > 1}


def read_emoji(data: Iterable[dict], subgroups: Mapping[str, str]) -> list[Emoji]:
    """Read ``data.json`` of emojibase; it numbers the subgroups, whose names are in ``groups.json``."""
    return [
        Emoji(
            entry["label"].lower(),
            entry["hexcode"].lower().replace("-fe0f", ""),
            subgroups[str(entry["subgroup"])],
            tuple(tag.lower() for tag in entry.get("tags", ())),
        )
        for entry in data
        if "subgroup" in entry
    ]


def make_concepts(emoji: Sequence[Emoji], vocabulary: Vocabulary) -> list[Concept]:
    """Name each emoji; a keyword that no other emoji has is a synonym."""
    uses = collections.Counter(tag for one in emoji for tag in one.tags)
    names = {name for one in emoji for name in vocabulary.names_of(one)}
    concepts = []
    for one in emoji:
        words = [tag for tag in one.tags if WORD.fullmatch(tag) and tag not in vocabulary.unfit]
        synonyms = [word for word in words if uses[word] == 1 and word not in names][:4]
        keywords = [word for word in words if uses[word] <= COMMON and word not in synonyms][:6]
        concepts.append(
            Concept(
                label=one.label,
                names=tuple(
                    Name(name, uncounted=name in vocabulary.uncounted, coloured=bool(COLOUR.search(name)))
                    for name in vocabulary.names_of(one)
                ),
                synonyms=tuple(synonyms),
                keywords=tuple(keywords),
                group=one.group,
                popular=one.label in vocabulary.popular,
            )
        )
    return concepts


def make_art(folder: Path, vocabulary: Vocabulary, packages: Mapping[str, Package] = PACKAGES) -> Art:
    """Name and draw the vocabulary's emoji that all styles contain, from the packages in a folder."""
    data, groups = read_members(folder, packages["names"], "en/data.json", "meta/groups.json")
    styles = [IconSet(*read_members(folder, packages[style], "icons.json", "chars.json")) for style in STYLES]
    emoji = read_emoji(data, groups["subgroups"])
    emoji = [one for one in emoji if all(one.code in style.names for style in styles)]
    vocabulary.check(emoji)
    chosen = [one for one in emoji if vocabulary.has(one)]
    pictures = np.empty((len(chosen), len(STYLES), 4, SIZE, SIZE), np.uint8)
    with click.progressbar(chosen, label=f"drawing {len(chosen)} things", file=sys.stderr) as progress:
        for index, one in enumerate(progress):
            pictures[index] = [rasterise(style.svg(one.code, SIZE)) for style in styles]
    return Art(tuple(make_concepts(chosen, vocabulary)), pictures)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m training.art", description="Make the artwork from npm packages.")
    parser.add_argument("--out", type=Path, default="training/data/art.npz", help="where to write it (%(default)s)")
    parser.add_argument(
        "--packages", type=Path, metavar="DIR", help="keep downloaded packages here, and use what is here"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.packages or Path(temporary)
        try:
            fetch_packages(folder)
            art = make_art(folder, Vocabulary.load())
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            art.save(arguments.out)
        except (OSError, ValueError) as error:
            sys.exit(f"training.art: {error}")
    print(f"{arguments.out}: {len(art.concepts)} things in {len(STYLES)} styles")


if __name__ == "__main__":
    main()
