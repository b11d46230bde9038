"""A request for pictures, checked before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..checks import check_prompts, check_size, check_whole, resolve_seeds
from ..errors import InputError, argument
from ..pictures.arrays import as_masks, as_pictures, masks_to_pil, resize_masks, resize_pictures, to_pil
from ..pictures.canvas import lay_out
from ..samplers import Sampler, make_sampler
from ..samplers.generators import noise_of
from ..samplers.noise import Noise, make_noise
from .model import Model
from .settings import DEEPCACHE, HIRES_STRENGTH, IMAGE_STRENGTH, MASK_STRENGTH, Settings


@dataclass(frozen=True)
class Pass:
    """One sampling pass: from noise, or from noisy latents, to clean latents.

    Attributes
    ----------
    height, width : int
        Size of the picture in pixels.
    steps : int
        Steps of the whole schedule.
    start : int
        The first call of the network.
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
        One of each for every picture.
    streams : list of Noise, optional
        Noise sources that replace the seeds: one for each picture, or one for all.
    passes : tuple of Pass
        The first makes the picture, a second one refines it at a larger size.
    pictures : float32 array ``(b, height, width, 3)`` in [0, 1], optional
        Pictures to start from; with streams, one (b = 1) may serve all.
    masks : float32 array ``(b, height, width)`` of 0 and 1, optional
        1 where to paint; with streams, one (b = 1) may serve all.
    whole : bool
        Whether the first pass starts from noise alone, whatever the pictures.
    guided : tuple of float
        Shares of a pass's calls at which guidance begins and ends.
    cache_interval : int
        The whole UNet is computed once in this many calls; see `sd_numba.networks.unet.FeatureCache`.
    token_merging : float
        Share of tokens to merge in self-attention.
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
    token_merging: float

    def sources(self) -> list[Noise]:
        """Return the noise sources of a pass."""
        return self.streams or [make_noise(self.rng, seed) for seed in self.seeds]


def check_request(
    model: Model, settings: Settings, *, generator: Any = None, latents: np.ndarray | None = None
) -> Request:
    """Check the arguments of `sd_numba.StableDiffusionPipeline.generate`, which documents them, against the model.

    Raises
    ------
    InputError
        An argument cannot be used.
    """
    settings.check()
    prompts, negatives = prompts_of(settings)
    count = len(prompts)
    check_whole("clip_skip", settings.clip_skip or 0, 0, model.text_encoder.config.num_hidden_layers - 1)
    _check_start(settings, latents)
    pictures, masks = _start(model, settings)
    given = np.array(latents, np.float32) if latents is not None else None
    height, width = _size(model, settings, given, pictures)
    sampler = make_sampler(model.scheduler_name(settings.scheduler), model.scheduler_config, settings.eta)
    steps = settings.num_inference_steps
    steps = model.defaults["num_inference_steps"] if steps is None else steps
    sampler.plan(steps)  # raises if the number cannot be used
    start, whole = 0, True
    if pictures is not None:
        strength = settings.strength
        if strength is None:
            strength = IMAGE_STRENGTH if masks is None else MASK_STRENGTH
        start, whole = sampler.start_call(steps, strength), masks is not None and strength == 1
    passes = [Pass(height, width, steps, start)]
    if settings.hires_scale is not None:
        passes.append(_second(model, sampler, passes[0], settings.hires_scale, settings))
    streams, seeds = None, []
    if generator is None:
        seeds = resolve_seeds(settings.seed, count)
    else:
        streams, seeds = _streams(generator, count, settings)
    shape = (count, *model.latent_shape(height, width))
    if given is not None and given.shape != shape:
        raise InputError(f"latents: found shape {given.shape}, expected {shape}")
    # As in diffusers: one picture is then encoded once, with one draw of noise, for all pictures made from it
    once = streams is not None and (masks is not None or len(streams) < count)
    if pictures is not None:
        pictures = _repeated(resize_pictures(pictures, height, width), count, "image", once)
    if masks is not None:
        masks = _repeated(resize_masks(masks, height, width), count, "mask_image", once)
    scale = settings.guidance_scale
    first, last = settings.cfg_interval
    return Request(
        prompts=prompts,
        negatives=negatives * (count // len(negatives)),
        seeds=seeds,
        streams=streams,
        rng=settings.rng,
        sampler=sampler,
        scale=float(model.defaults["guidance_scale"] if scale is None else scale),
        syntax=settings.prompt_syntax,
        clip_skip=settings.clip_skip or 0,
        passes=tuple(passes),
        latents=given,
        pictures=pictures,
        masks=masks,
        whole=whole,
        guided=(float(first), float(last)),
        cache_interval=1 if settings.cache is None else int(settings.cache.removeprefix(DEEPCACHE)),
        token_merging=float(settings.tome),
    )


def prompts_of(settings: Settings) -> tuple[list[str], list[str]]:
    """Return the prompts, and the negative prompts: one for all, or one for each."""
    prompts = check_prompts("prompt", settings.prompt)
    negatives = check_prompts("negative_prompt", settings.negative_prompt or "")
    if len(negatives) not in {1, len(prompts)}:
        raise InputError(f"negative_prompt: found {len(negatives)} for {len(prompts)} prompts, expected as many or one")
    return prompts, negatives


def _check_start(settings: Settings, latents: np.ndarray | None) -> None:
    """Raise InputError if the arguments for the start contradict each other."""
    if settings.image is None:
        for name in ("mask_image", "strength", "expand"):
            if getattr(settings, name) is not None:
                raise InputError(f"{argument(name)} needs {argument('image')} as well", name=name)
    elif latents is not None:
        raise InputError(f"latents and {argument('image')} exclude each other")
    elif settings.hires_scale is not None:
        raise InputError(
            f"{argument('hires_scale')} and {argument('image')} exclude each other; "
            f"{argument('width')} and {argument('height')} enlarge a picture"
        )


def _start(model: Model, settings: Settings) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return the pictures to start from, enlarged by the borders to paint, and the masks."""
    pictures = None if settings.image is None else as_pictures(settings.image, "image")
    masks = None if settings.mask_image is None else as_masks(settings.mask_image, "mask_image")
    if pictures is None or settings.expand is None:
        return pictures, masks
    count = max(len(pictures), 1 if masks is None else len(masks))
    drawn = to_pil(_repeated(pictures, count, "image"))
    painted = [None] * count if masks is None else masks_to_pil(_repeated(masks, count, "mask_image"))
    own, factor = model.default_size, model.vae.factor
    canvases = [
        lay_out(
            picture, mask, borders=settings.expand, height=settings.height, width=settings.width,
            own_size=own, factor=factor,
        )
        for picture, mask in zip(drawn, painted, strict=True)
    ]  # fmt: skip
    return as_pictures([c.picture for c in canvases], "image"), as_masks([c.mask for c in canvases], "mask_image")


def _streams(generator: Any, count: int, settings: Settings) -> tuple[list[Noise], list[int]]:
    """Return the streams of generators, and the seeds that they started from."""
    if settings.seed is not None or settings.rng != "cpu":
        raise InputError("generator excludes seed and rng")
    streams, seeds = noise_of(generator, count)
    return streams, seeds


def _size(model: Model, settings: Settings, latents: np.ndarray | None, pictures: np.ndarray | None) -> tuple[int, int]:
    """Return the requested size, else that of the given latents or pictures, else the model's own."""
    factor = model.vae.factor
    own = model.default_size
    if latents is not None and latents.ndim == 4:
        own = latents.shape[2] * factor, latents.shape[3] * factor
    elif pictures is not None:
        own = pictures.shape[1] // factor * factor, pictures.shape[2] // factor * factor
    height = own[0] if settings.height is None else settings.height
    width = own[1] if settings.width is None else settings.width
    return check_size(height, width, factor, model.pixel_bytes())


def _second(model: Model, sampler: Sampler, first: Pass, scale: float, settings: Settings) -> Pass:
    """Plan the refining pass at a larger size."""
    factor = model.vae.factor
    height, width = (int(side * scale) // factor * factor for side in (first.height, first.width))
    check_size(height, width, factor, model.pixel_bytes())
    steps = settings.hires_steps or first.steps
    sampler.plan(steps)  # raises if the number cannot be used
    strength = HIRES_STRENGTH if settings.hires_strength is None else settings.hires_strength
    return Pass(height, width, steps, sampler.start_call(steps, strength))


def _repeated(values: np.ndarray, count: int, name: str, once: bool = False) -> np.ndarray:
    """Return one for each picture; with `once`, a single one is returned as it is."""
    if len(values) not in {1, count}:
        raise InputError(f"{name}: found {len(values)} for {count} pictures, expected as many or one")
    return values if once or len(values) == count else np.repeat(values, count, axis=0)
