"""A component's folder: which file holds its weights, and its JSON files."""

from __future__ import annotations

import json
import os
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import ModelError

PICKLE = "only safetensors files are read, because a pickle can run any code; convert it where you trust it, "
PICKLE_FOLDER_ADVICE = (
    PICKLE
    + "with diffusers: StableDiffusionPipeline.from_pretrained(OLD).save_pretrained(NEW, safe_serialization=True)"
)
PICKLE_FILE_ADVICE = (
    PICKLE + "with PyTorch: x = torch.load(OLD, weights_only=True); "
    "safetensors.torch.save_file(x.get('state_dict', x), NEW)"
)


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON file that must hold an object.

    Raises
    ------
    ModelError
        The file is missing, cannot be read or does not hold an object.
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
    """Find the weights in a component's folder: one safetensors file, or the index of several.

    The full-precision file is preferred to the ``fp16`` variant, and a single file to shards.

    Raises
    ------
    ModelError
        The folder has no weights, or only pickles.
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


def packaged(*names: str) -> Path:
    """Return the path of a file or folder that comes with the package."""
    return Path(str(resources.files("sd_numba").joinpath(*names)))
