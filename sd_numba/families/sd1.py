"""Stable Diffusion 1.x: CLIP ViT-L/14's text encoder."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..files.writing import Entry
from ..networks.clip import TextEncoderConfig
from . import stable_diffusion as common
from .base import Family
from .names import CLIP, clip_tensors


def _single_clip(entries: Mapping[str, Entry], config: TextEncoderConfig, path: Path) -> dict[str, Entry]:
    return {CLIP + name: entry for name, entry in entries.items()}


def _recognises_file(names: Collection[str]) -> bool:
    """Also files without a text encoder, which are refused when they are opened."""
    openclip = any(name.startswith(common.TEXT) for name in names) and not any(
        name.startswith(common.TEXT + CLIP) for name in names
    )
    return common.has_unet(names) and not openclip


def _recognises_folder(configs: Mapping[str, Mapping[str, Any]]) -> bool:
    return not common.is_linear(configs)


def _prediction(names: Collection[str], metadata: Mapping[str, str]) -> str:
    return "v_prediction" if common.says_velocity(names, metadata) else "epsilon"


def _architecture(prediction: str | None) -> str:
    return "stable-diffusion-v1"


FAMILY = Family(
    name="sd1",
    title="Stable Diffusion 1.x",
    pipeline=common.PIPELINE,
    networks={
        "text_encoder": common.text_encoder("quick_gelu", rename=clip_tensors, unrename=_single_clip),
        "unet": common.UNET,
        "vae": common.VAE,
    },
    padding={"text_encoder": "<|endoftext|>"},
    text_width=768,
    scheduler=common.SCHEDULER,
    preview_factors=common.PREVIEW_FACTORS,
    recognises_file=_recognises_file,
    recognises_folder=_recognises_folder,
    prediction=_prediction,
    architecture=_architecture,
)
