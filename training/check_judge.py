"""A trial of the judge: pictures painted as their prompts ask must pass, and pictures painted wrongly must not."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from . import world
from .art import STYLES
from .captions import COLOURS, PLACES, SCENES, SHAPES, TINTS
from .held_out import Prompt, Thing
from .judge import Judge
from .references import Placed, References
from .world import MAX_ITEMS, PART, STEP


@dataclass(frozen=True)
class Trial:
    """Results of a judge: numbers of pictures, and the mistakes by name."""

    right: int
    wrong: int
    mistakes: tuple[str, ...]

    def __str__(self) -> str:
        refused = sum(mistake.startswith("refused") for mistake in self.mistakes)
        passed = len(self.mistakes) - refused
        return (
            f"The judge passes {self.right - refused} of {self.right} perfect pictures, "
            f"and rejects {self.wrong - passed} of {self.wrong} wrong ones."
        )


def check(judge: Judge, prompts: Sequence[Prompt]) -> Trial:
    """Show a judge a perfect picture of each prompt, and several wrong ones."""
    wrong, mistakes = 0, []
    for prompt in prompts:
        verdict = judge(perfect(judge.references, prompt), prompt)
        if not verdict.passed:
            mistakes.append(f"refused: {prompt.text!r}: {', '.join(verdict.faults)}")
        for fault, picture in spoilt(judge.references, prompt):
            wrong += 1
            if judge(picture, prompt).passed:
                mistakes.append(f"passed: {prompt.text!r} with {fault}")
    return Trial(len(prompts), wrong, tuple(mistakes))


def perfect(references: References, prompt: Prompt) -> np.ndarray:
    """Paint what a prompt asks for."""
    return references.paint(_layout(prompt), _background(references, prompt.background))


def spoilt(references: References, prompt: Prompt) -> Iterator[tuple[str, np.ndarray]]:
    """Paint a prompt's picture with each possible fault in turn; yield the fault and the picture."""
    rng = random.Random(prompt.text)
    things, layout = prompt.things, _layout(prompt)
    first = things[0]
    background = _background(references, prompt.background)

    def paint(*items: Placed, over: np.ndarray = background) -> np.ndarray:
        return references.paint(items, over)

    def instead(**changes: Any) -> np.ndarray:
        return paint(replace(layout[0], thing=replace(first, **changes)), *layout[1:])

    def another(names: Iterable[Any], *unlike: Any) -> Any:
        return rng.choice([name for name in names if name not in unlike])

    labels = SHAPES if first.is_shape else [concept.label for concept in references.art.concepts]
    yield "another thing", instead(label=another(labels, *(thing.label for thing in things)))
    yield "a thing too few", paint(*layout[1:])
    if prompt.background in SCENES:
        yield "another scene", paint(*layout, over=_background(references, another(SCENES, prompt.background)))
        return
    if len(things) < MAX_ITEMS:
        yield "a thing too many", paint(*_arranged((*things, things[-1])))
    if prompt.background:
        colour = another(COLOURS, prompt.background, first.colour)
        yield f"a {colour} background", paint(*layout, over=_background(references, colour))
    if first.colour:
        colour = another(TINTS, first.colour, prompt.background, "white")
        yield f"the colour {colour}", instead(colour=colour)
    if prompt.style_asked:
        yield "another style", instead(style=another(STYLES, first.style))
    if prompt.order:
        yield "things swapped", paint(*(replace(p, thing=t) for p, t in zip(layout, things[::-1], strict=True)))
        yield "things in the other direction", paint(*(replace(p, x=p.y, y=p.x) for p in layout))
    if prompt.place is not None:
        yield "another place", paint(_at(first, another(PLACES, prompt.place)))
    if prompt.size:
        yield "the usual size", paint(replace(layout[0], size=world.FULL))


def _background(references: References, name: str) -> np.ndarray:
    if name in SCENES:
        return references.scenes[name][0].transpose(1, 2, 0).astype(np.float32) / 255
    return np.array(COLOURS[name or "white"], np.float32) / 255


def _layout(prompt: Prompt) -> tuple[Placed, ...]:
    """Place the things of a prompt as training does."""
    things = prompt.things
    first, *others = things
    if prompt.background in SCENES:
        return (Placed(first, world.IN_SCENE, 0.5, 0.5 if prompt.background in world.FLOATING else 0.58),)
    if prompt.place is not None:
        return (_at(first, prompt.place),)
    if prompt.order:
        near, far = 0.5 - STEP, 0.5 + STEP
        centres = ((near, 0.5), (far, 0.5)) if prompt.order == "across" else ((0.5, near), (0.5, far))
        return tuple(Placed(thing, PART, *centre) for thing, centre in zip(things, centres, strict=True))
    if not others:
        return (Placed(first, {"small": world.SMALL, "big": world.BIG}.get(prompt.size, world.FULL), 0.5, 0.5),)
    return _arranged(things)


def _at(thing: Thing, place: tuple[int, int]) -> Placed:
    return Placed(thing, PART, 0.5 + STEP * place[0], 0.5 + STEP * place[1])


def _arranged(things: Sequence[Thing]) -> tuple[Placed, ...]:
    number = len(things)
    return tuple(
        Placed(thing, world.COUNT_SIZES[number], *centre)
        for thing, centre in zip(things, world.ARRANGEMENTS[number], strict=True)
    )
