"""Where a model's files are and what its tensors are called: diffusers folders and their older variants."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
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

PICKLE_ADVICE = (
    "only safetensors files are read, because a pickle can run any code; convert the model with diffusers: "
    "StableDiffusionPipeline.from_pretrained(OLD).save_pretrained(NEW, safe_serialization=True)"
)

# Tensor names of older or newer files -> the names that the networks use (those of diffusers; the text encoder's
# with `text_model.`). The first pattern that matches counts; None: the tensor is not used.
RENAMES: tuple[tuple[str, str | None], ...] = (
    (r"(text_model\.)?embeddings\.position_ids", None),  # just 0 .. 76
    (r"text_projection\.weight", None),  # behind the output that Stable Diffusion uses
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
        raise ModelError(f"{folder}: found {pickles[0]}, a PyTorch pickle: {PICKLE_ADVICE}")
    raise ModelError(f"{folder}: no weights: expected diffusion_pytorch_model.safetensors or model.safetensors")


def embedded_model_path() -> Path:
    """The folder of the small model that comes with the package."""
    return Path(__file__).parent / "models" / "emoji-world"


@dataclass(frozen=True)
class ModelFolder:
    """A model in diffusers layout: its folder and the parsed configuration of every component but the tokenizer.

    ``defaults`` are the settings that the model's makers advise: ``_defaults`` in its ``model_index.json``, which may
    hold ``num_inference_steps``, ``guidance_scale`` and ``scheduler``.
    """

    path: Path
    text_encoder: dict[str, Any]
    unet: dict[str, Any]
    vae: dict[str, Any]
    scheduler: dict[str, Any]
    defaults: dict[str, Any]

    @property
    def name(self) -> str:
        """The folder's own name, as pictures' metadata says it."""
        return self.path.resolve().name

    def folder(self, component: str) -> Path:
        """The folder of a component: ``tokenizer``, ``text_encoder``, ``unet``, ``vae`` or ``scheduler``."""
        return self.path / component


def open_model(path: str | os.PathLike[str] | None = None) -> ModelFolder:
    """Check that a folder holds a Stable Diffusion 1.x or 2.x model, and read its configurations; no weights yet.

    Parameters
    ----------
    path
        The model's folder; None is the embedded model. ``model_index.json`` may be missing.

    Raises
    ------
    ModelError
        There is no such folder, a component or its weights are missing, a configuration is not valid JSON, or it
        is another kind of model.
    """
    folder = embedded_model_path() if path is None else Path(path)
    if not os.path.isdir(folder):  # unlike Path.is_dir, does not raise for a name that no file can have
        found = "is a file" if os.path.exists(folder) else "does not exist"
        raise ModelError(f"{folder}: {found}; expected a model's folder with {_listed(COMPONENTS, 'and')} in it")
    index = _read_index(folder)
    missing = [name for name in COMPONENTS if not (folder / name).is_dir()]
    if len(missing) == len(COMPONENTS):
        raise ModelError(f"{folder}: not a diffusers model: it has no folders {_listed(COMPONENTS, 'and')}")
    if missing:
        raise ModelError(f"{folder}: incomplete: its folder {_listed(missing, 'and')} is missing; download it again")
    configs = {name: read_json(folder / name / "config.json") for name in CLASSES}
    for name, classes in CLASSES.items():
        _check_class(folder / name / "config.json", configs[name], classes)
        find_weights(folder / name)
    defaults = index.get("_defaults")
    return ModelFolder(
        folder,
        scheduler=read_json(folder / "scheduler" / "scheduler_config.json"),
        defaults=defaults if isinstance(defaults, dict) else {},
        **configs,
    )


def _read_index(folder: Path) -> dict[str, Any]:
    """Refuse other pipelines, by their index or, where there is none, by the second text encoder of SDXL and SD 3."""
    path = folder / "model_index.json"
    index = read_json(path) if path.exists() else {}
    found = index.get("_class_name")
    if found is None and (folder / "text_encoder_2").is_dir():
        found = "a model with two text encoders (SDXL)"
    if found not in (None, PIPELINE):
        raise ModelError(f"{folder}: found {found!s:.80}, supported is {PIPELINE} (Stable Diffusion 1.x and 2.x)")
    return index


def _check_class(path: Path, config: dict[str, Any], classes: tuple[str, ...]) -> None:
    found = config.get("_class_name") or config.get("architectures")
    found = found[0] if isinstance(found, list) and found else found
    if found and found not in classes:
        raise ModelError(f"{path}: found a {found!s:.80}, supported is {_listed(classes, 'or')}")


def _listed(words: Sequence[str], conjunction: str) -> str:
    return f" {conjunction} ".join(filter(None, (", ".join(words[:-1]), words[-1])))
