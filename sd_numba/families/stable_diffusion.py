"""What Stable Diffusion 1.x and 2.x have in common: the UNet, the autoencoder, the noise schedule."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..files.tensors import TensorInfo
from ..files.writing import Entry
from ..networks.clip import TextEncoder, TextEncoderConfig
from ..networks.unet import UNet, UNetConfig
from ..networks.vae import Vae, VaeConfig
from .base import Network
from .names import names_of_unet, renamed, unet_names_of, vae_names, vae_tensors
from .shapes import Shapes, infer_text_encoder, infer_unet, infer_vae

PIPELINE = "StableDiffusionPipeline"
TEXT = "cond_stage_model."
SCALING_FACTOR = 0.18215
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
    "skip_prk_steps": True,
}
# As ComfyUI has them (`SD15.latent_rgb_factors` in its comfy/latent_formats.py, for colours in -1 .. 1): halved, and
# with 0.5 added.
PREVIEW_FACTORS = (
    (0.1756, 0.11485, 0.16135),
    (0.1625, 0.2487, 0.1175),
    (-0.14145, 0.0881, 0.13605),
    (-0.106, -0.1308, -0.35885),
    (0.5, 0.5, 0.5),
)
UNET_HEADS, HEAD_WIDTH = 8, 64  # with convolutions around the transformers, and with linear layers
OTHER_WIDTHS = {2048: "Stable Diffusion XL, not supported"}  # values of a token's vector in other models
# A pattern that a tensor's name starts with -> which other model has such a tensor beside names like these.
OTHERS = (
    (r"(conditioner\.embedders\.|model\.diffusion_model\.label_emb\.)", "SDXL checkpoint"),
    (r"(model\.diffusion_model\.)?(joint_blocks|double_blocks|double_layers)\.", "SD 3 or Flux model"),
    (r"(control_model\.|controlnet_|input_hint_block\.)", "ControlNet"),
)


def has_unet(names: Collection[str]) -> bool:
    """Whether a file holds a UNet of the latent-diffusion code, and not that of SDXL or a ControlNet."""
    if any(re.match(pattern, name) for pattern, _ in OTHERS for name in names):
        return False
    return any(name.startswith("model.diffusion_model.input_blocks.") for name in names)


def is_linear(configs: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the UNet has linear layers around its transformers, as in 2.x, where 1.x has convolutions."""
    return configs["unet"].get("use_linear_projection") is True


def _heads(channels: list[int], linear: bool) -> int | list[int]:
    """Heads leave no trace in a file: 8 in 1.x, and as many as have 64 channels each in 2.x."""
    return [max(1, c // HEAD_WIDTH) for c in channels] if linear else UNET_HEADS


def _unet_tensors(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    return renamed(tensors, names_of_unet(tensors))


def _single_unet(entries: Mapping[str, Entry], config: UNetConfig, path: Path) -> dict[str, Entry]:
    table = unet_names_of(config)
    return {table.to_single(name): entry for name, entry in entries.items()}


UNET = Network(
    UNet,
    UNetConfig.from_dict,
    classes=("UNet2DConditionModel",),
    library="diffusers",
    file="diffusion_pytorch_model.safetensors",
    prefix="model.diffusion_model.",
    rename=_unet_tensors,
    infer=partial(infer_unet, heads=_heads),
    unrename=_single_unet,
)


def _single_vae(entries: Mapping[str, Entry], config: VaeConfig, path: Path) -> dict[str, Entry]:
    table = vae_names(len(config.block_out_channels), config.layers_per_block)
    return {table.to_single(name): _as_convolution(name, entry) for name, entry in entries.items()}


def _as_convolution(name: str, entry: Entry) -> Entry:
    """The projections of the autoencoder's attention are stored as 1x1 convolutions there."""
    if ".attentions." in name and len(entry.shape) == 2:
        return replace(entry, shape=(*entry.shape, 1, 1))
    return entry


VAE = Network(
    Vae,
    VaeConfig.from_dict,
    classes=("AutoencoderKL",),
    library="diffusers",
    file="diffusion_pytorch_model.safetensors",
    prefix="first_stage_model.",
    rename=vae_tensors,
    infer=partial(infer_vae, scaling_factor=SCALING_FACTOR),
    unrename=_single_vae,
)


def text_encoder(activation: str, **names: Any) -> Network:
    """Describe CLIP's text encoder with this activation; ``names`` are `Network.rename` and `Network.unrename`."""

    def infer(shapes: Shapes) -> dict[str, Any]:
        return infer_text_encoder(shapes, activation)

    return Network(
        TextEncoder,
        TextEncoderConfig.from_dict,
        classes=("CLIPTextModel", "CLIPTextModelWithProjection"),
        library="transformers",
        file="model.safetensors",
        prefix=TEXT,
        infer=infer,
        described={"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"},
        **names,
    )


def says_velocity(names: Collection[str], metadata: Mapping[str, str]) -> bool:
    """Whether a single file has one of the usual marks of a model that predicts velocity."""
    architecture = metadata.get("modelspec.architecture", "")
    told = metadata.get("modelspec.prediction_type", "")
    return "v_pred" in names or told == "v" or architecture.startswith("stable-diffusion-v2-768-v")
