"""Which file of a folder holds the weights, and what their tensors are called in older files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ModelError

COMPONENTS = ("tokenizer", "text_encoder", "unet", "vae", "scheduler")
PIPELINE = "StableDiffusionPipeline"
# Components that have weights -> the classes in their config.json that can be run.
CLASSES: dict[str, tuple[str, ...]] = {
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
}

PICKLE = "only safetensors files are read, because a pickle can run any code; convert it where you trust it, "
PICKLE_FOLDER_ADVICE = (
    PICKLE
    + "with diffusers: StableDiffusionPipeline.from_pretrained(OLD).save_pretrained(NEW, safe_serialization=True)"
)
PICKLE_FILE_ADVICE = (
    PICKLE + "with PyTorch: x = torch.load(OLD, weights_only=True); "
    "safetensors.torch.save_file(x.get('state_dict', x), NEW)"
)

# Tensor names of older or newer files -> the names that the networks use (those of diffusers; the text encoder's
# with `text_model.`). The first pattern that matches counts; None: the tensor is not used.
RENAMES: tuple[tuple[str, str | None], ...] = (
    (r"(text_model\.)?embeddings\.position_ids", None),  # just 0 .. 76
    (r"text_projection\.weight(_scale)?", None),  # behind the output that Stable Diffusion uses
    (r"((embeddings|encoder\.layers|final_layer_norm)\..+)", r"text_model.\1"),
    (r"((?:en|de)coder\.mid_block\.attentions\.\d+)\.query\.(\w+)", r"\1.to_q.\2"),  # VAE before diffusers 0.17
    (r"((?:en|de)coder\.mid_block\.attentions\.\d+)\.key\.(\w+)", r"\1.to_k.\2"),
    (r"((?:en|de)coder\.mid_block\.attentions\.\d+)\.value\.(\w+)", r"\1.to_v.\2"),
    (r"((?:en|de)coder\.mid_block\.attentions\.\d+)\.proj_attn\.(\w+)", r"\1.to_out.0.\2"),
)


def canonical_name(name: str) -> str | None:
    """The name that the networks use for a stored tensor, or None for one that they do not need."""
    for pattern, replacement in RENAMES:
        match = re.fullmatch(pattern, name)
        if match:
            return None if replacement is None else match.expand(replacement)
    return name


@dataclass(frozen=True)
class Kind:
    """A kind of file: what to call it, whether it is a whole model, and the option that takes it."""

    title: str
    supported: bool = False
    option: str = ""

    @property
    def advice(self) -> str:
        """What to do with it, to end an error with."""
        return f"; use {self.option}" if self.option else ""


# A pattern that a tensor's name starts with -> what a file with such a tensor is; the first that is found counts.
_KINDS = (
    (r"(conditioner\.embedders\.|model\.diffusion_model\.label_emb\.)", Kind("SDXL checkpoint")),
    (r"(model\.diffusion_model\.)?(joint_blocks|double_blocks|double_layers)\.", Kind("SD 3 or Flux model")),
    (r"(control_model\.|controlnet_|input_hint_block\.)", Kind("ControlNet")),
    (r"model\.diffusion_model\.input_blocks\.", Kind("single-file Stable Diffusion checkpoint", supported=True)),
    (r".*\.(hada_w|lokr_w|oft_|dora_scale)", Kind("LoHa, LoKr, OFT or DoRA")),
    (r"(lora_(unet|te\d?)[._]|.*[._]lora(_[AB]|_linear_layer|\.down|\.up)?\.)", Kind("LoRA", option="--lora")),
    (
        r"((decoder|encoder)\.layers\.)?\d+\.(conv\.\d\.|weight)",
        Kind("tiny autoencoder (TAESD)", option="--taesd"),
    ),
    (r"(first_stage_model\.)?(encoder|decoder)\.(conv_in|mid|mid_block)\.", Kind("VAE", option="--vae")),
    (r"(emb_params|clip_[lg]|<.+>)$", Kind("textual inversion embedding", option="--embedding-dir")),
    (r"(time_embedding|down_blocks)\.", Kind("UNet")),
    (r"(text_model\.|cond_stage_model\.|.*token_embedding\.)", Kind("CLIP text encoder")),
)
KINDS = tuple((re.compile(pattern), kind) for pattern, kind in _KINDS)


def kind_of(names: Iterable[str]) -> Kind:
    """Tell by its tensors' names what a file is."""
    names = list(names)
    for pattern, kind in KINDS:
        if any(pattern.match(name) for name in names):
            return kind
    return Kind("another kind of model")


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON file that must hold an object.

    Raises
    ------
    ModelError
        The file is missing, cannot be read or holds something else.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: found {type(value).__name__}, expected a JSON object")
    return value


def find_weights(folder: str | os.PathLike[str]) -> Path:
    """The weights of a component's folder: one safetensors file, or the index of several.

    The full-precision file is preferred to the ``fp16`` variant, and one file to shards.

    Raises
    ------
    ModelError
        There are none; says so if there are pickles instead.
    """
    folder = Path(folder)
    for stem in ("diffusion_pytorch_model", "model"):
        for ending in (
            ".safetensors",
            ".safetensors.index.json",
            ".fp16.safetensors",
            ".safetensors.index.fp16.json",
            ".fp16.safetensors.index.json",
        ):
            path = folder / f"{stem}{ending}"
            if path.is_file():
                return path
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder")
    pickles = [path.name for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".ckpt", ".pt", ".pth")]
    if pickles:
        raise ModelError(f"{folder}: found {pickles[0]}, a PyTorch pickle: {PICKLE_FOLDER_ADVICE}")
    raise ModelError(f"{folder}: no weights: expected diffusion_pytorch_model.safetensors or model.safetensors")
