"""What a command line adds to a model: LoRAs and embeddings, by name or by tags in the prompt."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection
from pathlib import Path

from ..checkpoints.download import resolve_model
from ..checkpoints.embedding import find_embeddings
from ..errors import InputError
from ..prompts.tokenizer import whole_word

TAG = re.compile(r"<lora:([^:<>]+)(?::([^<>]*))?>", re.IGNORECASE)
LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # of diffusers and PEFT, in a folder

Weights = tuple[float, float]  # of the UNet and of the text encoder


def named_embeddings(folder: str | None, prompts: Collection[str]) -> dict[str, Path]:
    """Return those embeddings of a folder that a prompt names, by their words."""
    found = {} if folder is None else find_embeddings(folder)
    return {word: path for word, path in found.items() if any(map(whole_word(word).search, prompts))}


def split_tags(prompt: str) -> tuple[str, list[tuple[str, Weights]]]:
    """Take the tags of AUTOMATIC1111's web UI out of a prompt.

    ``<lora:name>``, ``<lora:name:weight>`` or ``<lora:name:text encoder's weight:UNet's weight>``.

    Returns
    -------
    str
        The rest of the prompt.
    list of (str, Weights)
        Names and weights; 1 where none is given.

    Raises
    ------
    InputError
        A weight is no number, or a tag has another form.
    """
    found = []
    for match in TAG.finditer(prompt):
        first, _, second = (match[2] or "1").partition(":")
        text_encoder = _weight(first, match[0])
        found.append((match[1].strip(), (_weight(second, match[0]) if second else text_encoder, text_encoder)))
    rest = TAG.sub("", prompt).strip() if found else prompt
    odd = re.search(r"<lora:.{0,40}", rest, re.IGNORECASE)
    if odd:
        raise InputError(f"prompt: found {odd[0]!r}, expected <lora:NAME:WEIGHT>")
    return rest, found


def _weight(text: str, where: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise InputError(f"{where:.80}: found weight {text!r:.40}, expected a number, such as 0.8")
    return weight


def split_weight(text: str) -> tuple[str, float]:
    """Split ``FILE[:weight]``; a file whose name ends so is taken as it is.

    Raises
    ------
    InputError
        What follows the colon is no number.
    """
    name, colon, weight = text.rpartition(":")
    if not colon or os.path.exists(text):
        return text, 1.0
    return name, _weight(weight, f"--lora {text}")


def find_lora(name: str, folder: str | None) -> Path:
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


def find_tagged(name: str, folder: str | None) -> Path:
    """Find a LoRA by its name in a folder, or in one of its folders, with or without its ending.

    Raises
    ------
    InputError
        There is none, or no such folder.
    """
    if folder is None:
        raise InputError(f"LoRA {name!r:.80}: no such file; give the folder with --lora-dir")
    if not os.path.isdir(folder):
        raise InputError(f"--lora-dir {folder}: no such folder")
    wanted = name.removesuffix(".safetensors")
    for path in sorted(Path(folder).rglob("*.safetensors")):
        if wanted in (path.stem, path.relative_to(folder).with_suffix("").as_posix()):
            return path
    raise InputError(f"LoRA {name!r:.80}: no such file, and there is none of that name in {folder}")
