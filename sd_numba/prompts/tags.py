"""LoRA tags in prompts, in the syntax of AUTOMATIC1111's web UI."""

from __future__ import annotations

import math
import os
import re

from ..errors import InputError

TAG = re.compile(r"<lora:([^:<>]+)(?::([^<>]*))?>", re.IGNORECASE)

Weights = tuple[float, float]  # of the UNet and of the text encoder


def split_tags(prompt: str) -> tuple[str, list[tuple[str, Weights]]]:
    """Remove the tags from a prompt.

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
        A weight is not a number, or a tag is malformed.
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


def split_weight(text: str) -> tuple[str, float]:
    """Split ``FILE[:weight]``; the name of an existing file is taken as it is.

    Raises
    ------
    InputError
        The text after the colon is not a number.
    """
    name, colon, weight = text.rpartition(":")
    if not colon or os.path.exists(text):
        return text, 1.0
    return name, _weight(weight, f"LoRA {text}")


def _weight(text: str, where: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise InputError(f"{where:.80}: found weight {text!r:.40}, expected a number, such as 0.8")
    return weight
