"""Prompts over the steps of a run, and the network's answers to them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..networks.unet import EncodedContext
from ..prompts.encoding import prompt_schedule
from .model import Model
from .request import Request

log = logging.getLogger(__name__)

CONTEXTS = 8  # encoded contexts kept for a group whose prompts change from step to step

Rows = tuple[int, ...]


class Prompts:
    """The prompts of a request over the steps, encoded.

    Raises
    ------
    ModelError
        The text encoder returns NaN or infinite values.
    """

    def __init__(self, model: Model, request: Request) -> None:
        steps = request.passes[0].steps
        self.schedules: dict[str, list[tuple[int, str]]] = {}
        for text in {*request.prompts, *(request.negatives if request.scale > 1 else ())}:
            plain = request.syntax == "plain"
            self.schedules[text] = [(steps, text)] if plain else prompt_schedule(text, steps)
            if plain and (cut := model.tokenizer.truncated(text)):
                log.warning("prompt: longer than %d tokens; this is cut off: %r", model.tokenizer.max_length - 2, cut)
        texts = sorted({text for schedule in self.schedules.values() for _, text in schedule})
        self.encoded = model.condition(texts, request.syntax, request.clip_skip)
        model.release(*model.family.padding)
        if not all(conditioning.finite() for conditioning in self.encoded.values()):
            raise model.not_finite("the text encoder")

    def at(self, text: str, step: int) -> str:
        """Return what a prompt says at a step, from 1; its last text applies to all later steps."""
        schedule = self.schedules[text]
        return next((now for last, now in schedule if step <= last), schedule[-1][1])


class Group:
    """Pictures that go through the UNet together, with their encoded contexts."""

    def __init__(self, model: Model, prompts: Prompts) -> None:
        self.model, self.prompts = model, prompts
        self.contexts: dict[tuple[str, ...], EncodedContext] = {}

    def ask(
        self,
        sample: np.ndarray,
        timestep: float,
        texts: Sequence[str],
        arguments: Mapping[str, Callable[[Rows], Any]],
    ) -> np.ndarray:
        """Return the UNet's answer for each text, with the samples repeated; texts of one length are asked together.

        Parameters
        ----------
        sample : float32 array ``(n, c, h, w)``
        timestep : float
        texts : sequence of str
            A multiple of n.
        arguments : mapping
            More arguments of the UNet: functions of the rows of ``texts`` that are asked together.

        Returns
        -------
        float32 array ``(len(texts), c, h, w)``
        """
        lengths = [len(self.prompts.encoded[text].context) for text in texts]
        outputs: list[np.ndarray] = [sample] * len(texts)
        for length in sorted(set(lengths)):
            rows = tuple(row for row, one in enumerate(lengths) if one == length)
            context = self._context(tuple(texts[row] for row in rows))
            asked = sample if len(rows) == len(texts) else sample[[row % len(sample) for row in rows]]
            more = {name: argument(rows) for name, argument in arguments.items()}
            for row, answer in zip(rows, self.model.unet(asked, timestep, context, **more), strict=True):
                outputs[row] = answer
        return np.stack(outputs)

    def _context(self, texts: tuple[str, ...]) -> EncodedContext:
        if texts not in self.contexts:
            if len(self.contexts) == CONTEXTS:
                del self.contexts[next(iter(self.contexts))]
            self.contexts[texts] = self.model.encode_context([self.prompts.encoded[text] for text in texts])
        return self.contexts[texts]
