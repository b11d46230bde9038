"""The loop: from noise to clean latents, one call of the UNet after another.

A `Run` is one pass of the sampler. It prepares the first latents, calls the network and takes the sampler's
steps; whatever steers the network is in the chain of `sd_numba.generation.guides`. The loop yields a `Step` after each
call, whose ``state`` is everything that the rest of the run depends on.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import InputError
from ..pictures.arrays import latent_masks
from ..samplers import Plan
from ..samplers.noise import Noise, draw, restore_noise
from .guidance import Group, Prompts
from .guides import Call, Guide, Start, guides_of
from .model import Model
from .request import Request

PASS_PIXELS = 64 * 64  # latent pixels of all images in one call of the UNet, if it has more than one image
LAST = 1 << 30  # later than any step


@dataclass(frozen=True)
class Step:
    """The result of one call of the network.

    Attributes
    ----------
    index, total : int
        Number of this call, from 0, and the number of calls. Some samplers make more than one call for each step.
    timestep : float
        Timestep of the call.
    latents : ndarray
        Float32 ``(b, 4, h, w)`` after the call; the last step's are the result.
    seconds : float
        Duration of the call.
    denoised : ndarray
        Float32 ``(b, 4, h, w)``: the network's current estimate of the clean latents, for previews.
    state : mapping
        Everything that the rest of the run depends on, for `sd_numba.generation.state.save_state`: with it and the same
        arguments, ``generate`` continues after this call. Do not change the arrays in it.
    """

    index: int
    total: int
    timestep: float
    latents: np.ndarray
    seconds: float
    denoised: np.ndarray = field(repr=False)
    state: Mapping[str, Any] = field(repr=False)


def sample(
    model: Model, request: Request, state: Mapping[str, Any] | None = None, *, guides: Sequence[Guide] = ()
) -> Generator[Step, np.ndarray | None, None]:
    """Run a request.

    Parameters
    ----------
    model : Model
    request : Request
    state : mapping, optional
        The ``state`` of a `Step` of the same request, to continue after it.
    guides : sequence of Guide
        Guides that follow those of the request, nearest to the network.

    Yields
    ------
    Step
        Latents sent to the generator replace the step's.

    Raises
    ------
    InputError
        The state belongs to another run.
    ModelError
        The latents became NaN or infinite.
    """
    plans = [request.sampler.plan(one.steps) for one in request.passes]
    total = sum(len(plan) - one.start for plan, one in zip(plans, request.passes, strict=True))
    prompts = Prompts(model, request)
    done, latents = 0, None
    for number, (one, plan) in enumerate(zip(request.passes, plans, strict=True)):
        if state is not None and number < state["pass"]:
            done += len(plan) - one.start
            # Placeholders: they keep the random draws in the order of an uninterrupted run.
            latents = np.zeros((len(request.seeds), *model.latent_shape(one.height, one.width)), np.float32)
            continue
        run = Run(model, request, number, plan, prompts, latents, guides)
        if state is not None and number == state["pass"]:
            run.restore(state)
        while run.call < len(plan):
            start = time.perf_counter()
            timestep = float(plan.timesteps[run.call])
            denoised = run.advance()
            if run.call == len(plan):
                model.release("unet")  # so that its pages do not add to the peak of decoding
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
    model : Model
    request : Request
    number : int
        Number of the pass, from 0.
    plan : Plan
        The sampler's calls.
    prompts : Prompts
    latents : ndarray, optional
        Latents of the previous pass, to refine at this pass's size.
    guides : sequence of Guide
        Guides that follow those of the request.
    """

    def __init__(
        self,
        model: Model,
        request: Request,
        number: int,
        plan: Plan,
        prompts: Prompts,
        latents: np.ndarray | None,
        guides: Sequence[Guide],
    ) -> None:
        self.model, self.request, self.plan, self.number, self.prompts = model, request, plan, number, prompts
        self.call, self.history = request.passes[number].start, None
        self.shape = model.latent_shape(request.passes[number].height, request.passes[number].width)
        self.sources: Sequence[Noise] = request.sources()
        self.pictures = _groups(len(request.prompts), self.shape)
        self.groups = [Group(model, prompts) for _ in self.pictures]
        self.guides = [*guides_of(model, request), *guides]
        start = self._start(latents)
        for guide in self.guides:
            guide.prepare(start)

    def _normal(self) -> np.ndarray:
        return draw(self.sources, len(self.request.prompts), self.shape)

    def _start(self, latents: np.ndarray | None) -> Start:
        """Make the first latents; random numbers are drawn in the order of diffusers' pipelines."""
        model, request, plan = self.model, self.request, self.plan
        masks = None if request.masks is None else latent_masks(request.masks, *self.shape[1:])
        clean = None if latents is None else enlarge(latents, *self.shape[1:])
        if request.pictures is not None and not (model.paints_in and request.whole):
            clean = model.encode(2 * request.pictures - 1, self.sources)
        first = request.latents if clean is None else None
        noise = self._normal() if first is None else first
        if clean is None or (request.whole and latents is None):
            self.x = (noise * plan.init_noise_sigma).astype(np.float32)
        else:
            self.x = request.sampler.noised(clean, noise, plan, self.call)
        return Start(
            model, request, self.number, plan, self.prompts, self.shape, self.pictures, self.sources, noise, clean,
            masks,
        )  # fmt: skip

    def advance(self) -> np.ndarray:
        """Make one call and take the sampler's step; returns the network's estimate of the clean latents."""
        sampler, plan, call = self.request.sampler, self.plan, self.call
        shown = sampler.scale_model_input(self.x, plan, call)
        predicted = np.concatenate([self._predict(group, shown) for group in range(len(self.groups))])
        denoised = sampler.denoised(predicted, self.x, plan, call)
        x, self.history = sampler.step(predicted, self.x, plan, call, self.history, self._normal)
        if not np.isfinite(x).all():
            raise self.model.not_finite(f"step {call + 1} of {len(plan)}")
        self.call += 1
        for guide in self.guides:
            x = guide.after_step(x, self.call)
        self.x = x
        return denoised

    def _predict(self, group: int, shown: np.ndarray) -> np.ndarray:
        """Return the guided prediction for a group's pictures, from the scaled latents of the whole batch."""
        request, plan, pictures = self.request, self.plan, self.pictures[group]
        # Prompts that change over the steps have reached their last text when a second pass begins.
        step = self.call * plan.num_steps // len(plan) + 1 if self.number == 0 else LAST
        call = Call(
            index=self.call,
            share=self.call / len(plan),
            step=step,
            timestep=float(plan.timesteps[self.call]),
            group=group,
            pictures=pictures,
            sample=shown[pictures],
            texts=[self.prompts.at(text, step) for text in request.prompts[pictures]],
            scale=request.scale,
        )
        for guide in self.guides:
            guide.before_unet(call)
        output = self.groups[group].ask(call.sample, call.timestep, call.texts, call.arguments)
        for guide in reversed(self.guides):
            output = guide.after_unet(call, output)
        return output

    def state(self) -> dict[str, Any]:
        """Return everything needed to resume that the request does not already determine."""
        return {
            "pass": self.number,
            "call": self.call,
            "x": self.x,
            "history": self.history,
            "noise": [source.state() for source in self.sources],
            **{guide.key: guide.state() for guide in self.guides if guide.key},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Resume from the state of another run.

        Raises
        ------
        InputError
            That run had another size, other steps, or other guides.
        """
        found, last = np.shape(state["x"]), len(self.plan)
        if found != self.x.shape or not self.call <= state["call"] <= last:
            raise InputError(
                f"state: found latents of shape {found} after call {state['call']}, expected {self.x.shape} and at "
                f"most {last} calls; it belongs to another run"
            )
        self.call, self.x, self.history = state["call"], state["x"], state["history"]
        self.sources = [restore_noise(values) for values in state["noise"]]
        for guide in self.guides:
            if guide.key and guide.key not in state:
                raise InputError(f"state: it has no {guide.key}; it belongs to another run")
            if guide.key:
                guide.restore(state[guide.key])


def _groups(count: int, shape: tuple[int, int, int]) -> list[slice]:
    """Split a batch of pictures whose latents have this shape into groups that go through the network together."""
    size = max(1, PASS_PIXELS // (shape[1] * shape[2]))
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


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
