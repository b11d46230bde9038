"""Saving pictures, with the text that says how they were made.

The text is the one that AUTOMATIC1111's web UI writes and many tools read: the prompt, a line ``Negative prompt: ...``
and a line of ``Key: value`` pairs, in the PNG chunk ``parameters`` (tEXt, or iTXt where Latin-1 does not suffice).
The meaning of the pairs is in :mod:`sd_numba.recipes.infotext`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..samplers import DISPLAY_NAMES

PROMPT_KEY, NEGATIVE_KEY = "Prompt", "Negative prompt"
NEGATIVE = f"{NEGATIVE_KEY}:"
# One pair of the last line; a value with a comma, colon or newline is written as a JSON string.
PAIR = re.compile(r'\s*(\w[\w \-/]*):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
END = re.compile(r"\s*(?:,|$)")
AUTOMATIC = "Automatic"  # the web UI leaves this schedule type out
# The web UI's schedule types since version 1.9 if none is named; Uniform for all other samplers.
AUTOMATIC_TYPES = {"DPM++ 2M": "Karras", "DPM++ 2M SDE": "Exponential"}
MIN_PAIRS = 3  # with fewer, the last line belongs to the prompt


@dataclass(frozen=True)
class Parameters:
    """How a picture was made.

    ``settings`` keeps its order. Its usual keys are Steps, Sampler, Schedule type, CFG scale, Seed, Size (as
    ``512x512``), Model hash, Model, Denoising strength, Clip skip, RNG and Version.
    """

    prompt: str
    negative_prompt: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


def sampler_title(name: str) -> dict[str, str]:
    """Return the web UI's name for one of our samplers.

    Examples
    --------
    >>> sampler_title("dpm++2m-karras")
    {'Sampler': 'DPM++ 2M', 'Schedule type': 'Karras'}
    >>> sampler_title("dpm++2m")
    {'Sampler': 'DPM++ 2M', 'Schedule type': 'Uniform'}
    >>> sampler_title("euler-a")
    {'Sampler': 'Euler a'}
    """
    sampler, schedule = DISPLAY_NAMES.get(name, (name, AUTOMATIC))
    if schedule == AUTOMATIC and sampler in AUTOMATIC_TYPES:
        schedule = "Uniform"
    return {"Sampler": sampler} | ({} if schedule == AUTOMATIC else {"Schedule type": schedule})


def format_parameters(parameters: Parameters) -> str:
    """Return the text for the PNG's ``parameters`` chunk.

    A prompt that would not be read back unchanged (because it starts with a blank, or one of its lines with ``Negative
    prompt:``) is repeated among the settings, under ``Prompt`` and ``Negative prompt``. The web UI prefers these, too.
    """
    text = _join(parameters, parameters.settings)
    if parameters.settings:
        read = parse_parameters(text)
        if (read.prompt, read.negative_prompt) != (parameters.prompt, parameters.negative_prompt):
            exact = {PROMPT_KEY: parameters.prompt, NEGATIVE_KEY: parameters.negative_prompt}
            text = _join(parameters, {**parameters.settings, **exact})
    return text


def _join(parameters: Parameters, settings: Mapping[str, Any]) -> str:
    lines = [parameters.prompt]
    if parameters.negative_prompt:
        lines.append(f"{NEGATIVE} {parameters.negative_prompt}")
    lines.append(", ".join(f"{key}: {_quoted(str(value))}" for key, value in settings.items()))
    return "\n".join(lines)


def _quoted(value: str) -> str:
    plain = not re.search(r'[,:\n"]', value) and value == value.strip()
    return value if plain else json.dumps(value, ensure_ascii=False)


def _unquoted(value: str) -> str:
    try:
        return str(json.loads(value)) if value.startswith('"') else value.strip()
    except ValueError:
        return value


def parse_parameters(text: str) -> Parameters:
    """Parse such a text, whichever program wrote it.

    Two prompts are misread: one whose last line looks like settings, in a text without settings; and, in texts of other
    programs, one with a line that begins with ``Negative prompt:``.
    """
    lines = [line.removesuffix("\r") for line in text.strip().split("\n")]
    lines, settings = _split_settings(lines)
    prompt, negative = lines, []
    for index, line in enumerate(lines):
        if line.startswith(NEGATIVE):
            first = line.removeprefix(NEGATIVE).removeprefix(" ")
            prompt, negative = lines[:index], [first, *lines[index + 1 :]]
            break
    texts = (settings.pop(PROMPT_KEY, "\n".join(prompt)), settings.pop(NEGATIVE_KEY, "\n".join(negative)))
    return Parameters(*texts, settings)


def _split_settings(lines: list[str]) -> tuple[list[str], dict[str, str]]:
    """Split off the line of settings: the last one, unless an extension of the web UI adds lines after it."""
    for index in range(len(lines) - 1, -1, -1):
        last = index == len(lines) - 1
        if lines[index].startswith(NEGATIVE) or not (last or lines[index].startswith("Steps: ")):
            continue
        settings = _parse_pairs(lines[index])
        if len(settings) >= MIN_PAIRS:
            return lines[:index], settings
    return lines, {}


def _parse_pairs(line: str) -> dict[str, str]:
    # Not PAIR.findall: that takes quadratic time on a long line without pairs.
    settings = {}
    position = 0
    while position < len(line):
        match = PAIR.match(line, position)
        if match:
            value, position = _parse_json(line, match.start(2)) or (_unquoted(match[2]), match.end())
            settings[match[1]] = value
        else:
            position = line.find(",", position) + 1 or len(line)
    return settings


def _parse_json(line: str, start: int) -> tuple[str, int] | None:
    """Return the JSON object or list that begins here and the start of the next pair; None if there is none."""
    if line[start : start + 1] not in ("{", "["):
        return None
    try:
        _, stop = json.JSONDecoder().raw_decode(line, start)
    except (ValueError, RecursionError):
        return None
    end = END.match(line, stop)
    return (line[start:stop], end.end()) if end else None
