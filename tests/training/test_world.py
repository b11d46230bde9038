"""Captions and compositions that the embedded model is trained on, and its tokenizer; no torch."""

import random

import numpy as np
import pytest

from sd_numba.prompts.tokenizer import Tokenizer
from tests.training.training_data import tiny_art
from training import captions as words
from training import world
from training.art import SIZE, Concept, Name
from training.backdrops import scene_pictures, shape_pictures
from training.tokenizer import VOCABULARY, train_merges, write_tokenizer
from training.world import MAX_ITEMS, VARIANTS, World

CONCEPTS = tiny_art().concepts
COUNT = 4000


@pytest.fixture(scope="module")
def compositions():
    drawn = World(CONCEPTS, random.Random(0))
    return [drawn.compose() for _ in range(COUNT)]


def named(composition) -> set[str]:
    """The labels of what is in a composition; shapes have none."""
    pictures = [item.picture // 3 for item in composition.items]
    return {CONCEPTS[index].label for index in pictures if index < len(CONCEPTS)}


@pytest.mark.parametrize(
    ("noun", "expected"),
    {
        "apple": "apples",
        "box": "boxes",
        "strawberry": "strawberries",
        "monkey": "monkeys",
        "slice of pizza": "slices of pizza",
        "ship in a bottle": "ships in a bottle",
        "red leaf": "red leaves",
        "sheep": "sheep",
        "superwoman": "superwomen",
        "potato": "potatoes",
    }.items(),
)
def test_plural(noun, expected):
    assert words.plural(noun) == expected


@pytest.mark.parametrize(
    ("noun", "expected"),
    {"owl": "an owl", "cat": "a cat", "unicorn": "a unicorn", "ufo": "a ufo", "8": "an 8"}.items(),
)
def test_article(noun, expected):
    assert words.with_article(noun) == expected


def test_the_same_seed_draws_the_same():
    first, second = (World(CONCEPTS, random.Random(3)) for _ in range(2))
    assert [first.compose() for _ in range(50)] == [second.compose() for _ in range(50)]


def test_compositions_can_be_painted(compositions):
    pictures = len(CONCEPTS) * 3 + len(words.SHAPES)
    for composition in compositions:
        assert len(composition.items) <= MAX_ITEMS
        assert composition.background.scene < len(words.SCENES) * VARIANTS
        for item in composition.items:
            assert 0 <= item.picture < pictures and 0.2 < item.size < 1.05
            assert 0 < item.x < 1 and 0 < item.y < 1 and all(0 <= v <= 255 for v in item.rgb)


def test_captions_name_what_is_there(compositions):
    for composition in compositions:
        for concept in CONCEPTS:
            if concept.label in named(composition):
                known = [name.text for name in concept.names] + list(concept.synonyms)
                assert any(word in composition.caption or words.plural(word) in composition.caption for word in known)


def test_every_number_of_things_is_drawn_and_said(compositions):
    for number, phrases in words.NUMBERS.items():
        some = [c for c in compositions if len(c.items) == number and len({item.picture for item in c.items}) == 1]
        alike = [c for c in some if c.items[0].paint != "fill"]  # shapes may differ in colour
        assert alike and all(any(phrase in c.caption for phrase in phrases) for c in alike)


def test_another_style_is_asked_for_by_name(compositions):
    for composition in compositions:
        styles = {item.picture % 3 for item in composition.items if item.picture < 3 * len(CONCEPTS)}
        if styles - {0}:
            assert ("noto", "twemoji")[styles.pop() - 1] in composition.caption


@pytest.mark.parametrize("kind", ["TINTS", "BACKGROUNDS", "SCENES", "COUNTS", "PAIRS"])
def test_what_is_held_out_is_never_drawn(kind, monkeypatch):
    """With all of one kind held out, none of it is drawn, though the rest is."""
    labels = [concept.label for concept in CONCEPTS]
    everything = {
        "TINTS": {(label, tint) for label in labels for tint in words.TINTS},
        "BACKGROUNDS": {(label, colour) for label in labels for colour in words.COLOURS},
        "SCENES": {(label, scene) for label in labels for scene in words.SCENES},
        "COUNTS": {(label, number) for label in labels for number in (2, 3, 4, 5)},
        "PAIRS": {frozenset((a, b)) for a in labels for b in labels if a != b},
    }
    monkeypatch.setattr(world, f"HELD_OUT_{kind}", everything[kind])
    drawn = World(CONCEPTS, random.Random(1))
    some = [composition for composition in (drawn.compose() for _ in range(600)) if named(composition)]
    assert len(some) > 300
    for composition in some:
        background, items = composition.background, composition.items
        found = {
            "TINTS": any(item.paint == "tint" for item in items),
            "BACKGROUNDS": background.name in words.COLOURS and background.name != "white",
            "SCENES": background.scene >= 0,
            "COUNTS": len(named(composition)) == 1
            and len(items) in (2, 3, 4, 5)
            and items[0].picture == items[-1].picture,
            "PAIRS": len(named(composition)) == 2,
        }
        assert not found[kind], composition.caption


def test_someone_can_ride_hold_and_wear():
    concepts = [
        Concept("cat", (Name("cat"),), (), (), "animal-mammal", True),
        Concept("bicycle", (Name("bicycle"),), (), (), "transport-ground", True),
        Concept("top hat", (Name("top hat"),), (), (), "clothing", True),
        Concept("balloon", (Name("balloon"),), (), (), "event", True),
    ]
    drawn = World(concepts, random.Random(2))
    text = " / ".join(drawn.compose().caption for _ in range(3000))
    assert " wearing " in text and "balloon" in text and " holding " in text
    assert "riding a bicycle" not in text  # a cat on a bicycle is held out


def test_backdrops():
    shapes, scenes = shape_pictures(), scene_pictures()
    assert shapes.shape == (len(words.SHAPES), 4, SIZE, SIZE) and scenes.shape == (15, VARIANTS, 3, SIZE, SIZE)
    assert (shapes[:, 3].mean(axis=(1, 2)) > 30).all() and (shapes[:, :, :2, :2] == 0).all()
    assert len({picture.tobytes() for picture in scenes.reshape(-1, 3, SIZE, SIZE)}) == 15 * VARIANTS
    np.testing.assert_array_equal(scene_pictures()[3, 5], scenes[3, 5])


def test_the_tokenizer_knows_frequent_words(tmp_path, compositions):
    merges = train_merges(composition.caption for composition in compositions)
    write_tokenizer(tmp_path / "t", merges, "<|endoftext|>", 77)
    tokenizer = Tokenizer.from_folder(tmp_path / "t")
    assert tokenizer.vocab_size <= VOCABULARY and len(tokenizer.encode("a red apple on a blue background")) == 7
    assert tokenizer.encode("naïve ☺")  # what it never saw is spelt in bytes
