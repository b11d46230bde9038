"""Stable Diffusion 2.x: OpenCLIP ViT-H/14's text encoder without its last layer, linear layers in the UNet."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..errors import ModelError
from ..files.writing import Entry
from ..networks.clip import TextEncoderConfig
from ..networks.unet import UNet
from . import stable_diffusion as common
from .base import Family
from .names import CLIP, OPENCLIP, openclip_names, openclip_tensors


def _single_openclip(text: Mapping[str, Entry], config: TextEncoderConfig, path: Path) -> dict[str, Entry]:
    """Rename the tensors of a text encoder, and join the projections of its attention."""
    table = openclip_names(config.num_hidden_layers)
    result = {}
    for name, entry in text.items():
        module, _, rest = name.partition(".self_attn.")
        projection, kind = (*rest.split("."), "")[:2]
        if projection in ("k_proj", "v_proj"):
            continue
        if projection == "q_proj":
            parts = [text[f"{module}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            if len({part.stored for part in parts}) > 1:
                raise ModelError(
                    f"{path}: {module}.self_attn: found projections of dtypes {', '.join(p.stored for p in parts)}, "
                    "which are one tensor in a single file; convert it to a folder in f16 first"
                )
            shape = (3 * entry.shape[0], *entry.shape[1:])
            joint = table.to_single(f"{module}.{kind}").removesuffix(kind) + f"attn.in_proj_{kind}"
            scales = [part.scales for part in parts if part.scales is not None]
            result[joint] = replace(
                entry,
                shape=shape,
                parts=tuple(part.parts[0] for part in parts),
                scales=np.concatenate(scales) if scales else None,
            )
        else:
            result[table.to_single(name).replace("positional_embedding.weight", "positional_embedding")] = entry
    return {OPENCLIP + name: entry for name, entry in result.items()}


def _recognises_file(names: Collection[str]) -> bool:
    texts = [name for name in names if name.startswith(common.TEXT)]
    return bool(texts) and common.has_unet(names) and not any(name.startswith(common.TEXT + CLIP) for name in texts)


def _prediction(names: Collection[str], metadata: Mapping[str, str]) -> str | None:
    if common.says_velocity(names, metadata):
        return "v_prediction"
    architecture = metadata.get("modelspec.architecture", "")
    if metadata.get("modelspec.prediction_type") == "epsilon" or architecture.startswith("stable-diffusion-v2-512"):
        return "epsilon"
    return None


def _probe(unet: UNet) -> str:
    """Tell noise from velocity by what the UNet makes of grey latents at the noisiest timestep.

    There the noise to predict is about the latents, the velocity far below them: AUTOMATIC1111's web UI tells these
    models apart so, with the same numbers.
    """
    grey = np.full((1, unet.config.in_channels, 8, 8), 0.5, np.float32)
    context = np.full((1, 2, unet.config.cross_attention_dim), 0.5, np.float32)
    return "v_prediction" if float(np.mean(unet(grey, 999, context)) - 0.5) < -1 else "epsilon"


def _architecture(prediction: str | None) -> str:
    return f"stable-diffusion-v2-{'768-v' if prediction == 'v_prediction' else '512'}"


FAMILY = Family(
    name="sd2",
    title="Stable Diffusion 2.x",
    pipeline=common.PIPELINE,
    networks={
        "text_encoder": common.text_encoder("gelu", rename=openclip_tensors, unrename=_single_openclip),
        "unet": common.UNET,
        "vae": common.VAE,
    },
    padding={"text_encoder": "!"},
    text_width=1024,
    scheduler=common.SCHEDULER,
    preview_factors=common.PREVIEW_FACTORS,
    recognises_file=_recognises_file,
    recognises_folder=common.is_linear,
    prediction=_prediction,
    architecture=_architecture,
    velocity_size=96,
    probe=_probe,
)
