"""Tests are in the rooms of what they test, under its stem."""

from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
OUTSIDE = {("bench",), ("training",)}  # all other rooms are in sd_numba/
NO_ROOMS = {"golden", "packaging"}
# Tests of several modules at once, or of no module of the package.
WIDER = {
    "checkpoints/test_int8.py",  # int8 weights, from the file to the layers
    "diffusers_api/test_scripts.py",  # the README's scripts
    "files/test_fuzz.py",  # every reader of files
    "generation/test_image_golden.py",  # whole pictures from pictures, against diffusers
    "generation/test_precision.py",  # bf16 and int8, from the command line to the picture
    "kernels/winograd/test_winograd_coarse.py",
    "test_benchmark_option.py",
    "test_docs.py",
    "test_layout.py",
    "test_recorded_pictures.py",
}


def source(folder):
    """Return the folder of sources that a folder of tests belongs to."""
    room = folder.relative_to(TESTS)
    return (ROOT if room.parts[:1] in OUTSIDE else ROOT / "sd_numba") / room


def collected():
    files = {path.relative_to(TESTS).as_posix() for path in TESTS.rglob("test_*.py")}
    return sorted(name for name in files if name.split("/")[0] not in NO_ROOMS)


@pytest.mark.parametrize("name", collected())
def test_a_test_has_a_module(name):
    """`test_<stem>.py` tests `<stem>.py` or, named after its room, the room's `__init__.py`."""
    path = TESTS / name
    stem = path.stem.removeprefix("test_")
    room = source(path.parent)
    found = (room / f"{stem.removesuffix('_golden')}.py").is_file() or (room.name == stem and room.is_dir())
    assert found != (name in WIDER), f"no module for {name}" if not found else f"{name} has a module: not in WIDER"


def test_rooms_of_tests_are_rooms_of_sources():
    rooms = {path.parent for path in TESTS.rglob("test_*.py")}
    names = {room.relative_to(TESTS).as_posix() for room in rooms if room != TESTS and room.name not in NO_ROOMS}
    assert [name for name in sorted(names) if not source(TESTS / name).is_dir()] == []
