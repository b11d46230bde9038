"""The judge of the model's pictures: it must pass what is painted as asked, and nothing else.

The things are drawn here with Pillow; the artwork, a model and torch are not needed.
"""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from training import references
from training.art import SIZE, Art, Concept, Name
from training.captions import SCENES
from training.check_judge import check, perfect, spoilt
from training.held_out import Prompt, Thing
from training.judge import Judge, Verdict
from training.references import References
from training.report import Judged, Run, better

DRAWINGS = {  # polygons and a colour for each style
    "house": (
        ((64, 10), (118, 60), (100, 60), (100, 118), (28, 118), (28, 60), (10, 60)),
        "firebrick",
        "sienna",
        "crimson",
    ),
    "fish": (
        ((10, 64), (50, 30), (90, 60), (118, 34), (118, 94), (90, 68), (50, 98)),
        "teal",
        "steelblue",
        "royalblue",
    ),
    "tree": (((64, 8), (104, 84), (72, 84), (72, 120), (56, 120), (56, 84), (24, 84)), "green", "olive", "seagreen"),
    "cup": (
        ((20, 24), (96, 24), (96, 40), (120, 40), (120, 84), (90, 84), (84, 110), (32, 110)),
        "gold",
        "orange",
        "khaki",
    ),
    "bolt": (((76, 6), (24, 72), (56, 72), (44, 122), (104, 50), (70, 50)), "purple", "orchid", "indigo"),
}
HOUSE, FISH, TREE, BOLT = (Thing(label) for label in ("house", "fish", "tree", "bolt"))
RED_CIRCLE_BLUE_SQUARE = Thing("circle", "red", is_shape=True), Thing("square", "blue", is_shape=True)
PROMPTS = (
    Prompt("things", "a house", (HOUSE,)),
    Prompt("backgrounds", "a fish on a yellow background", (FISH,), "yellow"),
    Prompt("backgrounds", "a fish on a dark green background", (FISH,), "dark green"),
    Prompt("tints", "a blue house on a pink background", (Thing("house", "blue"),), "pink"),
    Prompt("tints", "a red bolt", (Thing("bolt", "red"),)),
    *(Prompt("counts", f"{number} trees", (TREE,) * number) for number in (2, 5, 6)),
    Prompt("pairs", "a house to the left of a tree", (HOUSE, TREE), order="across"),
    Prompt("pairs", "a fish above a bolt on a red background", (FISH, BOLT), "red", order="down"),
    Prompt("sizes", "a small bolt", (BOLT,), size="small"),
    Prompt("sizes", "a big tree", (TREE,), size="big"),
    Prompt("places", "a fish in the top left corner", (FISH,), place=(-1, -1)),
    Prompt("places", "a fish in the center", (FISH,), place=(0, 0)),
    Prompt("styles", "a house, noto style", (Thing("house", style="noto"),), style_asked=True),
    Prompt("shapes", "a red circle above a blue square", RED_CIRCLE_BLUE_SQUARE, order="down"),
    Prompt("scenes", "a fish underwater", (FISH,), "underwater"),
    Prompt("scenes", "a tree at sunset", (TREE,), "sunset"),
)


def draw_things() -> Art:
    pictures = np.zeros((len(DRAWINGS), 3, 4, SIZE, SIZE), np.uint8)
    for thing, (polygon, *colours) in zip(pictures, DRAWINGS.values(), strict=True):
        for style, colour in zip(thing, colours, strict=True):
            image = Image.new("RGBA", (SIZE, SIZE))
            ImageDraw.Draw(image).polygon(polygon, fill=colour)
            style[:] = np.asarray(image.convert("RGBa")).transpose(2, 0, 1)
    concepts = tuple(Concept(label, (Name(label),), (), (), "object", False) for label in DRAWINGS)
    return Art(concepts, pictures)


def draw_scenes() -> np.ndarray:
    """Vertical gradients, each scene from one colour to another."""
    ends = np.random.default_rng(0).uniform(0, 255, (len(SCENES), 2, 3, 1, 1))
    steps = np.linspace(0, 1, SIZE)[:, None]
    pictures = ends[:, 0] * (1 - steps) + ends[:, 1] * steps
    return np.broadcast_to(pictures[:, None], (len(SCENES), 2, 3, SIZE, SIZE)).astype(np.uint8)


@pytest.fixture(scope="module")
def judge():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(references, "scene_pictures", draw_scenes)
        yield Judge(References(draw_things()))


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: prompt.text)
def test_passes_what_is_painted_as_asked(judge, prompt):
    verdict = judge(perfect(judge.references, prompt), prompt)
    assert verdict.passed, verdict.faults
    if prompt.background not in SCENES:
        assert verdict.fidelity > 30
        assert verdict.specks == 0


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: prompt.text)
def test_rejects_what_is_painted_wrongly(judge, prompt):
    wrong = list(spoilt(judge.references, prompt))
    assert wrong
    assert [fault for fault, picture in wrong if judge(picture, prompt).passed] == []


def test_says_what_it_found(judge):
    asked = Prompt("pairs", "a house to the left of a tree on a blue background", (HOUSE, TREE), "blue", order="across")
    drawn = Prompt("pairs", "a fish to the left of a tree on a red background", (FISH, TREE), "red", order="across")
    verdict = judge(perfect(judge.references, drawn), asked)
    assert verdict.faults == ("the background is red", "found fish, tree")


def test_tells_clean_pictures_from_others(judge):
    prompt = PROMPTS[0]
    clean = perfect(judge.references, prompt)
    noisy = (clean + np.random.default_rng(0).normal(0, 0.02, clean.shape)).clip(0, 1)
    noisy[2:6, 60:64] = 0.5  # a speck
    verdict = judge(noisy, prompt)
    assert verdict.passed
    assert verdict.fidelity < judge(clean, prompt).fidelity
    assert verdict.specks > 0


def test_a_trial_counts_mistakes(judge):
    class Credulous(Judge):
        def __call__(self, picture, prompt):
            return Verdict()

    trial = check(Credulous(judge.references), PROMPTS[:1])
    assert str(trial) == "The judge passes 1 of 1 perfect pictures, and rejects 0 of 3 wrong ones."
    assert trial.mistakes[0] == "passed: 'a house' with another thing"


def test_the_better_model_passes_more_or_draws_more_faithfully():
    def run(*verdicts):
        return Run("", tuple(Judged(PROMPTS[0], np.zeros(0), verdict) for verdict in verdicts), 0)

    right, faithful, wrong = Verdict(fidelity=20), Verdict(fidelity=30), Verdict(("1 thing",))
    assert better(run(right, right), run(faithful, wrong)) == 0
    assert better(run(right, right), run(right, faithful)) == 1
