"""LoRAs and embeddings that prompts name, found in folders."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from ..errors import InputError, argument
from ..prompts.tokenizer import whole_word
from .download import resolve_model
from .embedding import find_embeddings

# Of diffusers and PEFT, in a folder
LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")


def named_embeddings(folder: str | os.PathLike[str] | None, prompts: Collection[str]) -> dict[str, Path]:
    """Return those embeddings of a folder that a prompt names, by their words."""
    found = {} if folder is None else find_embeddings(folder)
    return {word: path for word, path in found.items() if any(map(whole_word(word).search, prompts))}


def find_lora(name: str, folder: str | os.PathLike[str] | None) -> Path:
    """Find the file of a LoRA: a file or folder, the id of a downloaded one, or a name as in tags.

    Raises
    ------
    InputError
        There is none.
    """
    path = resolve_model(name) or Path(name)
    if path.is_dir():
        inside = [path / file for file in LORA_FILES if (path / file).is_file()]
        if not inside:
            raise InputError(f"LoRA {path}: a folder without {' or '.join(LORA_FILES)}; give a file")
        return inside[0]
    return path if path.is_file() else find_tagged(name, folder)


def find_tagged(name: str, folder: str | os.PathLike[str] | None) -> Path:
    """Find a LoRA by its name in a folder or its subfolders, with or without its ending.

    Raises
    ------
    InputError
        There is none, or no such folder.
    """
    if folder is None:
        raise InputError(f"LoRA {name!r:.80}: no such file; give the folder with {argument('lora_dir')}")
    if not os.path.isdir(folder):
        raise InputError(f"{argument('lora_dir')} {folder}: no such folder")
    wanted = name.removesuffix(".safetensors")
    for path in sorted(Path(folder).rglob("*.safetensors")):
        if wanted in (path.stem, path.relative_to(folder).with_suffix("").as_posix()):
            return path
    raise InputError(f"LoRA {name!r:.80}: no such file, and none of that name in {folder}")
