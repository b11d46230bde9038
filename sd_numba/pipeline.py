"""From a prompt to a picture: tokenizer, text encoder, sampler and UNet on latents, decoder.

The pipeline yields its steps, so that progress bars, previews and cancelling need no callbacks; calling it drains them.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import kernels

from . import layers
from .arguments import check_choice, check_prompts, check_size, check_whole, resolve_seeds
from .embedding import read_embedding
from .errors import InputError, ModelError
from .limits import available_memory
from .lora import Modules, read_lora
from .model import NETWORKS, V_SIZE, Model, open_model
from .noise import make_noise
from .samplers import SAMPLER_NAMES, Sampler, canonical_sampler_name, make_sampler, sampler_name_from_config
from .single_file import unet_names_of
from .taesd import TinyVae, taesd_files
from .text_encoder import TextEncoder
from .unet import EncodedContext, UNet
from .vae import Vae
from .weights import find_nonfinite

log = logging.getLogger(__name__)

PRECISIONS = (*layers.PRECISIONS, "auto")
# The coarsest products that a part bears: texts are short, so theirs take no time that would count.
COARSEST = {"text_encoder": "f32", "unet": "int8", "vae": "bf16"}
PRODUCTS = {"f32": (), "bf16": ("bf16",), "int8": ("bf16", "int8")}  # precision -> those of products, beside float32
WEIGHT_POLICIES = ("auto", "mmap", "packed")
TILINGS = ("auto", "on", "off")
OUTPUT_TYPES = ("pil", "np", "latent")
PACK_BELOW = 256 << 20  # bytes of float32 weights that a network may have to be kept packed by `auto`
# Of anonymous memory that decoding takes for a pixel, measured on SD 1.5: as a whole, in strips, by a tiny autoencoder.
DECODER_BYTES, STRIP_BYTES, TINY_BYTES = 2800, 1200, 400
ROOMY = 0.75  # of the available memory may be filled by decoding as a whole, if tiling is `auto`
MAX_LORA_WEIGHT = 1000
TEXTS = 8  # prompts that go through the text encoder together, at most
PASS_PIXELS = 64 * 64  # latent pixels, over all images, that go through the UNet in one pass if more than one image


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
    """

    index: int
    total: int
    timestep: float
    latents: np.ndarray
    seconds: float


@dataclass(frozen=True)
class PipelineOutput:
    """Pictures (PIL images, or an array for ``np`` and ``latent``), the seed of each, and the seconds of each stage."""

    images: Any
    seeds: list[int]
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Job:
    """A checked request."""

    prompts: list[str]
    negatives: list[str]
    height: int
    width: int
    sampler: Sampler
    steps: int
    scale: float
    seeds: list[int]
    rng: str
    latents: np.ndarray | None


class StableDiffusionPipeline:
    """Text to image with a model of the Stable Diffusion 1.x and 2.x families.

    Attributes
    ----------
    tokenizer, text_encoder, unet, vae
        The networks; each can be called by itself.
    scheduler_config : dict
        The model's own sampler settings.
    name : str
        Name of the model, for metadata.
    precision : {"f32", "bf16", "int8"}
        Of the products, as this CPU does them.
    vae_tiling : {"auto", "on", "off"}
        Whether large pictures are decoded in strips, as `Vae.decode` does; ``auto``: if memory would be short.
    defaults : dict
        Settings of `generate` that are not given: what the model advises, or else 20 steps, guidance 7.5 and the
        sampler of its ``scheduler_config.json`` (None: one that is not supported).

    Examples
    --------
    >>> from sd_numba import StableDiffusionPipeline
    >>> pipe = StableDiffusionPipeline.from_pretrained()
    >>> out = pipe("a red apple on a blue background", num_inference_steps=20, guidance_scale=4, seed=42)
    >>> out.images[0].save("apple.png")
    """

    text_encoder: TextEncoder
    unet: UNet
    vae: Vae | TinyVae

    def __init__(self, model: Model, taesd: str | os.PathLike[str] | None = None, precision: str = "f32") -> None:
        self.scheduler_config, self.name, self.vae_tiling = model.scheduler, model.name, "auto"
        self.defaults = {
            "num_inference_steps": 20,
            "guidance_scale": 7.5,
            "scheduler": _own_sampler(model.scheduler),
            **model.defaults,
        }
        self._networks = {part: network for part, (network, _) in NETWORKS.items()}
        parts = [part for part in NETWORKS if part != "vae" or taesd is None]
        self._configs = {part: NETWORKS[part][1](getattr(model, part)) for part in parts}
        self.tokenizer = model.open_tokenizer(self._configs["text_encoder"].vocab_size)
        self._weights = {part: model.weights(part) for part in parts}
        self.precision = self._able(precision)
        if taesd is not None:
            self._networks["vae"] = TinyVae
            self._weights["vae"], self._configs["vae"] = taesd_files(taesd)
        self._vectors = np.empty((0, self._configs["text_encoder"].hidden_size), np.float32)
        for part in NETWORKS:
            self._build(part)
            self._weights[part].finish()
        self._check_parts(model)

    def _build(self, part: str) -> None:
        setattr(self, part, self._networks[part](self._weights[part], self._configs[part]))
        self.text_encoder.token_embedding.more = self._vectors

    def _is_small(self, part: str) -> bool:
        source = self._weights[part]
        return 4 * sum(math.prod(source.info(name).shape) for name in source.names()) < PACK_BELOW

    def _able(self, precision: str) -> str:
        """Return the precision that this model and CPU compute in if this one is wanted."""
        able = kernels.precisions()
        if precision == "auto":  # what a small one saves in its steps, loading takes
            return "f32" if self._is_small("unet") else able[-1]
        if precision in able:
            return precision
        log.warning("precision %s: this CPU has no instructions for it; computing in f32", precision)
        return "f32"

    def _check_parts(self, model: Model) -> None:
        """Raise ModelError unless the parts of the model belong together."""
        path, levels = model.path, model.vae.get("block_out_channels")
        width, latents = self.text_encoder.config.hidden_size, self.vae.config.latent_channels
        factor = 2 ** (len(levels) - 1) if isinstance(levels, list | tuple) else self.vae.factor
        unet = self.unet.config
        if unet.in_channels > unet.out_channels == latents:
            raise ModelError(
                f"{path}: its UNet takes {unet.in_channels} channels, {latents} of them latents: a model for "
                "inpainting or editing; expected one for text to image"
            )
        if width != unet.cross_attention_dim:
            raise ModelError(
                f"{path}: its text encoder is {width} wide, but its UNet expects {unet.cross_attention_dim}; "
                "the parts are of two models"
            )
        found, needed = (latents, self.vae.factor), (unet.in_channels, factor)
        if found != needed:
            says = "latents of {} channels, {} times smaller than pictures".format
            source = self._weights["vae"].path
            raise ModelError(f"{source}: found {says(*found)}, but the model needs {says(*needed)}")

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
            File or folder of a tiny autoencoder that takes the place of either, as for `sd_numba.taesd.open_taesd`.
        vae_tiling : {"auto", "on", "off"}
            The attribute of that name.

        Returns
        -------
        StableDiffusionPipeline

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
        pipe.vae_tiling = vae_tiling
        pipe.prepare(weights)
        return pipe

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

    def prepare(self, weights: str = "auto") -> None:
        """Make and pack weights as `from_pretrained` says; find out what the UNet predicts if its file does not say.

        Raises
        ------
        InputError
            If weights is none of those that `from_pretrained` takes.
        """
        check_choice("weights", weights, WEIGHT_POLICIES)
        for part, source in self._weights.items():
            packed = weights == "packed" or (weights == "auto" and self._is_small(part))
            precision = min(self.precision, COARSEST[part], key=layers.PRECISIONS.index)
            if (packed, precision) != (source.packed, source.precision):
                source.packed, source.precision = packed, precision
                self._build(part)
                source.release()  # what was packed or made bytes of
        if self.scheduler_config.get("prediction_type", "") is None:
            velocity = _predicts_velocity(self.unet)
            self.scheduler_config = {
                **self.scheduler_config,
                "prediction_type": "v_prediction" if velocity else "epsilon",
            }
            if velocity:
                self._configs["unet"] = replace(self.unet.config, sample_size=V_SIZE)
                self._build("unet")

    def load_lora_weights(
        self, path: str | os.PathLike[str], weight: float = 1.0, *, text_encoder_weight: float | None = None
    ) -> None:
        """Add a LoRA or LoCon to the UNet and the text encoder; several add up.

        The mapped weights stay as they are. It costs a few hundredths of the time of a step, or nothing in layers whose
        weights are packed.

        Parameters
        ----------
        path : path
            A safetensors file of kohya's scripts, diffusers or PEFT.
        weight : float
            Strength, from -1000 to 1000.
        text_encoder_weight : float, optional
            Another strength in the text encoder.

        Raises
        ------
        ModelError
            The file is damaged, holds something else, or is for another model.
        InputError
            A weight is no such number.
        """
        weights = {"unet": weight, "text_encoder": weight if text_encoder_weight is None else text_encoder_weight}
        for value in weights.values():
            if not isinstance(value, int | float | np.number) or not abs(value) <= MAX_LORA_WEIGHT:
                raise InputError(f"LoRA {path}: found weight {value!r:.40}, expected -1000 to 1000, usually 0 to 1")
        shapes = {p: {name: self._weights[p].info(name).shape for name in self._weights[p].names()} for p in weights}
        for update in read_lora(path, Modules(shapes, unet_names_of(self.unet.config))):
            scale = float(weights[update.network]) * update.scale
            self._weights[update.network].add_updates(update.module, update.up, update.down, scale)
        for part in weights:
            self._build(part)

    def unload_lora_weights(self) -> None:
        """Take away every LoRA."""
        for part in ("text_encoder", "unet"):
            self._weights[part].clear_updates()
            self._build(part)

    def load_textual_inversion(self, path: str | os.PathLike[str], token: str | None = None) -> None:
        """Let a word in prompts stand for the vectors of a textual inversion embedding.

        Parameters
        ----------
        path : path
            A safetensors file of AUTOMATIC1111's web UI or diffusers.
        token : str, optional
            The word; by default the file's name without its ending.

        Raises
        ------
        ModelError
            The file is damaged, holds something else, or is for another family of models.
        InputError
            The word is empty, or stands for another embedding.
        """
        vectors = read_embedding(path, self.text_encoder.config.hidden_size)
        first = len(self.text_encoder.token_embedding)
        self.tokenizer.add_word(Path(path).stem if token is None else token, range(first, first + len(vectors)))
        self._vectors = np.concatenate([self._vectors, vectors])
        self._build("text_encoder")

    @property
    def unet_files(self) -> list[Path]:
        """Files that hold the UNet: they tell models apart."""
        return self._weights["unet"].files

    @property
    def scheduler_names(self) -> tuple[str, ...]:
        """Names that ``scheduler=`` takes."""
        return SAMPLER_NAMES

    def scheduler_name(self, name: str | None = None) -> str:
        """Return our spelling of a sampler's name; without a name, that of the sampler that runs by default.

        Raises
        ------
        InputError
            If no sampler has that name.
        ModelError
            Without a name, if the model's own sampler is not supported.
        """
        if name is None:
            name = self.defaults["scheduler"]
        if name is None:
            try:
                name = sampler_name_from_config(self.scheduler_config)
            except ModelError as error:
                raise ModelError(f"{error}; or choose a sampler, such as euler") from None
        return canonical_sampler_name(name)

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width that the model was made for."""
        side = self.unet.config.sample_size
        height, width = side if isinstance(side, tuple) else (side, side)
        return height * self.vae.factor, width * self.vae.factor

    def __call__(
        self, prompt: str | Sequence[str], *, num_images_per_prompt: int = 1, output_type: str = "pil", **options: Any
    ) -> PipelineOutput:
        """Make pictures.

        Parameters
        ----------
        prompt : str or list of str
        num_images_per_prompt : int
            How many pictures of each prompt.
        output_type : {"pil", "np", "latent"}
            PIL images; float32 ``(b, h, w, 3)`` in [0, 1]; or the sampler's last latents, float32
            ``(b, 4, h/8, w/8)``, still scaled.
        **options
            Those of `generate`.

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
        prompts = check_prompts("prompt", prompt)
        check_whole("num_images_per_prompt", num_images_per_prompt, 1, 1000)
        negatives = check_prompts("negative_prompt", options.get("negative_prompt") or "")
        if len(negatives) == len(prompts):
            options["negative_prompt"] = [n for n in negatives for _ in range(num_images_per_prompt)]
        prompts = [p for p in prompts for _ in range(num_images_per_prompt)]
        options["seed"] = resolve_seeds(options.get("seed"), len(prompts))
        start = time.perf_counter()
        steps = self.generate(prompts, **options)
        seconds = {"sampling": 0.0}
        latents = np.empty(0, np.float32)
        with kernels.reuse():
            for step in steps:
                latents = step.latents
                seconds["sampling"] += step.seconds
            seconds["text"] = time.perf_counter() - start - seconds["sampling"]
            if output_type == "latent":
                return PipelineOutput(latents, options["seed"], seconds)
            start = time.perf_counter()
            images = self.decode(latents)
            seconds["decode"] = time.perf_counter() - start
        return PipelineOutput(to_pil(images) if output_type == "pil" else images, options["seed"], seconds)

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
        scheduler: str | None = None,
        eta: float = 0.0,
        rng: str = "cpu",
        latents: np.ndarray | None = None,
    ) -> Iterator[Step]:
        """Check the arguments, then return an iterator over the steps.

        Parameters
        ----------
        prompt : str or list of str
            One picture each.
        negative_prompt : str or list of str, optional
            What to steer away from.
        width, height : int, optional
            Pixels; multiples of the VAE factor (8 for SD 1.5). By default those of `latents`, or what the model was
            made for.
        num_inference_steps : int, optional
            By default one of `defaults`, as the next two.
        guidance_scale : float, optional
            Of classifier-free guidance (Ho and Salimans, arXiv:2207.12598); up to 1 there is none, and half the work.
        seed : int or list of int, optional
            Of the first picture (the others count on from there), or of each; random by default.
        scheduler : str, optional
            One of `scheduler_names`.
        eta : float
            Noise that ``ddim`` adds.
        rng : {"cpu", "cuda"}
            Whose random numbers a seed stands for: torch's on the CPU, or on a GPU.
        latents : ndarray, optional
            Noise of unit variance to start from, ``(b, 4, h/8, w/8)``.

        Returns
        -------
        iterator of Step

        Raises
        ------
        InputError
            If an argument does not fit.
        """
        prompts = check_prompts("prompt", prompt)
        negatives = check_prompts("negative_prompt", negative_prompt or "")
        if len(negatives) not in {1, len(prompts)}:
            raise InputError(f"negative_prompt: found {len(negatives)} for {len(prompts)} prompts, expected as many")
        if latents is not None:
            latents = np.array(latents, np.float32)
            if latents.ndim == 4:
                height = latents.shape[2] * self.vae.factor if height is None else height
                width = latents.shape[3] * self.vae.factor if width is None else width
        default_height, default_width = self.default_size
        height, width = check_size(
            default_height if height is None else height, default_width if width is None else width,
            self.vae.factor, self._pixel_bytes(),
        )  # fmt: skip
        sampler = make_sampler(self.scheduler_name(scheduler), self.scheduler_config, eta)
        steps = self.defaults["num_inference_steps"] if num_inference_steps is None else num_inference_steps
        sampler.plan(steps)  # for its errors
        scale = self.defaults["guidance_scale"] if guidance_scale is None else guidance_scale
        if not isinstance(scale, (int, float, np.number)) or not np.isfinite(scale):
            raise InputError(f"guidance_scale: found {scale!r:.80}, expected a finite number, usually 3 to 10")
        make_noise(rng, 0)
        shape = (len(prompts), self.unet.config.in_channels, height // self.vae.factor, width // self.vae.factor)
        if latents is not None and latents.shape != shape:
            raise InputError(f"latents: found shape {latents.shape}, expected {shape}")
        job = _Job(
            prompts, negatives * (len(prompts) // len(negatives)), height, width, sampler, steps,
            float(scale), resolve_seeds(seed, len(prompts)), rng, latents,
        )  # fmt: skip
        return self._run(job)

    def _run(self, job: _Job) -> Iterator[Step]:
        shape = (1, self.unet.config.in_channels, job.height // self.vae.factor, job.width // self.vae.factor)
        sources = [make_noise(job.rng, seed) for seed in job.seeds]

        def normal() -> np.ndarray:
            return np.concatenate([source.normal(shape) for source in sources])

        noise = normal() if job.latents is None else job.latents
        contexts = self._contexts(job)
        plan = job.sampler.plan(job.steps)
        x = (noise * plan.init_noise_sigma).astype(np.float32)
        history = None
        for index in range(len(plan)):
            start = time.perf_counter()
            model_input = job.sampler.scale_model_input(x, plan, index)
            predicted = self._predict(model_input, plan.timesteps[index], contexts, job)
            x, history = job.sampler.step(predicted, x, plan, index, history, normal)
            if not np.isfinite(x).all():
                raise self._not_finite(f"step {index + 1} of {len(plan)}")
            if index + 1 == len(plan):
                self._weights["unet"].release()  # what decoding needs at most then does not come on top of these
            yield Step(index, len(plan), float(plan.timesteps[index]), x, time.perf_counter() - start)

    def _contexts(self, job: _Job) -> list[tuple[slice, EncodedContext]]:
        """Encode the prompts, in groups of pictures that go through the UNet together."""
        texts = sorted({*job.prompts, *(job.negatives if job.scale > 1 else ())})
        encoded: dict[str, np.ndarray] = {}
        for first in range(0, len(texts), TEXTS):
            some = texts[first : first + TEXTS]
            encoded.update(zip(some, self.text_encoder(self.tokenizer(some)), strict=True))
        self._weights["text_encoder"].release()
        if not all(np.isfinite(e).all() for e in encoded.values()):
            raise self._not_finite("the text encoder")
        pixels = (job.height // self.vae.factor) * (job.width // self.vae.factor)
        size = max(1, PASS_PIXELS // pixels)
        groups = []
        for first in range(0, len(job.prompts), size):
            part = slice(first, min(first + size, len(job.prompts)))
            texts = [*(job.negatives[part] if job.scale > 1 else ()), *job.prompts[part]]
            groups.append((part, self.unet.encode_context(np.stack([encoded[text] for text in texts]))))
        return groups

    def _predict(
        self, x: np.ndarray, timestep: float, contexts: list[tuple[slice, EncodedContext]], job: _Job
    ) -> np.ndarray:
        """Ask the UNet, with guidance: away from the negative prompt, towards the prompt."""
        outputs = []
        for part, context in contexts:
            if job.scale > 1:
                away, towards = np.split(self.unet(x[part], timestep, context), 2)
                outputs.append(away + np.float32(job.scale) * (towards - away))
            else:
                outputs.append(self.unet(x[part], timestep, context))
        return np.concatenate(outputs)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Turn a sampler's last latents ``(b, 4, h, w)`` into pictures, float32 ``(b, 8h, 8w, 3)`` in [0, 1].

        Raises
        ------
        ModelError
            If the decoder makes no numbers (NaN).
        """
        latents = latents / np.float32(self.vae.config.scaling_factor)
        if isinstance(self.vae, Vae):
            images = self.vae.decode(latents, tiling=self._tiled(latents.shape[2] * latents.shape[3]))
        else:
            images = self.vae.decode(latents)
        if not np.isfinite(images).all():
            raise self._not_finite("the decoder")
        images *= np.float32(0.5)
        images += np.float32(0.5)
        return np.ascontiguousarray(np.clip(images, 0, 1, out=images).transpose(0, 2, 3, 1))

    def _pixel_bytes(self) -> int:
        """Return how much memory decoding takes for a pixel, at least."""
        if isinstance(self.vae, TinyVae):
            return TINY_BYTES
        return DECODER_BYTES if self.vae_tiling == "off" else STRIP_BYTES

    def _tiled(self, latent_pixels: int) -> bool:
        """Return whether to decode a picture in strips."""
        check_choice("vae_tiling", self.vae_tiling, TILINGS)
        needed = latent_pixels * self.vae.factor**2 * DECODER_BYTES
        return self.vae_tiling == "on" or (self.vae_tiling == "auto" and needed > ROOMY * available_memory())

    def _not_finite(self, where: str) -> ModelError:
        """Find out whose fault it is that a result holds NaN or infinity."""
        for weights in self._weights.values():
            for name, count in find_nonfinite(weights):
                return ModelError(
                    f"{weights.path}: tensor {name} holds NaN or infinite values ({count}); download the file again"
                )
        return ModelError(
            f"{where} gave NaN or infinite values, although all weights are finite; "
            "a lower guidance scale or another sampler may help"
        )


def _predicts_velocity(unet: UNet) -> bool:
    """Tell noise from velocity by what the UNet makes of grey latents at the noisiest timestep.

    There the noise to predict is about the latents, the velocity far below them: AUTOMATIC1111's web UI tells the
    models of family 2.x apart so, with the same numbers.
    """
    grey = np.full((1, unet.config.in_channels, 8, 8), 0.5, np.float32)
    context = np.full((1, 2, unet.config.cross_attention_dim), 0.5, np.float32)
    return float(np.mean(unet(grey, 999, context) - grey)) < -1


def with_prediction_type(model: Model) -> Model:
    """Find out what a model's UNet predicts, if its file does not say: for what is written elsewhere."""
    if model.scheduler.get("prediction_type", "") is not None:
        return model
    pipe = StableDiffusionPipeline(model)
    pipe.prepare("mmap")
    return replace(
        model, scheduler=pipe.scheduler_config, unet={**model.unet, "sample_size": pipe.unet.config.sample_size}
    )


def to_pil(images: np.ndarray) -> list[Image.Image]:
    """Turn float pictures ``(b, h, w, 3)`` in [0, 1] into PIL images."""
    return [Image.fromarray(picture) for picture in (images * 255).round().astype(np.uint8)]


def _own_sampler(scheduler_config: Mapping[str, Any]) -> str | None:
    """Name the sampler of a model, or None: another one may be chosen for a model whose own is not supported."""
    try:
        return sampler_name_from_config(scheduler_config)
    except ModelError:
        return None
