from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest

from tests.training.training_data import tiny_art, write_package
from training.art import SIZE, STYLES, Art, Concept, Name, Vocabulary, make_art
from training.icons import IconSet, rasterise
from training.packages import PACKAGES, fetch_packages, read_members

SUBGROUPS = {"0": "animal-mammal", "1": "food-fruit", "2": "face-smiling"}
EMOJI = [  # label, code points, subgroup, keywords
    ("Grinning face", "1F600", 2, ["Happy", "pet"]),
    ("winking face", "1F609", 2, ["face", "wink"]),
    ("cat", "1F408", 0, ["pet", "x-ray", "kitty", "tom cat", "x1"]),
    ("Man’s dog", "1F415-FE0F", 0, ["pet", "puppy", "hound"]),
    ("lion", "1F981", 0, ["king"]),  # which the style twemoji lacks
    ("guide dog", "1F9AE", 0, ["pet", "eyes"]),
    ("red apple", "1F34E", 1, ["fruit", "cat"]),
    ("grapes", "1F347", 1, ["fruit", "vine"]),
]
DISC = '<circle cx="8" cy="8" r="8" fill="red"/>'
VOCABULARY = Vocabulary(
    popular=["cat"],
    uncounted=["grapes"],
    unfit=["x-ray"],
    whole={"animal-mammal": ["guide dog"], "food-fruit": []},
    parts={"face-smiling": ["grinning face"]},
    names={"red apple": ["apple", "red apple"], "man’s dog": ["dog", "puppy"]},
)


@pytest.fixture
def packages(tmp_path):
    """The miniature packages, in ``tmp_path``; every icon is one disc."""
    data = [
        {"label": label, "hexcode": code, "subgroup": subgroup, "tags": tags} for label, code, subgroup, tags in EMOJI
    ]
    members = {"en/data.json": [*data, {"label": "regional indicator", "hexcode": "1F1E6"}]}
    packages = {"names": write_package(tmp_path, "names", {**members, "meta/groups.json": {"subgroups": SUBGROUPS}})}
    codes = [code.lower().removesuffix("-fe0f") for _, code, _, _ in EMOJI]
    for style in STYLES:
        chars = {code: "other" for code in codes if (style, code) != ("twemoji", "1f981")}
        icons = {"icons": {"disc": {"body": DISC}}, "aliases": {"other": {"parent": "disc"}}}
        packages[style] = write_package(tmp_path, f"@scope/{style}", {"icons.json": icons, "chars.json": chars})
    return packages


def test_what_is_chosen_and_how_it_is_called(tmp_path, packages):
    pytest.importorskip("resvg_py")
    art = make_art(tmp_path, VOCABULARY, packages)
    face, cat, dog, apple, grapes = art.concepts
    assert face == Concept("grinning face", (Name("grinning face"),), ("happy",), ("pet",), "face-smiling", False)
    assert cat == Concept("cat", (Name("cat"),), ("kitty", "tom cat"), ("pet",), "animal-mammal", True)
    assert dog.names == (Name("dog"), Name("puppy"))
    assert dog.synonyms == ("hound",)
    assert apple.names == (Name("apple"), Name("red apple", coloured=True))
    assert apple.synonyms == ()  # "cat" is the name of another
    assert grapes.names == (Name("grapes", uncounted=True),)
    assert art.pictures.shape == (5, 3, 4, SIZE, SIZE)
    assert art.pictures[:, :, 3].any(axis=(2, 3)).all()


def test_names_without_words_of_their_own(tmp_path, packages):
    pytest.importorskip("resvg_py")
    plain = dataclasses.replace(VOCABULARY, names={})
    assert make_art(tmp_path, plain, packages).concepts[2].names == (Name("man's dog"),)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"whole": {"animal-mammal": ["guide dog", "gide dog"], "food-fruit": []}}, "emoji in its subgroup: gide dog"),
        ({"whole": {"animal-mammal": ["lion"], "food-fruit": []}}, "emoji in its subgroup: lion"),
        ({"parts": {"food-sweet": []}}, "no such subgroup: food-sweet"),
        ({"popular": ["cat", "winking face"]}, "not chosen: winking face"),
        ({"popular": ["cat", "cat"]}, "twice: cat"),
        ({"names": {"guide dog": ["dog"]}}, "not chosen: guide dog"),
        ({"names": {"man’s dog": ["cat"]}}, "name of two things: cat"),
        ({"uncounted": ["grape"]}, "not a name: grape"),
        ({"unfit": ["wink"]}, "not a keyword: wink"),
    ],
)
def test_vocabulary_with_errors(tmp_path, packages, change, message):
    with pytest.raises(ValueError, match=message):
        make_art(tmp_path, dataclasses.replace(VOCABULARY, **change), packages)


def picture(icon, aliases=None):
    pytest.importorskip("resvg_py")
    icons = {"width": 16, "icons": {"icon": icon}, "aliases": aliases or {}}
    return rasterise(IconSet(icons, {"1": "alias" if aliases else "icon"}).svg("1", SIZE))


def box(pixels):
    """Left, top, right and bottom of what is opaque."""
    y, x = np.nonzero(pixels[3] == 255)
    return x.min(), y.min(), x.max() + 1, y.max() + 1


def test_premultiplied_colours():
    pixels = picture({"body": '<rect width="8" height="16" fill="#ff8000" fill-opacity="0.5"/>'})
    np.testing.assert_array_equal(pixels[:, 64, 32], [128, 64, 0, 128])
    np.testing.assert_array_equal(pixels[:, 64, 96], [0, 0, 0, 0])


def test_view_box_with_offsets():
    body = '<rect x="-4" y="-2" width="16" height="16"/>'
    assert box(picture({"body": body, "left": -4, "top": -2, "width": 32, "height": 32})) == (0, 0, 64, 64)


def test_icon_that_is_not_square_is_centred():
    assert box(picture({"body": '<rect width="16" height="8"/>', "height": 8})) == (0, 32, 128, 96)
    assert box(picture({"body": '<rect width="16" height="32"/>', "height": 32})) == (32, 0, 96, 128)


def test_aliases_take_what_their_parents_have():
    icon = {"body": '<rect width="16" height="16"/>', "width": 32, "height": 32}
    aliases = {"alias": {"parent": "middle"}, "middle": {"parent": "icon", "left": -16}}
    assert box(picture(icon, aliases)) == (64, 0, 128, 64)


def test_flipped_icons_are_refused():
    with pytest.raises(ValueError, match="flipped"):
        picture({"body": DISC}, {"alias": {"parent": "icon", "hFlip": True}})


def test_integrity(tmp_path, packages):
    path = tmp_path / packages["noto"].file_name
    assert path.name == "scope-noto-1.0.0.tgz"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ValueError, match=r"scope-noto-1\.0\.0\.tgz: found sha512-.*, expected sha512-.*; delete"):
        make_art(tmp_path, VOCABULARY, packages)


def test_another_licence(tmp_path):
    package = write_package(tmp_path, "icons", {}, licence="GPL-3.0")
    with pytest.raises(ValueError, match=r"found the licence 'GPL-3\.0', expected 'MIT'"):
        read_members(tmp_path, package)


def test_no_npm(tmp_path, packages, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    fetch_packages(tmp_path, packages.values())  # all there
    with pytest.raises(ValueError, match=r"npm, which downloads @iconify-json/.*@1\.2\.6 .*, is missing; install Node"):
        fetch_packages(tmp_path, PACKAGES.values())


def test_our_vocabulary_can_be_read():
    pytest.importorskip("tomllib")
    assert "cat" in Vocabulary.load().popular


def test_saved_and_loaded(tmp_path):
    art = tiny_art()
    art.save(tmp_path / "art.npz")
    loaded = Art.load(tmp_path / "art.npz")
    assert loaded.concepts == art.concepts
    np.testing.assert_array_equal(loaded.pictures, art.pictures)


def test_what_is_not_whole_is_said_in_one_line(tmp_path):
    path = tmp_path / "art.npz"
    tiny_art().save(path)
    whole = path.read_bytes()
    np.save(tmp_path / "other.npy", np.zeros(3))
    np.savez(tmp_path / "other.npz", ids=np.zeros(3))
    others = [(tmp_path / name).read_bytes() for name in ("other.npy", "other.npz")]
    for damaged in (b"", b"text", whole[: len(whole) // 2], whole[:100] + bytes(9) + whole[109:], *others):
        path.write_bytes(damaged)
        with pytest.raises(SystemExit, match=rf"^{path}: damaged, or another file; python -m training.art makes it$"):
            Art.load(path)
