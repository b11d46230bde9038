"""From a prompt, or a picture, to pictures: the class that Python programs call.

It yields its steps, so that progress bars, previews, cancelling and resuming need no callbacks; calling it runs all
of them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from . import kernels
from .checkpoints.finding import find_tagged, named_embeddings
from .checkpoints.opening import Checkpoint, open_model
from .checks import check_choice, check_prompts, check_whole, resolve_seeds
from .errors import InputError
from .generation.model import PRECISIONS, TILINGS, WEIGHT_POLICIES, Lora, Model
from .generation.request import check_request, prompts_of
from .generation.run import Generation
from .generation.settings import Settings
from .prompts.syntax import expand_variants
from .prompts.tags import split_tags

P = TypeVar("P", bound="Pipeline")

OUTPUT_TYPES = ("pil", "np", "latent")
MAX_PICTURES = 1000  # of a prompt in one call


@dataclass(frozen=True)
class PipelineOutput:
    """Pictures (PIL images, or an array for ``np`` and ``latent``), the seed of each, and the seconds of each stage.

    `nsfw_content_detected` is None, as in diffusers without a safety checker: nothing looks at the pictures.
    """

    images: Any
    seeds: list[int]
    seconds: dict[str, float] = field(default_factory=dict)
    nsfw_content_detected: None = None


class Pipeline(Model):
    """Text to image, image to image and inpainting with a model of the Stable Diffusion 1.x and 2.x families.

    `from_pretrained` opens a model. `sd_numba.StableDiffusionPipeline` is this class with diffusers' methods added.

    Attributes
    ----------
    tokenizer, text_encoder, unet, vae
        The networks; each can be called by itself.
    lora_dir, embedding_dir : path, optional
        Folders of the LoRAs that ``<lora:NAME:WEIGHT>`` in prompts means, and of the textual inversion embeddings that
        prompts name.
    """

    lora_dir: str | os.PathLike[str] | None = None
    embedding_dir: str | os.PathLike[str] | None = None

    def __init__(self, model: Checkpoint, taesd: str | os.PathLike[str] | None = None, precision: str = "f32") -> None:
        super().__init__(model, taesd, precision)
        self._words: set[str] = set()  # of embeddings that prompts have named

    @classmethod
    def from_pretrained(
        cls: type[P],
        model: str | os.PathLike[str] | None = None,
        *,
        precision: str = "f32",
        weights: str = "auto",
        vae: str | os.PathLike[str] | None = None,
        taesd: str | os.PathLike[str] | None = None,
        vae_tiling: str = "auto",
        lora_dir: str | os.PathLike[str] | None = None,
        embedding_dir: str | os.PathLike[str] | None = None,
    ) -> P:
        """Open a model.

        Parameters
        ----------
        model : path, optional
            Folder in diffusers layout, ``.safetensors`` file of a whole model, or id of a downloaded model; by default
            the small model that comes with the package.
        precision : {"f32", "bf16", "int8", "auto"}
            Arithmetic of the matrix products in the UNet; with ``bf16`` and ``int8``, the autoencoder computes in
            ``bf16``. Coarser is faster. ``auto`` is the fastest that this CPU has instructions for, but ``f32`` for
            small models, which gain nothing. If the CPU lacks the instructions, ``f32`` is used, with a warning.
            ``int8`` quantises the weights in memory unless the file holds int8 weights.
        weights : {"auto", "mmap", "packed"}
            Whether networks keep packed float32 copies of their weights (faster) or pack them from the mapped file
            whenever they are used (which takes no memory). ``auto`` packs networks below 256 MB.
        vae : path, optional
            File or folder of another autoencoder, instead of the model's own.
        taesd : path, optional
            File or folder of a tiny autoencoder that replaces either, as for `sd_numba.checkpoints.opening.open_taesd`.
        vae_tiling : {"auto", "on", "off"}
            Whether large pictures are decoded in strips; ``auto``: only if memory would be short.
        lora_dir, embedding_dir : path, optional
            The attributes of these names.

        Raises
        ------
        ModelError
            If files are missing, damaged, or of another kind of model.
        InputError
            If precision, weights or vae_tiling is none of the above.
        """
        check_choice("weights", weights, WEIGHT_POLICIES)
        check_choice("vae_tiling", vae_tiling, TILINGS)
        pipe = cls.open(model, precision=precision, vae=vae, taesd=taesd)
        pipe.vae_tiling, pipe.lora_dir, pipe.embedding_dir = vae_tiling, lora_dir, embedding_dir
        pipe.prepare(weights)
        return pipe

    @classmethod
    def open(
        cls: type[P],
        model: str | os.PathLike[str] | None = None,
        *,
        precision: str = "f32",
        vae: str | os.PathLike[str] | None = None,
        taesd: str | os.PathLike[str] | None = None,
    ) -> P:
        """Do the part of `from_pretrained` that needs no compiled kernel; `prepare` does the rest.

        So the command line can report errors, and change the model, before it compiles.
        """
        check_choice("precision", precision, PRECISIONS)
        return cls(open_model(model, vae, needs_vae=taesd is None), taesd, precision)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        num_images_per_prompt: int = 1,
        output_type: str = "pil",
        paste_back: bool = True,
        **options: Any,
    ) -> PipelineOutput:
        """Make pictures.

        Parameters
        ----------
        prompt : str or list of str
        num_images_per_prompt : int
            Pictures of each prompt.
        output_type : {"pil", "np", "latent"}
            PIL images; float32 ``(b, h, w, 3)`` in [0, 1]; or the sampler's last latents, float32
            ``(b, 4, h/8, w/8)``, still scaled.
        paste_back : bool
            Whether pixels outside `mask_image` are copied from `image`.
        **options
            Those of `generate`.

        Returns
        -------
        PipelineOutput

        Raises
        ------
        InputError
            If an argument cannot be used.
        ModelError
            If a network returns NaN.
        """
        return self._make(prompt, num_images_per_prompt, output_type, paste_back, options, run_all)

    def _make(
        self,
        prompt: str | Sequence[str],
        num_images_per_prompt: int,
        output_type: str,
        paste_back: bool,
        options: Mapping[str, Any],
        run_steps: Callable[[Generation], float],
    ) -> PipelineOutput:
        """Make pictures; `run_steps` runs the steps, and returns the seconds that they took."""
        check_choice("output_type", output_type, OUTPUT_TYPES)
        prompts, options = check_prompts("prompt", prompt), dict(options)
        check_whole("num_images_per_prompt", num_images_per_prompt, 1, MAX_PICTURES)
        negatives = check_prompts("negative_prompt", options.get("negative_prompt") or "")
        if len(negatives) == len(prompts):
            options["negative_prompt"] = [n for n in negatives for _ in range(num_images_per_prompt)]
        start = time.perf_counter()
        run = self.generate([p for p in prompts for _ in range(num_images_per_prompt)], **options)
        with kernels.reuse():
            sampling = run_steps(run)
            seconds = {"sampling": sampling, "text": time.perf_counter() - start - sampling}
            images: Any = run.latents
            if output_type != "latent":
                start = time.perf_counter()
                images = run.images(paste_back) if output_type == "pil" else run.arrays(paste_back)
                seconds["decode"] = time.perf_counter() - start
        return PipelineOutput(images, run.request.seeds, seconds)

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
        expand: Sequence[int] | None = None,
        prompt_syntax: str = "plain",
        clip_skip: int | None = None,
        hires_scale: float | None = None,
        hires_steps: int | None = None,
        hires_strength: float | None = None,
        cfg_interval: tuple[float, float] = (0.0, 1.0),
        cache: str | None = None,
        tome: float = 0.0,
        state: Mapping[str, Any] | None = None,
    ) -> Generation:
        """Check the arguments, then return an iterator over the steps.

        Parameters
        ----------
        prompt : str or list of str
            One picture each, or with the syntax ``a1111`` one for each of its variants ``{red|green}``.
        negative_prompt : str or list of str, optional
            What to steer away from.
        width, height : int, optional
            Pixels; multiples of the VAE factor (8 for SD 1.5). By default the size of `latents` or `image`, or the
            model's own.
        num_inference_steps : int, optional
            Sampling steps. By default the model's own, in `defaults`, as for `guidance_scale` and `scheduler`.
        guidance_scale : float, optional
            Scale of classifier-free guidance (Ho and Salimans, arXiv:2207.12598); up to 1 there is none, which halves
            the work.
        seed : int or list of int, optional
            Seed of the first prompt (the others count on from there), or one for each; random by default. The variants
            of a prompt share its seed.
        generator : Generator or torch.Generator, or list of these, optional
            Source of the noise instead of a seed, as in diffusers: one for each picture, or one for all. The next run
            continues where this one ends. The output's seeds are the generators' initial seeds, so they are the same
            for two such runs.
        scheduler : str, optional
            One of `scheduler_names`.
        eta : float
            Noise that ``ddim`` adds.
        rng : {"cpu", "cuda"}
            Random generator that a seed is for: torch's on the CPU, or on a GPU.
        latents : ndarray, optional
            Noise of unit variance to start from, ``(b, 4, h/8, w/8)``.
        image : picture or list of pictures, optional
            What to start from, instead of noise alone (Meng et al., "SDEdit", arXiv:2108.01073): PIL images, paths, or
            arrays ``(h, w, 3)`` or ``(b, h, w, 3)`` of uint8, or of floats in [0, 1]; one for all, or one each.
        mask_image : likewise, optional
            Where to paint: white; black stays as it is in `image`. Arrays are ``(h, w)`` or ``(b, h, w)``.
        strength : float, optional
            How far to change `image`: 0 keeps it, 1 ignores it. By default 0.8, or 1 with a mask, as in diffusers;
            recipes and the command line have 0.75, as stable-diffusion.cpp.
        expand : sequence of int, optional
            Pixels to paint beyond the left, top, right and bottom side of `image`. `width` and `height` are then those
            of the result.
        prompt_syntax : {"plain", "a1111"}
            ``plain`` reads prompts as diffusers does: brackets mean nothing, and text beyond 75 tokens is cut off.
            ``a1111`` reads them as AUTOMATIC1111's web UI does: ``(word:1.2)``, ``[word]``, ``[from:to:when]``,
            ``BREAK``, ``{red|green}``, ``<lora:name:weight>``, any length. It is the command line's default.
        clip_skip : int, optional
            Layers at the end of the text encoder to leave out.
        hires_scale : float, optional
            Enlarge the latents by this factor on each side and refine them in a second pass.
        hires_steps : int, optional
            Steps of the second pass's schedule; by default as many as of the first.
        hires_strength : float, optional
            `strength` of the second pass, by default 0.7.
        cfg_interval : pair of float
            Share of the steps at which guidance begins, and at which it ends (Kynkäänniemi et al., arXiv:2404.07724);
            steps outside take half the time.
        cache : str, optional
            ``deepcache:N``: compute the whole UNet only in every N-th call (Ma et al., "DeepCache", arXiv:2312.00858).
        tome : float
            Share of tokens, up to 0.75, that self-attention merges (Bolya and Hoffman, arXiv:2303.17604).
        state : mapping, optional
            The state of a `Step`, to continue after it; the other arguments must be the same, with the seeds that were
            drawn.

        Returns
        -------
        Generation
            Iterates over `Step` objects; latents sent to it replace those of the last step. Its method `images` returns
            the pictures at the end.

        Raises
        ------
        InputError
            If an argument cannot be used.
        """
        settings = Settings(
            prompt=prompt,
            negative_prompt=negative_prompt,
            prompt_syntax=prompt_syntax,
            clip_skip=clip_skip,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            seed=seed,
            width=width,
            height=height,
            scheduler=scheduler,
            eta=eta,
            rng=rng,
            image=image,
            mask_image=mask_image,
            strength=strength,
            expand=None if expand is None else tuple(expand),
            hires_scale=hires_scale,
            hires_steps=hires_steps,
            hires_strength=hires_strength,
            cfg_interval=cfg_interval,
            cache=cache,
            tome=tome,
        )
        loras = self.loras
        if prompt_syntax == "a1111":
            settings, tagged = self._read_prompts(settings, streamed=generator is not None)
            loras += tagged
        return self.run(settings, generator=generator, latents=latents, state=state, loras=loras)

    def run(
        self,
        settings: Settings,
        *,
        generator: Any = None,
        latents: np.ndarray | None = None,
        state: Mapping[str, Any] | None = None,
        loras: tuple[Lora, ...] | None = None,
    ) -> Generation:
        """Do what `generate` does, for prompts without variants and tags.

        `loras` are the run's; by default the ones that `load_lora_weights` added.
        """
        request = check_request(self, settings, generator=generator, latents=latents)
        return Generation(self, request, state, self.loras if loras is None else loras)

    def load_named_embeddings(self, texts: Collection[str]) -> None:
        """Load the embeddings of `embedding_dir` that texts name and that are not loaded yet."""
        for word, path in named_embeddings(self.embedding_dir, texts).items():
            if word not in self._words:
                self.load_textual_inversion(path, token=word)
                self._words.add(word)

    def _read_prompts(self, settings: Settings, streamed: bool) -> tuple[Settings, tuple[Lora, ...]]:
        """Read what AUTOMATIC1111's syntax says beside the text: variants, tags of LoRAs, names of embeddings.

        `streamed`: the noise comes from generators, not from seeds.
        """
        prompts, negatives = prompts_of(settings)
        variants = [expand_variants(prompt) for prompt in prompts]
        changes: dict[str, Any] = {}
        if not streamed:
            seeds = resolve_seeds(settings.seed, len(prompts))
            changes["seed"] = [seed for seed, texts in zip(seeds, variants, strict=True) for _ in texts]
        if len(negatives) > 1:
            changes["negative_prompt"] = [text for text, texts in zip(negatives, variants, strict=True) for _ in texts]
        read = [split_tags(text) for texts in variants for text in texts]
        tags = read[0][1]
        if any(others != tags for _, others in read):
            raise InputError("prompt: pictures made together must have the same LoRAs; make the others in another call")
        texts = [text for text, _ in read]
        self.load_named_embeddings((*texts, *negatives))
        loras = tuple((str(find_tagged(name, self.lora_dir)), unet, text) for name, (unet, text) in tags)
        return replace(settings, prompt=texts, **changes), loras


def run_all(run: Generation) -> float:
    """Make all steps of a run; returns the seconds that they took.

    Raises
    ------
    InputError
        There is none to make.
    """
    seconds = [step.seconds for step in run]
    if not seconds:
        raise no_steps()
    return sum(seconds)


def no_steps() -> InputError:
    """Return the error for a state after which there is no step to make."""
    return InputError("state: the run is already complete; decode its latents")
