"""The loop: from noise to clean latents, call by call of the UNet.

Latents of pictures to start from, masks, guidance and what makes it cheaper all meet here. The loop yields a `Step`
after each call, whose ``state`` is all that the rest of the run depends on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import InputError
from ..networks.unet import EncodedContext, FeatureCache
from ..pictures.arrays import latent_masks
from ..prompts.encoding import encode_prompts, prompt_schedule
from ..samplers import Plan
from ..samplers.noise import Noise, draw, restore_noise
from .model import ModelParts
from .request import Pass, Request

log = logging.getLogger(__name__)

PASS_PIXELS = 64 * 64  # latent pixels, over all images, that go through the UNet in one pass if more than one image
LAST = 1 << 30  # later than any step
CONTEXTS = 8  # that are kept, of a group of pictures whose prompts change from step to step


@dataclass(frozen=True)
class Step:
    """What one call of the network brought.

    Attributes
    ----------
    index, total : int
        Number of this call, from 0, and of all calls. Some samplers make more than one call a step.
    timestep : float
        Where on the schedule the network was asked.
    latents : ndarray
        Float32 ``(b, 4, h, w)`` after the call; those of the last step are the result.
    seconds : float
        Time that the call took.
    denoised : ndarray
        Float32 ``(b, 4, h, w)``: the clean latents that the network saw in the noise, for previews.
    state : mapping
        All that the rest of the run depends on, for `sd_numba.generation.state.save_state`: with it and the same
        arguments ``generate`` goes on after this call. Arrays in it are not to be changed.
    """

    index: int
    total: int
    timestep: float
    latents: np.ndarray
    seconds: float
    denoised: np.ndarray = field(repr=False)
    state: Mapping[str, Any] = field(repr=False)


def sample(
    parts: ModelParts, request: Request, state: Mapping[str, Any] | None = None
) -> Generator[Step, np.ndarray | None, None]:
    """Run a request, or the rest of it after a `state`; latents that are sent take the place of those of the step."""
    plans = [request.sampler.plan(one.steps) for one in request.passes]
    total = sum(len(plan) - one.start for plan, one in zip(plans, request.passes, strict=True))
    prompts = Prompts(parts, request)
    done, latents = 0, None
    for number, (one, plan) in enumerate(zip(request.passes, plans, strict=True)):
        if state is not None and number < state["pass"]:
            done += len(plan) - one.start
            # of no use but that chance is drawn as if the pass before had been made
            latents = np.zeros((len(request.seeds), *parts.latent_shape(one.height, one.width)), np.float32)
            continue
        run = Run(parts, request, number, plan, prompts, latents)
        if state is not None and number == state["pass"]:
            run.restore(state)
        while run.call < len(plan):
            start = time.perf_counter()
            timestep = float(plan.timesteps[run.call])
            denoised = run.advance()
            if run.call == len(plan):
                parts.release("unet")  # what decoding needs at most then does not come on top of its pages
            seconds = time.perf_counter() - start
            index = done + run.call - one.start - 1
            sent = yield Step(index, total, timestep, run.x, seconds, denoised, run.state())
            if sent is not None:
                run.x = sent
        done += len(plan) - one.start
        latents = run.x


class Run:
    """One pass through the sampler's calls, for all pictures of a request.

    Parameters
    ----------
    number : int
        Of the pass.
    latents : ndarray, optional
        Of the pass before, to be refined at this one's size.
    """

    def __init__(
        self, parts: ModelParts, request: Request, number: int, plan: Plan, prompts: Prompts, latents: np.ndarray | None
    ) -> None:
        one = request.passes[number]
        self.parts, self.request, self.plan, self.number, self.call = parts, request, plan, number, one.start
        self.shape = parts.latent_shape(one.height, one.width)
        self.sources: Sequence[Noise] = request.sources()
        self.groups = list(_groups(parts, request, prompts, self.shape))
        self.history: Any = None
        self._start(one, latents)

    def _normal(self) -> np.ndarray:
        return draw(self.sources, len(self.request.prompts), self.shape)

    def _start(self, one: Pass, latents: np.ndarray | None) -> None:
        """Make the first latents; the draws of chance come in the order of diffusers' pipelines."""
        request, sampler = self.request, self.request.sampler
        masks = None if request.masks is None else latent_masks(request.masks, *self.shape[1:])
        clean = None if latents is None else enlarge(latents, *self.shape[1:])
        if request.pictures is not None and not (self.parts.paints_in and request.whole):
            clean = self.parts.encode(2 * request.pictures - 1, self.sources)
        first = request.latents if clean is None else None
        self.noise = self._normal() if first is None else first
        if clean is None or (request.whole and latents is None):
            self.x = (self.noise * self.plan.init_noise_sigma).astype(np.float32)
        else:
            self.x = sampler.noised(clean, self.noise, self.plan, one.start)
        self.extra: np.ndarray | None = None
        self.kept: tuple[np.ndarray, np.ndarray] | None = None
        if self.parts.paints_in:
            self.extra = self._inpainting_input(masks)
        elif masks is not None and clean is not None:
            self.kept = clean, masks
            if self.parts.vae.draws_noise:
                # diffusers encodes the picture around the mask here too, though it has no use for it
                draw(self.sources, max(len(clean), len(masks)), self.shape)

    def _inpainting_input(self, masks: np.ndarray | None) -> np.ndarray:
        """Return what a UNet for inpainting sees beside the latents: the mask, and latents of the picture around it.

        Without a picture or a mask all of it is to be painted, and the picture is grey.
        """
        b, (_, h, w), factor = len(self.request.prompts), self.shape, self.parts.vae.factor
        if self.request.pictures is None or self.request.masks is None or masks is None:
            masks = np.ones((b, 1, h, w), np.float32)
            around = np.zeros((b, h * factor, w * factor, 3), np.float32)
        else:
            around = (2 * self.request.pictures - 1) * (self.request.masks[..., None] < 0.5)
        given = masks, self.parts.encode(around, self.sources)
        return np.concatenate([np.broadcast_to(values, (b, *values.shape[1:])) for values in given], axis=1)

    def advance(self) -> np.ndarray:
        """Make one call and what follows from it; returns the clean latents that the network saw."""
        sampler, plan, call = self.request.sampler, self.plan, self.call
        seen = sampler.scale_model_input(self.x, plan, call)
        if self.extra is not None:
            seen = np.concatenate([seen, self.extra], axis=1)
        timestep, share = float(plan.timesteps[call]), call / len(plan)
        # Prompts that change are done with it when a second pass begins.
        step = call * plan.num_steps // len(plan) + 1 if self.number == 0 else LAST
        predicted = np.concatenate([group.predict(seen, timestep, step, share) for group in self.groups])
        denoised = sampler.denoised(predicted, self.x, plan, call)
        x, self.history = sampler.step(predicted, self.x, plan, call, self.history, self._normal)
        if not np.isfinite(x).all():
            raise self.parts.not_finite(f"step {call + 1} of {len(plan)}")
        self.call += 1
        if self.kept is not None:
            clean, masks = self.kept
            x = (1 - masks) * sampler.noised(clean, self.noise, plan, self.call) + masks * x
        self.x = x
        return denoised

    def state(self) -> dict[str, Any]:
        """Return what the rest depends on, but for what follows from the request."""
        return {
            "pass": self.number,
            "call": self.call,
            "x": self.x,
            "history": self.history,
            "noise": [source.state() for source in self.sources],
            "caches": [group.state() for group in self.groups],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where another run was."""
        found, last = np.shape(state["x"]), len(self.plan)
        if found != self.x.shape or not self.call <= state["call"] <= last:
            raise InputError(
                f"state: found latents of shape {found} after call {state['call']}, expected {self.x.shape} and at "
                f"most {last} calls; it is that of another run"
            )
        self.call, self.x, self.history = state["call"], state["x"], state["history"]
        self.sources = [restore_noise(values) for values in state["noise"]]
        for group, values in zip(self.groups, state["caches"], strict=True):
            group.restore(values)


class Prompts:
    """The prompts of a request over the steps, encoded."""

    def __init__(self, parts: ModelParts, request: Request) -> None:
        steps = request.passes[0].steps
        self.schedules: dict[str, list[tuple[int, str]]] = {}
        for text in {*request.prompts, *(request.negatives if request.scale > 1 else ())}:
            plain = request.syntax == "plain"
            self.schedules[text] = [(steps, text)] if plain else prompt_schedule(text, steps)
            if plain and (cut := parts.tokenizer.truncated(text)):
                log.warning("prompt: longer than %d tokens; this is cut off: %r", parts.tokenizer.max_length - 2, cut)
        texts = sorted({text for schedule in self.schedules.values() for _, text in schedule})
        self.encoded = encode_prompts(
            parts.tokenizer, parts.text_encoder, texts, syntax=request.syntax, clip_skip=request.clip_skip
        )
        parts.release("text_encoder")
        if not all(np.isfinite(vectors).all() for vectors in self.encoded.values()):
            raise parts.not_finite("the text encoder")

    def at(self, text: str, step: int) -> str:
        """Return what a prompt says at a step, from 1; the last text holds for all that come later."""
        schedule = self.schedules[text]
        return next((now for last, now in schedule if step <= last), schedule[-1][1])


class Group:
    """Pictures that go through the UNet together, guided away from the negative prompts, towards the prompts."""

    def __init__(self, parts: ModelParts, request: Request, prompts: Prompts, part: slice) -> None:
        self.parts, self.request, self.prompts, self.part = parts, request, prompts, part
        self.contexts: dict[tuple[str, ...], EncodedContext] = {}
        self.caches: dict[tuple[bool, tuple[int, ...]], FeatureCache] = {}

    def predict(self, seen: np.ndarray, timestep: float, step: int, share: float) -> np.ndarray:
        """Ask the UNet about the group's part of ``seen``, what the sampler shows, at a share of all calls."""
        x, request = seen[self.part], self.request
        first, last = request.guided
        guided = request.scale > 1 and first <= share < last
        texts = [*(request.negatives[self.part] if guided else ()), *request.prompts[self.part]]
        output = self._ask(x, timestep, [self.prompts.at(text, step) for text in texts], guided)
        if not guided:
            return output
        away, towards = np.split(output, 2)
        return away + np.float32(request.scale) * (towards - away)

    def _ask(self, x: np.ndarray, timestep: float, texts: list[str], guided: bool) -> np.ndarray:
        """Return the UNet's answer for each text, with the samples repeated; texts of one length are asked together."""
        lengths = [len(self.prompts.encoded[text]) for text in texts]
        outputs: list[np.ndarray] = [x] * len(texts)
        for length in sorted(set(lengths)):
            rows = tuple(row for row, one in enumerate(lengths) if one == length)
            context = self._context(tuple(texts[row] for row in rows))
            sample = x if len(rows) == len(texts) else x[[row % len(x) for row in rows]]
            answers = self.parts.unet(
                sample, timestep, context, cache=self._cache(guided, rows), merge=self.request.merged
            )
            for row, answer in zip(rows, answers, strict=True):
                outputs[row] = answer
        return np.stack(outputs)

    def _context(self, texts: tuple[str, ...]) -> EncodedContext:
        if texts not in self.contexts:
            if len(self.contexts) == CONTEXTS:
                del self.contexts[next(iter(self.contexts))]
            vectors = np.stack([self.prompts.encoded[text] for text in texts])
            self.contexts[texts] = self.parts.unet.encode_context(vectors)
        return self.contexts[texts]

    def _cache(self, guided: bool, rows: tuple[int, ...]) -> FeatureCache | None:
        """Return that of these rows, which stand for other texts where there is no guidance."""
        if self.request.cache_interval == 1:
            return None
        return self.caches.setdefault((guided, rows), FeatureCache(self.request.cache_interval))

    def state(self) -> list[Any]:
        """Return what the caches hold."""
        return [(key, cache.features, cache.calls) for key, cache in self.caches.items()]

    def restore(self, state: Sequence[Any]) -> None:
        """Let the caches hold what those of another run held."""
        for key, features, calls in state:
            cache = FeatureCache(self.request.cache_interval)
            cache.features, cache.calls = features, calls
            self.caches[key] = cache


def _groups(parts: ModelParts, request: Request, prompts: Prompts, shape: tuple[int, int, int]) -> Iterator[Group]:
    count, size = len(request.prompts), max(1, PASS_PIXELS // (shape[1] * shape[2]))
    for first in range(0, count, size):
        yield Group(parts, request, prompts, slice(first, min(first + size, count)))


def enlarge(latents: np.ndarray, h: int, w: int) -> np.ndarray:
    """Enlarge latents ``(b, c, h', w')`` to ``(b, c, h, w)``, linearly between the centres of their pixels."""
    for axis, size in ((2, h), (3, w)):
        old = latents.shape[axis]
        places = np.clip((np.arange(size) + 0.5) * (old / size) - 0.5, 0, old - 1)
        lower = np.floor(places).astype(int)
        upper = np.minimum(lower + 1, old - 1)
        weight = (places - lower).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(4)])
        latents = latents.take(lower, axis) * (1 - weight) + latents.take(upper, axis) * weight
    return latents
