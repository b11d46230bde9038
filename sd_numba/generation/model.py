"""A model, opened and made ready: networks over their weights, precision, LoRAs, embeddings, coding of pictures.

`sd_numba.pipeline` runs it.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import kernels
from ..checkpoints.embedding import read_embedding
from ..checkpoints.lora import Modules, read_lora
from ..checkpoints.opening import Checkpoint, taesd_files
from ..checkpoints.weights import find_nonfinite
from ..checks import check_choice
from ..errors import InputError, ModelError
from ..families import Conditioning
from ..families.names import unet_names_of
from ..memory import available_memory
from ..networks import layers
from ..networks.autoencoder import Autoencoder
from ..networks.clip import TextEncoder
from ..networks.taesd import TinyVae
from ..networks.unet import EncodedContext, UNet
from ..prompts.tokenizer import Tokenizer
from ..samplers import SAMPLER_NAMES, canonical_sampler_name, sampler_name_from_config
from ..samplers.noise import Noise, draw

log = logging.getLogger(__name__)

PRECISIONS = (*layers.PRECISIONS, "auto")
# The coarsest products of a network; float32 in text encoders, which take little of the time.
COARSEST = {"unet": "int8", "vae": "bf16"}
PRODUCTS = {"f32": (), "bf16": ("bf16",), "int8": ("bf16", "int8")}  # precision -> products besides float32
WEIGHT_POLICIES = ("auto", "mmap", "packed")
TILINGS = ("auto", "on", "off")
PACK_BELOW = 256 << 20  # bytes of float32 weights that a network may have to be kept packed by `auto`
ROOMY = 0.75  # of the available memory may be filled by decoding as a whole, if tiling is `auto`
MAX_LORA_WEIGHT = 1000

Lora = tuple[str, float, float]  # file, weight in the UNet, weight in the text encoder


class Model:
    """A model's tokenizers and networks, ready to be called.

    Attributes
    ----------
    tokenizer, text_encoder, unet, vae
        Each can be called by itself. Families of several text encoders have ``text_encoder_2`` and ``tokenizer_2``.
    family : Family
        The kind of model.
    scheduler_config : dict
        The model's own sampler settings.
    name : str
        Name of the model, for metadata.
    precision : {"f32", "bf16", "int8"}
        Precision of the matrix products on this CPU.
    vae_tiling : {"auto", "on", "off"}
        Whether large pictures are decoded in strips, as `Vae.decode` does; ``auto``: if memory would be short.
    defaults : dict
        Settings of a run that are not given: what the model advises, or else 20 steps, guidance 7.5 and the
        sampler of its ``scheduler_config.json`` (None: one that is not supported).
    loras : tuple of (str, float, float)
        LoRAs that `load_lora_weights` added: file, weight in the UNet, weight in the text encoder.
    """

    tokenizer: Tokenizer
    text_encoder: TextEncoder
    unet: UNet
    vae: Autoencoder

    def __init__(self, model: Checkpoint, taesd: str | os.PathLike[str] | None = None, precision: str = "f32") -> None:
        self.scheduler_config, self.name, self.vae_tiling = model.scheduler, model.name, "auto"
        self.defaults = {
            "num_inference_steps": 20,
            "guidance_scale": 7.5,
            "scheduler": _own_sampler(model.scheduler),
            **model.defaults,
        }
        self.family, networks = model.family, model.family.networks
        self._networks = {part: network.network for part, network in networks.items()}
        parts = [part for part in networks if part != "vae" or taesd is None]
        self._configs = {part: networks[part].parse(model.configs[part]) for part in parts}
        for encoder, name in model.family.tokenizers.items():
            setattr(self, name, model.tokenizer(encoder))
        self._weights = {part: model.weights(part) for part in parts}
        self.precision = self._able(precision)
        if taesd is not None:
            self._networks["vae"] = TinyVae
            self._weights["vae"], self._configs["vae"] = taesd_files(taesd)
        self.loras: tuple[Lora, ...] = ()
        self._applied: tuple[Lora, ...] | None = ()
        self._vectors = np.empty((0, self._configs["text_encoder"].hidden_size), np.float32)
        for part in networks:
            self._build(part)
            self._weights[part].finish()
        self._check_fit(model)

    def _build(self, part: str) -> None:
        setattr(self, part, self._networks[part](self._weights[part], self._configs[part]))
        self.text_encoder.token_embedding.more = self._vectors

    def _is_small(self, part: str) -> bool:
        source = self._weights[part]
        return 4 * sum(math.prod(source.info(name).shape) for name in source.names()) < PACK_BELOW

    def _able(self, precision: str) -> str:
        """Return the precision that this model and CPU use if this one is requested."""
        able = kernels.precisions()
        if precision == "auto":  # a small model takes longer to prepare than its steps save
            return "f32" if self._is_small("unet") else able[-1]
        if precision in able:
            return precision
        log.warning("precision %s: this CPU has no instructions for it; computing in f32", precision)
        return "f32"

    def _check_fit(self, model: Checkpoint) -> None:
        """Raise ModelError unless the networks fit each other."""
        path, levels = model.path, model.configs["vae"].get("block_out_channels")
        width, latents = self.family.context_width(self._configs), self.vae.config.latent_channels
        factor = 2 ** (len(levels) - 1) if isinstance(levels, list | tuple) else self.vae.factor
        unet = self.unet.config
        if unet.in_channels > unet.out_channels == latents and not self.paints_in:
            raise ModelError(
                f"{path}: its UNet takes {unet.in_channels} channels, {latents} of them latents: a model for "
                f"editing by instructions; expected {latents}, or {2 * latents + 1} for inpainting"
            )
        if width != unet.cross_attention_dim:
            raise ModelError(
                f"{path}: its text is {width} wide, but its UNet expects {unet.cross_attention_dim}; "
                "they are of two models"
            )
        found, needed = (latents, self.vae.factor), (unet.out_channels if self.paints_in else unet.in_channels, factor)
        if found != needed:
            says = "latents of {} channels, {} times smaller than pictures".format
            source = self._weights["vae"].path
            raise ModelError(f"{source}: found {says(*found)}, but the model needs {says(*needed)}")

    def prepare(self, weights: str = "auto") -> None:
        """Make and pack weights as `from_pretrained` says; find out what the UNet predicts if its file does not say.

        Raises
        ------
        InputError
            If `from_pretrained` does not take this value of weights.
        """
        check_choice("weights", weights, WEIGHT_POLICIES)
        for part, source in self._weights.items():
            packed = weights == "packed" or (weights == "auto" and self._is_small(part))
            precision = min(self.precision, COARSEST.get(part, "f32"), key=layers.PRECISIONS.index)
            if (packed, precision) != (source.packed, source.precision):
                source.packed, source.precision = packed, precision
                self._build(part)
                source.release()  # the pages that were packed or quantised
        if self.scheduler_config.get("prediction_type", "") is None and self.family.probe is not None:
            prediction = self.family.probe(self.unet)
            self.scheduler_config = {**self.scheduler_config, "prediction_type": prediction}
            if prediction == "v_prediction" and self.family.velocity_size is not None:
                self._configs["unet"] = replace(self.unet.config, sample_size=self.family.velocity_size)
                self._build("unet")

    def load_lora_weights(
        self,
        path: str | os.PathLike[str],
        weight: float = 1.0,
        *,
        text_encoder_weight: float | None = None,
        weight_name: str | None = None,
    ) -> None:
        """Add a LoRA or LoCon to the UNet and the text encoder; several add up.

        The mapped weights do not change. A LoRA adds a few percent to the time of a step, and nothing in layers whose
        weights are packed.

        Parameters
        ----------
        path : path
            A safetensors file of kohya's scripts, diffusers or PEFT.
        weight : float
            Strength, from -1000 to 1000.
        text_encoder_weight : float, optional
            Another strength in the text encoder.
        weight_name : str, optional
            Name of the file, if the path is its folder.

        Raises
        ------
        ModelError
            The file is damaged, holds something else, or is for another model.
        InputError
            A weight is out of range.
        """
        file = os.fspath(path if weight_name is None else Path(path, weight_name))
        text_encoder_weight = weight if text_encoder_weight is None else text_encoder_weight
        self.set_loras((*self.loras, (file, weight, text_encoder_weight)))

    def unload_lora_weights(self) -> None:
        """Remove every LoRA."""
        self.set_loras(())

    def set_loras(self, loras: tuple[Lora, ...]) -> None:
        """Replace the loaded LoRAs with these."""
        self.apply_loras(loras)
        self.loras = loras

    def apply_loras(self, wanted: tuple[Lora, ...]) -> None:
        """Compute with exactly these LoRAs until the next call; runs without tags use `loras`.

        Raises
        ------
        ModelError, InputError
            As `load_lora_weights`.
        """
        if wanted == self._applied:
            return
        applied, self._applied = self._applied, None  # unknown, should one of them fail
        if applied is None or wanted[: len(applied)] != applied:
            applied = ()
            for part in ("unet", *self.family.padding):
                self._weights[part].clear_updates()
        for lora in wanted[len(applied) :]:
            self._add_lora(*lora)
        for part in ("unet", *self.family.padding):
            self._build(part)
        self._applied = wanted

    def _add_lora(self, path: str, unet_weight: float, text_encoder_weight: float) -> None:
        weights = {"unet": unet_weight, **dict.fromkeys(self.family.padding, text_encoder_weight)}
        for value in weights.values():
            if not isinstance(value, int | float | np.number) or not abs(value) <= MAX_LORA_WEIGHT:
                raise InputError(f"LoRA {path}: found weight {value!r:.40}, expected -1000 to 1000, usually 0 to 1")
        shapes = {p: {name: self._weights[p].info(name).shape for name in self._weights[p].names()} for p in weights}
        for update in read_lora(path, Modules(shapes, unet_names_of(self.unet.config))):
            scale = float(weights[update.network]) * update.scale
            self._weights[update.network].add_updates(update.module, update.up, update.down, scale)

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
        """Return our spelling of a sampler's name; without a name, the default sampler's.

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

    def condition(self, texts: Sequence[str], syntax: str, clip_skip: int) -> dict[str, Conditioning]:
        """Turn texts into what the UNet takes, as the model's family does."""
        encoders = [(getattr(self, name), getattr(self, part)) for part, name in self.family.tokenizers.items()]
        return self.family.condition(encoders, texts, syntax, clip_skip)

    def encode_context(self, conditionings: Sequence[Conditioning]) -> EncodedContext:
        """Prepare the UNet for a batch of texts whose contexts have one length."""
        return self.family.encode_context(self.unet, conditionings)

    def release(self, *parts: str) -> None:
        """Release the mapped pages of networks' files; the next use reads them again."""
        for part in parts:
            self._weights[part].release()

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width that the model was made for."""
        side = self.unet.config.sample_size
        height, width = side if isinstance(side, tuple) else (side, side)
        return height * self.vae.factor, width * self.vae.factor

    @property
    def paints_in(self) -> bool:
        """Whether the UNet was made for inpainting: it also takes a mask, and latents of what is around it."""
        config = self.unet.config
        return config.in_channels == 2 * config.out_channels + 1

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return ``(channels, h, w)`` of the latents of a picture with this size in pixels."""
        return self.unet.config.out_channels, height // self.vae.factor, width // self.vae.factor

    def encode(self, pictures: np.ndarray, sources: Sequence[Noise]) -> np.ndarray:
        """Draw latents for pictures, from the distribution that the encoder gives for each.

        Parameters
        ----------
        pictures : float32 array ``(b, h, w, 3)``
            In [-1, 1].
        sources : sequence of Noise
            One for each picture, or one for all; tiny autoencoders encode deterministically and do not use them.

        Returns
        -------
        float32 array ``(b, 4, h / factor, w / factor)``
            Scaled, as the sampler takes them.

        Raises
        ------
        ModelError
            If the encoder's output has NaN or infinity.
        """
        pictures = np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))
        h, w = (side // self.vae.factor for side in pictures.shape[2:])
        mean, std = self.vae.encode_distribution(pictures, tiling=self.tiled(h, w))
        latents = mean if std is None else mean + std * draw(sources, len(mean), mean.shape[1:])
        self.release("vae")
        if not np.isfinite(latents).all():
            raise self.not_finite("the encoder")
        scaled: np.ndarray = latents * np.float32(self.vae.config.scaling_factor)
        return scaled

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Turn a sampler's last latents ``(b, 4, h, w)`` into pictures, float32 ``(b, 8h, 8w, 3)`` in [0, 1].

        Raises
        ------
        ModelError
            If the decoder's output has NaN or infinity.
        """
        latents = latents / np.float32(self.vae.config.scaling_factor)
        images = self.vae.decode(latents, tiling=self.tiled(*latents.shape[2:]))
        if not np.isfinite(images).all():
            raise self.not_finite("the decoder")
        images *= np.float32(0.5)
        images += np.float32(0.5)
        return np.ascontiguousarray(np.clip(images, 0, 1, out=images).transpose(0, 2, 3, 1))

    def pixel_bytes(self) -> int:
        """Return how much memory decoding takes for a pixel, at least."""
        return self.vae.bytes_per_pixel(tiling=self.vae_tiling != "off")

    def tiled(self, h: int, w: int) -> bool:
        """Return whether a picture whose latents have this size is to be encoded and decoded in strips."""
        check_choice("vae_tiling", self.vae_tiling, TILINGS)
        needed = h * w * self.vae.factor**2 * self.vae.bytes_per_pixel()
        return self.vae_tiling == "on" or (self.vae_tiling == "auto" and needed > ROOMY * available_memory())

    def not_finite(self, where: str) -> ModelError:
        """Find the cause of NaN or infinity in a result, and return the error to raise."""
        for weights in self._weights.values():
            for name, count in find_nonfinite(weights):
                return ModelError(
                    f"{weights.path}: tensor {name} holds NaN or infinite values ({count}); download the file again"
                )
        return ModelError(
            f"{where} gave NaN or infinite values, although all weights are finite; "
            "a lower guidance scale or another sampler may help"
        )


def with_prediction_type(checkpoint: Checkpoint) -> Checkpoint:
    """Find out what a model's UNet predicts, if its file does not say: for what is written elsewhere."""
    if checkpoint.scheduler.get("prediction_type", "") is not None:
        return checkpoint
    model = Model(checkpoint)
    model.prepare("mmap")
    unet = {**checkpoint.configs["unet"], "sample_size": model.unet.config.sample_size}
    return replace(checkpoint, scheduler=model.scheduler_config, configs={**checkpoint.configs, "unet": unet})


def _own_sampler(scheduler_config: Mapping[str, Any]) -> str | None:
    """Name the sampler of a model, or None: another one may be chosen for a model whose own is not supported."""
    try:
        return sampler_name_from_config(scheduler_config)
    except ModelError:
        return None
