"""Guides: everything that steers the network or makes it cheaper, as a chain around each of its calls.

The loop asks the network and takes the sampler's steps; each other thing that happens in a step is a `Guide`.
`guides_of` makes the chain of a request, and `sd_numba.generation.loop.sample` appends the guides of its argument
``guides``. A new way to steer the network is a subclass of `Guide` and a line in `guides_of`; the loop stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..networks.deepcache import FeatureCache
from ..samplers import Plan
from ..samplers.noise import Noise, draw
from .guidance import Prompts, Rows
from .model import Model
from .request import Request


@dataclass(frozen=True)
class Start:
    """What a pass begins with.

    Attributes
    ----------
    model : Model
    request : Request
    number : int
        Number of the pass, from 0.
    plan : Plan
        The sampler's calls in this pass.
    prompts : Prompts
    shape : tuple of int
        ``(channels, h, w)`` of one picture's latents.
    groups : list of slice
        The pictures that go through the network together.
    sources : sequence of Noise
        Random sources; draws in `Guide.prepare` come before the draws of the first step.
    noise : float32 array ``(b, channels, h, w)``
        The first noise.
    clean : float32 array ``(b, channels, h, w)``, optional
        Latents of the pictures that the pass starts from; b may be 1.
    masks : float32 array ``(b, 1, h, w)``, optional
        1 where to paint; b may be 1.
    """

    model: Model
    request: Request
    number: int
    plan: Plan
    prompts: Prompts
    shape: tuple[int, int, int]
    groups: list[slice]
    sources: Sequence[Noise]
    noise: np.ndarray
    clean: np.ndarray | None
    masks: np.ndarray | None


@dataclass
class Call:
    """What the network is asked about one group of pictures in one step. Guides may set the last four attributes.

    Attributes
    ----------
    index : int
        Number of the sampler's call in its pass, from 0.
    share : float
        Share of the pass's calls that come before this one.
    step : int
        Step of the prompts' schedules, from 1.
    timestep : float
    group : int
        Number of the group.
    pictures : slice
        The group's pictures in the batch.
    sample : float32 array ``(n, c, h, w)``
        The network's input for each of n pictures. Guides may add channels.
    texts : list of str
        What is asked: n texts, or a multiple of n; the samples are repeated for them.
    scale : float
        Guidance scale; up to 1, negative prompts are not asked.
    arguments : dict
        More keyword arguments of the network, by name. Each is a function that returns the argument for some rows, as
        texts of different lengths go through the network one after the other. ``rows`` are the indices of ``texts``.
    """

    index: int
    share: float
    step: int
    timestep: float
    group: int
    pictures: slice
    sample: np.ndarray
    texts: list[str]
    scale: float
    arguments: dict[str, Callable[[Rows], Any]] = field(default_factory=dict)


class Guide:
    """One link of the chain. Each method does nothing unless a guide overrides it.

    Guides run in the order of the chain before the network and in reverse order after it, so the last guide is nearest
    to the network: it sees everything that the others have put into a call, and the network's raw answers.

    Attributes
    ----------
    key : str
        Key of the guide's state in a run's state; empty if the guide has none. Each guide needs its own.
    """

    key = ""

    def prepare(self, start: Start) -> None:
        """Get ready for a pass. Called once for each pass, before its first step."""

    def before_unet(self, call: Call) -> None:
        """Change what the network is asked."""

    def after_unet(self, call: Call, output: np.ndarray) -> np.ndarray:
        """Return the network's answer or a replacement.

        There is one answer for each of the texts, ``(len(call.texts), c, h, w)``, until `ClassifierFreeGuidance`
        combines them to one for each picture, ``(n, c, h, w)``.
        """
        return output

    def after_step(self, x: np.ndarray, done: int) -> np.ndarray:
        """Return the latents ``(b, c, h, w)`` after the sampler's step, or others, when ``done`` calls are made."""
        return x

    def state(self) -> Any:
        """Return what the guide needs to resume: plain values and arrays, as `save_state` takes them."""
        return None

    def restore(self, state: Any) -> None:
        """Resume from what `state` returned. Called after `prepare`."""


class GuidanceInterval(Guide):
    """Turns guidance off outside a part of the steps (Kynkäänniemi et al., arXiv:2404.07724).

    Parameters
    ----------
    first, last : float
        Share of the calls at which guidance begins, and at which it ends.
    """

    def __init__(self, first: float, last: float) -> None:
        self.first, self.last = first, last

    def before_unet(self, call: Call) -> None:
        """Turn guidance off if the call lies outside the interval."""
        if not self.first <= call.share < self.last:
            call.scale = 1.0


class ClassifierFreeGuidance(Guide):
    """Steers away from the negative prompts (Ho and Salimans, arXiv:2207.12598), where the scale is above 1."""

    def prepare(self, start: Start) -> None:
        """Look up the negative prompts."""
        self.negatives, self.prompts = start.request.negatives, start.prompts

    def before_unet(self, call: Call) -> None:
        """Ask about the negative prompts too, before the others."""
        if call.scale > 1:
            negatives = [self.prompts.at(text, call.step) for text in self.negatives[call.pictures]]
            call.texts = [*negatives, *call.texts]

    def after_unet(self, call: Call, output: np.ndarray) -> np.ndarray:
        """Move the answers to the prompts further away from the answers to the negative prompts."""
        if len(output) == len(call.sample):
            return output
        negative, positive = np.split(output, 2)
        guided: np.ndarray = negative + np.float32(call.scale) * (positive - negative)
        return guided


class DeepCache(Guide):
    """Gives the network a `FeatureCache` for each group and each set of texts that it is asked together.

    Always part of the chain, as every state of a run has its key; an interval of 1 caches nothing.

    Parameters
    ----------
    interval : int
        Calls from one computation of the whole network to the next.
    """

    key = "caches"

    def __init__(self, interval: int) -> None:
        self.interval = interval

    def prepare(self, start: Start) -> None:
        """Begin with empty caches."""
        self.caches: list[dict[tuple[bool, Rows], FeatureCache]] = [{} for _ in start.groups]

    def before_unet(self, call: Call) -> None:
        """Give the network the cache of the rows that it is asked about."""
        if self.interval == 1:
            return
        # Without guidance the same rows stand for other texts.
        guided, caches = len(call.texts) > len(call.sample), self.caches[call.group]
        call.arguments["cache"] = lambda rows: caches.setdefault((guided, rows), FeatureCache(self.interval))

    def state(self) -> list[Any]:
        """Return what the caches hold."""
        return [[(key, cache.features, cache.calls) for key, cache in caches.items()] for caches in self.caches]

    def restore(self, state: Sequence[Any]) -> None:
        """Fill the caches."""
        for caches, values in zip(self.caches, state, strict=True):
            for key, features, calls in values:
                caches[key] = FeatureCache(self.interval, features, calls)


class MergedTokens(Guide):
    """Merges tokens in self-attention; see `sd_numba.networks.token_merging`.

    Parameters
    ----------
    tome : float
        Share of the tokens.
    """

    def __init__(self, tome: float) -> None:
        self.tome = tome

    def before_unet(self, call: Call) -> None:
        """Give the network the share."""
        call.arguments["tome"] = lambda rows: self.tome


class InpaintingChannels(Guide):
    """Adds what an inpainting model's network takes beside the latents: the mask, and latents of what is around it.

    Without a picture or a mask, the mask covers everything and the picture is grey.
    """

    def prepare(self, start: Start) -> None:
        """Encode what is around the mask."""
        request, model = start.request, start.model
        b, (_, h, w), factor = len(request.prompts), start.shape, model.vae.factor
        if request.pictures is None or request.masks is None or start.masks is None:
            masks = np.ones((b, 1, h, w), np.float32)
            around = np.zeros((b, h * factor, w * factor, 3), np.float32)
        else:
            masks = start.masks
            around = (2 * request.pictures - 1) * (request.masks[..., None] < 0.5)
        given = masks, model.encode(around, start.sources)
        self.channels = np.concatenate([np.broadcast_to(values, (b, *values.shape[1:])) for values in given], axis=1)

    def before_unet(self, call: Call) -> None:
        """Append the channels to the latents."""
        call.sample = np.concatenate([call.sample, self.channels[call.pictures]], axis=1)


class MaskBlend(Guide):
    """Keeps the picture outside the mask: its latents, with the noise of the step, replace what was made there."""

    def prepare(self, start: Start) -> None:
        """Draw the noise that diffusers draws here, so that the numbers after it are the same."""
        self.start = start
        if start.model.vae.draws_noise and start.clean is not None and start.masks is not None:
            # It encodes the picture around the mask, although it does not use the latents.
            draw(start.sources, max(len(start.clean), len(start.masks)), start.shape)

    def after_step(self, x: np.ndarray, done: int) -> np.ndarray:
        """Blend the painted latents with the picture's."""
        start, masks = self.start, self.start.masks
        if start.clean is None or masks is None:
            return x
        kept = start.request.sampler.noised(start.clean, start.noise, start.plan, done)
        blended: np.ndarray = (1 - masks) * kept + masks * x
        return blended


def guides_of(model: Model, request: Request) -> list[Guide]:
    """Return the guides of a request, in order."""
    guides: list[Guide] = [
        GuidanceInterval(*request.guided),
        ClassifierFreeGuidance(),
        DeepCache(request.cache_interval),
    ]
    if request.token_merging:
        guides.append(MergedTokens(request.token_merging))
    if model.paints_in:
        guides.append(InpaintingChannels())
    elif request.masks is not None:
        guides.append(MaskBlend())
    return guides
