"""From a prompt, or a picture, to a picture: tokenizer, text encoder, sampler and UNet on latents, decoder.

The pipeline yields its steps, so that progress bars, previews, cancelling and resuming need no callbacks; calling it
drains them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, overload

import numpy as np
from PIL import Image

from . import kernels
from .checkpoints.opening import open_model
from .checks import check_choice, check_prompts, check_whole, resolve_seeds
from .diffusers_api.schedulers import CompatibleParts, Scheduler, check_opening, without_idle
from .errors import InputError
from .generation.loop import Step, sample
from .generation.model import PRECISIONS, TILINGS, WEIGHT_POLICIES
from .generation.request import check_request
from .samplers.generators import noise_of

OUTPUT_TYPES = ("pil", "np", "latent")
MAX_PICTURES = 1000  # of a prompt in one call

Callback = Callable[..., Mapping[str, Any] | None]


@dataclass(frozen=True)
class PipelineOutput:
    """Pictures (PIL images, or an array for ``np`` and ``latent``), the seed of each, and the seconds of each stage.

    `nsfw_content_detected` is None, as in diffusers without a safety checker: nothing looks at the pictures.
    """

    images: Any
    seeds: list[int]
    seconds: dict[str, float] = field(default_factory=dict)
    nsfw_content_detected: None = None


class StableDiffusionPipeline(CompatibleParts):
    """Text to image, image to image and inpainting with a model of the Stable Diffusion 1.x and 2.x families.

    `from_pretrained` opens one; its attributes are those of `sd_numba.generation.model.ModelParts`.

    Examples
    --------
    >>> from sd_numba import StableDiffusionPipeline
    >>> pipe = StableDiffusionPipeline.from_pretrained()
    >>> out = pipe("a red apple on a blue background", num_inference_steps=20, guidance_scale=4, seed=42)
    >>> out.images[0].save("apple.png")
    """

    positional: ClassVar[tuple[str, ...]] = ("height", "width", "num_inference_steps")
    """Arguments of a call that may follow the prompt without their names."""
    _interrupt = False  # set by callbacks to end the run with what there is, as in diffusers

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] | None = None,
        *,
        precision: str = "f32",
        weights: str = "auto",
        vae: str | os.PathLike[str] | None = None,
        taesd: str | os.PathLike[str] | None = None,
        vae_tiling: str = "auto",
        scheduler: Scheduler | None = None,
        **idle: Any,
    ) -> StableDiffusionPipeline:
        """Open a model.

        Parameters
        ----------
        model : path, optional
            Folder in diffusers layout, ``.safetensors`` file with everything in it, or id of a model that was
            downloaded; without it, the small model that comes with the package.
        precision : {"f32", "bf16", "int8", "auto"}
            Of the products in the UNet and, if not ``f32``, in ``bf16`` those of the autoencoder: the coarser, the
            faster. ``auto`` is the fastest that this CPU has instructions for, but ``f32`` for small models, which gain
            nothing; a precision that the CPU lacks becomes ``f32``, with a warning. ``int8`` makes weights of bytes, in
            memory, unless the file has them.
        weights : {"auto", "mmap", "packed"}
            Whether networks keep packed float32 copies of their weights (faster) or pack them from the mapped file
            whenever they are used (no memory of its own). ``auto`` packs networks below 256 MB.
        vae : path, optional
            File or folder of another autoencoder, instead of the model's own.
        taesd : path, optional
            File or folder of a tiny autoencoder that takes the place of either, as for
            `sd_numba.checkpoints.opening.open_taesd`.
        vae_tiling : {"auto", "on", "off"}
            The attribute of that name.
        scheduler : Scheduler, optional
            What to sample with by default, instead of the model's own.
        **idle
            Other arguments of diffusers, which have no effect: `sd_numba.diffusers_api.schedulers.IDLE_OPENING`.

        Raises
        ------
        ModelError
            If files are missing, damaged, or of another kind of model.
        InputError
            If precision, weights or vae_tiling is none of the above, or an argument is unknown.
        """
        check_opening(idle)
        check_choice("weights", weights, WEIGHT_POLICIES)
        check_choice("vae_tiling", vae_tiling, TILINGS)
        pipe = cls.open(model, precision=precision, vae=vae, taesd=taesd)
        pipe.vae_tiling = vae_tiling
        pipe.prepare(weights)
        if scheduler is not None:
            pipe.scheduler = scheduler
        return pipe

    from_single_file = from_pretrained

    @classmethod
    def open(
        cls,
        model: str | os.PathLike[str] | None = None,
        *,
        precision: str = "f32",
        vae: str | os.PathLike[str] | None = None,
        taesd: str | os.PathLike[str] | None = None,
    ) -> StableDiffusionPipeline:
        """Do what `from_pretrained` does, but for what takes a compiled kernel: that is left to `prepare`.

        So the command line can tell errors, and change the model, before it compiles.
        """
        check_choice("precision", precision, PRECISIONS)
        return cls(open_model(model, vae, needs_vae=taesd is None), taesd, precision)

    @overload
    def __call__(
        self, prompt: str | Sequence[str], *more: Any, return_dict: Literal[True] = True, **options: Any
    ) -> PipelineOutput: ...

    @overload
    def __call__(
        self, prompt: str | Sequence[str], *more: Any, return_dict: Literal[False], **options: Any
    ) -> tuple[Any, None]: ...

    def __call__(
        self,
        prompt: str | Sequence[str],
        *more: Any,
        num_images_per_prompt: int = 1,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        **options: Any,
    ) -> PipelineOutput | tuple[Any, None]:
        """Make pictures.

        Parameters
        ----------
        prompt : str or list of str
        *more
            Those that `positional` names.
        num_images_per_prompt : int
            How many pictures of each prompt.
        output_type : {"pil", "np", "latent"}
            PIL images; float32 ``(b, h, w, 3)`` in [0, 1]; or the sampler's last latents, float32
            ``(b, 4, h/8, w/8)``, still scaled.
        return_dict : bool
            False returns ``(images, None)``.
        callback_on_step_end : callable, optional
            Called after each call of the network as ``callback(pipe, index, timestep, {"latents": latents})``; if it
            returns a mapping, its ``latents`` are gone on with. If it sets ``pipe._interrupt``, the run ends.
        **options
            Those of `generate`; those of diffusers in `sd_numba.diffusers_api.schedulers.IDLE_CALL`, as long as they
            change nothing.

        Returns
        -------
        PipelineOutput

        Raises
        ------
        InputError
            If an argument does not fit.
        ModelError
            If the model makes no numbers (NaN).
        """
        check_choice("output_type", output_type, OUTPUT_TYPES)
        options = without_idle({**self._named(more, options), **options})
        prompts = check_prompts("prompt", prompt)
        check_whole("num_images_per_prompt", num_images_per_prompt, 1, MAX_PICTURES)
        negatives = check_prompts("negative_prompt", options.get("negative_prompt") or "")
        if len(negatives) == len(prompts):
            options["negative_prompt"] = [n for n in negatives for _ in range(num_images_per_prompt)]
        prompts = [p for p in prompts for _ in range(num_images_per_prompt)]
        if options.get("generator") is None:
            options["seed"] = seeds = resolve_seeds(options.get("seed"), len(prompts))
        else:
            seeds = noise_of(options["generator"], len(prompts))[1]
        start = time.perf_counter()
        steps = self.generate(prompts, **options)
        with kernels.reuse():
            latents, sampling = self._drain(steps, callback_on_step_end)
            seconds = {"sampling": sampling, "text": time.perf_counter() - start - sampling}
            images: Any = latents
            if output_type != "latent":
                start = time.perf_counter()
                images = self.decode(latents)
                seconds["decode"] = time.perf_counter() - start
        images = to_pil(images) if output_type == "pil" else images
        return PipelineOutput(images, seeds, seconds) if return_dict else (images, None)

    def _named(self, more: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Any]:
        """Name the arguments that follow the prompt without names."""
        names, known = self.positional[: len(more)], " and ".join(self.positional)
        if len(more) > len(names) or any(name in options for name in names):
            raise InputError(f"found {len(more)} arguments after the prompt without names, expected at most {known}")
        return dict(zip(names, more, strict=True))

    def _drain(
        self, steps: Generator[Step, np.ndarray | None, None], callback: Callback | None
    ) -> tuple[np.ndarray, float]:
        """Run all steps; returns the last latents, and the seconds that the steps took."""
        self._interrupt = False
        step, seconds = next(steps, None), 0.0
        if step is None:
            raise InputError("state: found that of the last step, expected one with steps to make; decode its latents")
        while True:
            latents, sent = step.latents, None
            seconds += step.seconds
            if callback is not None:
                changed = callback(self, step.index, step.timestep, {"latents": latents})
                if changed and changed.get("latents", latents) is not latents:
                    latents = sent = np.asarray(changed["latents"], np.float32)
            try:
                if self._interrupt:
                    return latents, seconds
                step = steps.send(sent)
            except StopIteration:
                return latents, seconds

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        width: int | None = None,
        height: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | Sequence[int] | None = None,
        generator: Any = None,
        scheduler: str | None = None,
        eta: float = 0.0,
        rng: str = "cpu",
        latents: np.ndarray | None = None,
        image: Any = None,
        mask_image: Any = None,
        strength: float | None = None,
        prompt_syntax: str = "plain",
        clip_skip: int | None = None,
        hires_scale: float | None = None,
        hires_steps: int | None = None,
        hires_strength: float | None = None,
        cfg_interval: tuple[float, float] = (0.0, 1.0),
        cache: str | None = None,
        tome: float = 0.0,
        state: Mapping[str, Any] | None = None,
    ) -> Generator[Step, np.ndarray | None, None]:
        """Check the arguments, then return an iterator over the steps.

        Parameters
        ----------
        prompt : str or list of str
            One picture each.
        negative_prompt : str or list of str, optional
            What to steer away from.
        width, height : int, optional
            Pixels; multiples of the VAE factor (8 for SD 1.5). By default those of `latents` or `image`, or what the
            model was made for.
        num_inference_steps : int, optional
            By default one of `defaults`, as the next two.
        guidance_scale : float, optional
            Of classifier-free guidance (Ho and Salimans, arXiv:2207.12598); up to 1 there is none, and half the work.
        seed : int or list of int, optional
            Of the first picture (the others count on from there), or of each; random by default.
        generator : Generator or torch.Generator, or list of these, optional
            Where the noise comes from instead, as in diffusers: one for each picture, or one for all. The next run goes
            on where this one ends, so the seeds of the output, those that the generators began with, do not tell one
            such run from the next.
        scheduler : str, optional
            One of `scheduler_names`.
        eta : float
            Noise that ``ddim`` adds.
        rng : {"cpu", "cuda"}
            Whose random numbers a seed stands for: torch's on the CPU, or on a GPU.
        latents : ndarray, optional
            Noise of unit variance to start from, ``(b, 4, h/8, w/8)``.
        image : picture or list of pictures, optional
            What to start from, instead of noise alone (Meng et al., "SDEdit", arXiv:2108.01073): PIL images, paths, or
            arrays ``(h, w, 3)`` or ``(b, h, w, 3)`` of uint8, or of floats in [0, 1]; one for all, or one each.
        mask_image : likewise, optional
            Where to paint: white; black stays as it is in `image`. Arrays are ``(h, w)`` or ``(b, h, w)``.
        strength : float, optional
            How much of the schedule is run, and so of `image` is lost, in [0, 1]: by default 0.8, with a mask 1.
        prompt_syntax : {"plain", "a1111"}
            Whether prompts are read as diffusers does, where brackets mean nothing and what is longer than 75 tokens is
            cut, or as AUTOMATIC1111's web UI does: ``(word:1.2)``, ``[word]``, ``[from:to:when]``, ``BREAK``, any
            length. The command line's default is the second.
        clip_skip : int, optional
            Layers at the end of the text encoder that are left out.
        hires_scale : float, optional
            Refine the picture at this many times its size on each side, in a second pass over its enlarged latents.
        hires_steps : int, optional
            Of the second pass's schedule; by default as many as of the first.
        hires_strength : float, optional
            `strength` of the second pass, by default 0.7.
        cfg_interval : pair of float
            Share of the steps at which guidance begins, and at which it ends (Kynkäänniemi et al., arXiv:2404.07724):
            the steps outside take half the time.
        cache : str, optional
            ``deepcache:N``: only every N-th call computes the whole UNet (Ma et al., "DeepCache", arXiv:2312.00858).
        tome : float
            Share of tokens, up to 0.75, that self-attention merges (Bolya and Hoffman, arXiv:2303.17604).
        state : mapping, optional
            That of a `Step`, to go on after it; the other arguments must be as they were, with the seeds that were
            drawn.

        Returns
        -------
        generator of Step
            Latents that are sent to it take the place of those of the last step.

        Raises
        ------
        InputError
            If an argument does not fit.
        """
        options = {name: value for name, value in locals().items() if name not in {"self", "state"}}
        return sample(self, check_request(self, **options), state)


def to_pil(images: np.ndarray) -> list[Image.Image]:
    """Turn float pictures ``(b, h, w, 3)`` in [0, 1] into PIL images."""
    return [Image.fromarray(picture) for picture in (images * 255).round().astype(np.uint8)]
