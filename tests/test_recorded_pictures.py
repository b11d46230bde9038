"""The pictures of `tests/golden/pictures.py`, made again: their texts, pixels and, where that can be, their bytes."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

from bench.quality import psnr
from tests.golden.pictures import CASES, FOLDER, RECORD, environment, make_pictures

# PSNR in dB. Other vector instructions add in another order, so that single values are rounded to their neighbours: at
# least 79 dB. Pictures made without one of the settings that change pixels have at most 34.
ALIKE = 45
RECORDED = json.loads(RECORD.read_text())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Makes all pictures; gives the file of one."""
    folder = tmp_path_factory.mktemp("pictures")
    results = make_pictures(folder, "-t", "1")  # recorded with two threads, which changes no bit

    def find(name):
        assert results[name].exit_code == 0, results[name].output
        return folder / f"{name}.png"

    return find


def texts(path):
    """All text chunks, without the version of sd-numba."""
    with Image.open(path) as image:
        return {key: re.sub(r"(Version: sd-numba) \S+", r"\1", text) for key, text in image.text.items()}


def pixels(path):
    with Image.open(path) as image:
        assert image.mode == "RGB"
        return np.asarray(image)


@pytest.mark.parametrize("name", CASES)
def test_text(made, name):
    assert texts(made(name)) == texts(FOLDER / f"{name}.png")


@pytest.mark.parametrize("name", CASES)
def test_pixels(made, name):
    found, expected = pixels(made(name)), pixels(FOLDER / f"{name}.png")
    if environment()["arithmetic"] == RECORDED["arithmetic"]:
        np.testing.assert_array_equal(found, expected)
    else:
        assert found.shape == expected.shape
        assert psnr(found / 255, expected / 255) >= ALIKE


@pytest.mark.skipif(environment() != RECORDED, reason="recorded with another CPU or another version of something")
@pytest.mark.parametrize("name", CASES)
def test_bytes(made, name):
    assert made(name).read_bytes() == (FOLDER / f"{name}.png").read_bytes()
