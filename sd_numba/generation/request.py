"""A request for pictures, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..checks import check_choice, check_number, check_prompts, check_size, check_whole, resolve_seeds
from ..errors import InputError
from ..pictures.arrays import as_masks, as_pictures, resize_masks, resize_pictures
from ..prompts.encoding import SYNTAXES
from ..samplers import Sampler, make_sampler
from ..samplers.generators import noise_of
from ..samplers.noise import Noise, make_noise
from .model import ModelParts

MAX_SCALE = 16  # of the second pass, on each side
DEEPCACHE = "deepcache:"
IMAGE_STRENGTH, HIRES_STRENGTH = 0.8, 0.7  # where none is given: diffusers' and AUTOMATIC1111's


@dataclass(frozen=True)
class Pass:
    """One way from noise, or from latents with noise on them, to clean latents.

    Attributes
    ----------
    height, width : int
        Of the picture, in pixels.
    steps : int
        Of the whole schedule.
    start : int
        The call of the network to begin with.
    """

    height: int
    width: int
    steps: int
    start: int = 0


@dataclass(frozen=True)
class Request:
    """A checked request for a batch of pictures.

    Attributes
    ----------
    prompts, negatives, seeds : list
        One of each for a picture.
    streams : list of Noise, optional
        What the noise is drawn from instead of the seeds: one for each picture, or one for all.
    passes : tuple of Pass
        The first makes the picture, a second one refines it at a larger size.
    pictures : float32 array ``(b, height, width, 3)`` in [0, 1], optional
        What to start from; with streams, b may be 1 for all.
    masks : float32 array ``(b, height, width)`` of 0 and 1, optional
        1 where to paint; with streams, b may be 1 for all.
    whole : bool
        Whether the first pass starts from noise alone, whatever the pictures.
    guided : tuple of float
        Share of a pass's calls at which guidance begins, and at which it ends.
    cache_interval : int
        Every so many calls of the UNet compute all of it; see `sd_numba.networks.unet.FeatureCache`.
    merged : float
        Share of tokens that are merged in self-attention.
    """

    prompts: list[str]
    negatives: list[str]
    seeds: list[int]
    streams: list[Noise] | None
    rng: str
    sampler: Sampler
    scale: float
    syntax: str
    clip_skip: int
    passes: tuple[Pass, ...]
    latents: np.ndarray | None
    pictures: np.ndarray | None
    masks: np.ndarray | None
    whole: bool
    guided: tuple[float, float]
    cache_interval: int
    merged: float

    def sources(self) -> list[Noise]:
        """Return what the noise of a pass is drawn from."""
        return self.streams or [make_noise(self.rng, seed) for seed in self.seeds]


def check_request(
    parts: ModelParts,
    prompt: str | Sequence[str],
    *,
    negative_prompt: str | Sequence[str] | None,
    width: int | None,
    height: int | None,
    num_inference_steps: int | None,
    guidance_scale: float | None,
    seed: int | Sequence[int] | None,
    generator: Any,
    scheduler: str | None,
    eta: float,
    rng: str,
    latents: np.ndarray | None,
    image: Any,
    mask_image: Any,
    strength: float | None,
    prompt_syntax: str,
    clip_skip: int | None,
    hires_scale: float | None,
    hires_steps: int | None,
    hires_strength: float | None,
    cfg_interval: tuple[float, float],
    cache: str | None,
    tome: float,
) -> Request:
    """Check the arguments of `sd_numba.StableDiffusionPipeline.generate`, which says what they are.

    Raises
    ------
    InputError
        An argument does not fit.
    """
    prompts = check_prompts("prompt", prompt)
    count = len(prompts)
    negatives = check_prompts("negative_prompt", negative_prompt or "")
    if len(negatives) not in {1, count}:
        raise InputError(f"negative_prompt: found {len(negatives)} for {count} prompts, expected as many")
    check_choice("prompt_syntax", prompt_syntax, SYNTAXES)
    check_whole("clip_skip", clip_skip or 0, 0, parts.text_encoder.config.num_hidden_layers - 1)
    if image is None:
        for name, value in (("mask_image", mask_image), ("strength", strength)):
            if value is not None:
                raise InputError(f"{name}: found one without an image, expected image= as well")
    elif latents is not None:
        raise InputError("latents: found some beside an image, expected one of the two")
    elif hires_scale is not None:
        raise InputError("hires_scale: found one beside an image, expected one of the two; width and height enlarge it")
    pictures = None if image is None else as_pictures(image, "image")
    masks = None if mask_image is None else as_masks(mask_image, "mask_image")
    given = np.array(latents, np.float32) if latents is not None else None
    height, width = _size(parts, height, width, given, pictures)
    sampler = make_sampler(parts.scheduler_name(scheduler), parts.scheduler_config, eta)
    steps = parts.defaults["num_inference_steps"] if num_inference_steps is None else num_inference_steps
    sampler.plan(steps)  # for its errors
    if image is not None:
        strength = check_number("strength", strength, 0, 1, 1.0 if masks is not None else IMAGE_STRENGTH)
        passes = [Pass(height, width, steps, sampler.start_call(steps, strength))]
    else:
        passes = [Pass(height, width, steps)]
    if hires_scale is not None:
        passes.append(_second(parts, sampler, passes[0], hires_scale, hires_steps, hires_strength))
    make_noise(rng, 0)
    streams, seeds = None, []
    if generator is None:
        seeds = resolve_seeds(seed, count)
    else:
        streams, seeds = _streams(generator, count, seed, rng)
    shape = (count, *parts.latent_shape(height, width))
    if given is not None and given.shape != shape:
        raise InputError(f"latents: found shape {given.shape}, expected {shape}")
    # As in diffusers, where one picture is then encoded, and chance drawn for it, once for all that are made of it
    once = streams is not None and (masks is not None or len(streams) < count)
    if pictures is not None:
        pictures = _repeated(resize_pictures(pictures, height, width), count, "image", once)
    if masks is not None:
        masks = _repeated(resize_masks(masks, height, width), count, "mask_image", once)
    scale = parts.defaults["guidance_scale"] if guidance_scale is None else guidance_scale
    return Request(
        prompts=prompts,
        negatives=negatives * (count // len(negatives)),
        seeds=seeds,
        streams=streams,
        rng=rng,
        sampler=sampler,
        scale=check_number("guidance_scale", scale, -1000, 1000),
        syntax=prompt_syntax,
        clip_skip=clip_skip or 0,
        passes=tuple(passes),
        latents=given,
        pictures=pictures,
        masks=masks,
        whole=image is None or (masks is not None and strength == 1),
        guided=_interval(cfg_interval),
        cache_interval=_cache_interval(cache),
        merged=check_number("tome", tome, 0, 0.75),
    )


def _streams(generator: Any, count: int, seed: int | Sequence[int] | None, rng: str) -> tuple[list[Noise], list[int]]:
    """Return the streams of generators, and the seeds that they began with."""
    if seed is not None or rng != "cpu":
        raise InputError("generator: found one beside a seed or rng, expected one of the two")
    streams, seeds = noise_of(generator, count)
    return streams, seeds


def _size(
    parts: ModelParts, height: int | None, width: int | None, latents: np.ndarray | None, pictures: np.ndarray | None
) -> tuple[int, int]:
    """Return the size asked for, or that of what was given to start from, or the model's own."""
    factor = parts.vae.factor
    own = parts.default_size
    if latents is not None and latents.ndim == 4:
        own = latents.shape[2] * factor, latents.shape[3] * factor
    elif pictures is not None:
        own = pictures.shape[1] // factor * factor, pictures.shape[2] // factor * factor
    return check_size(
        own[0] if height is None else height, own[1] if width is None else width, factor, parts.pixel_bytes()
    )


def _second(
    parts: ModelParts, sampler: Sampler, first: Pass, scale: float, steps: int | None, strength: float | None
) -> Pass:
    """Plan the refining pass at a larger size."""
    scale = check_number("hires_scale", scale, 1, MAX_SCALE)
    factor = parts.vae.factor
    height, width = (int(side * scale) // factor * factor for side in (first.height, first.width))
    check_size(height, width, factor, parts.pixel_bytes())
    steps = steps or first.steps
    sampler.plan(steps)  # for its errors
    strength = check_number("hires_strength", strength, 0, 1, HIRES_STRENGTH)
    return Pass(height, width, steps, sampler.start_call(steps, strength))


def _repeated(values: np.ndarray, count: int, name: str, once: bool) -> np.ndarray:
    """Give one for each picture, or `once` what was given if it is one for all."""
    if len(values) not in {1, count}:
        raise InputError(f"{name}: found {len(values)} for {count} pictures, expected as many or one")
    return values if once or len(values) == count else np.repeat(values, count, axis=0)


def _interval(values: tuple[float, float]) -> tuple[float, float]:
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != 2:
        raise InputError(f"cfg_interval: found {values!r:.80}, expected two numbers from 0 to 1, such as (0, 0.8)")
    first, last = (check_number("cfg_interval", value, 0, 1) for value in values)
    if first > last:
        raise InputError(f"cfg_interval: found {first:g} to {last:g}, expected the smaller number first")
    return first, last


def _cache_interval(cache: str | None) -> int:
    if cache is None:
        return 1
    number = cache.removeprefix(DEEPCACHE) if isinstance(cache, str) and cache.startswith(DEEPCACHE) else ""
    if not (number.isascii() and number.isdigit() and 1 <= int(number[:9]) <= 1000):
        raise InputError(f"cache: found {cache!r:.80}, expected {DEEPCACHE}N, such as {DEEPCACHE}3")
    return int(number)
