"""The scripts of the section on diffusers in docs/python.md run, and make the pictures that diffusers makes of them."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sd_numba.checkpoints.opening import embedded_model_path

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
HEADING = "## Scripts written for diffusers"
MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # of the scripts; the embedded one takes its place
SIZES = [(256, 128), (128, 96)]  # of the picture that each script saves
TOLERANCE = 2  # of 255; what is almost n + 0.5 is rounded up here and down there


def scripts() -> list[str]:
    _, _, section = PAGE.read_text(encoding="utf-8").partition(f"{HEADING}\n")
    section = re.split(r"^##", section, maxsplit=1, flags=re.MULTILINE)[0]
    return re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)


def run(script: str, folder: Path) -> np.ndarray:
    """Run a script in a folder with a sketch; returns the picture that it saves."""
    sketch = Image.new("RGB", (128, 96), "royalblue")
    ImageDraw.Draw(sketch).ellipse((40, 24, 88, 72), "firebrick")
    sketch.save(folder / "sketch.png")
    assert MODEL in script
    before = Path.cwd()
    os.chdir(folder)
    try:
        exec(script.replace(MODEL, str(embedded_model_path())), {})
    finally:
        os.chdir(before)
    (path,) = (path for path in folder.glob("*.png") if path.name != "sketch.png")
    with Image.open(path) as picture:
        return np.asarray(picture).astype(int)


def for_diffusers(script: str) -> str:
    """Undo what was changed for sd-numba, and ask for what it does: single precision, on the CPU."""
    script = script.replace("from sd_numba import Generator", "import torch; from torch import Generator")
    script = script.replace("from sd_numba", "from diffusers").replace('"cuda"', '"cpu"')
    return re.sub(r"(Pipeline\.from_pretrained\(.*)\)", r"\1, torch_dtype=torch.float32)", script)


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return [run(script, tmp_path_factory.mktemp("ours")) for script in scripts()]


def test_the_scripts_of_the_page_run(ours):
    assert [(picture.shape[1], picture.shape[0]) for picture in ours] == SIZES


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("number", range(len(SIZES)))
def test_diffusers_makes_the_same_pictures_of_them(number, ours, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    theirs = run(for_diffusers(scripts()[number]), tmp_path)
    assert np.ptp(theirs) > 100
    np.testing.assert_allclose(ours[number], theirs, rtol=0, atol=TOLERANCE)
