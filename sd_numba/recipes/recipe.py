"""A recipe: everything that decides what one picture looks like, in one place.

The command line makes it from options, prompt files, a picture's text or the state of an interrupted run, and a
picture's text is written from it (`sd_numba.recipes.infotext`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from ..errors import InputError
from ..generation.settings import Settings, setting, settings_of
from ..networks.layers import PRECISIONS
from ..samplers import SAMPLER_NAMES
from ..values import Choice, Flag, Kind, Text, UnfitError, read_value

R = TypeVar("R", bound="Recipe")
Hashes = tuple[tuple[str, str], ...]

PLAIN_SPACINGS = ("normal", "uniform", "discrete", "automatic")  # other programs' names for the default spacing
SPACINGS = ("karras", "exponential")
SPACING_KEYS = ("schedule_type", "schedule")


class _Hashes(Kind):
    """Names with hashes."""

    def read(self, value: Any) -> Hashes:
        """Return pairs from a mapping, from pairs, or from AUTOMATIC1111's text ``name: hash, name: hash``."""
        if isinstance(value, str):
            value = [item.strip().rsplit(": ", 1) for item in value.split(",") if item.strip()]
        pairs: Any = list(value.items()) if isinstance(value, Mapping) else value
        if not isinstance(pairs, list | tuple) or not all(
            isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(part, str) for part in pair)
            for pair in pairs
        ):
            raise UnfitError("names with hashes")
        return tuple((name, digest) for name, digest in pairs)


@dataclass(frozen=True)
class Recipe(Settings):
    """What one picture is made from: its settings, and which files they were used with.

    None stands for the model's default, until it is known.

    Attributes
    ----------
    prompt, negative_prompt : str
        As typed, with the tags of LoRAs.
    seed, num_inference_steps, ...
        The fields of `Settings`, as `StableDiffusionPipeline.generate` takes them.
    image, mask_image : str, optional
        Paths of the picture to start from and of the mask.
    image_hash, mask_hash : str, optional
        First ten hexadecimal digits of the SHA-256 of these files.
    precision : str
        Arithmetic of matrix products.
    vae_tiling : bool
        Whether the picture was decoded in strips, which changes the last digits of its values.
    model_name, model_hash, vae, taesd : str, optional
        Names of the model and of the files that replaced its autoencoder.
    lora_hashes, ti_hashes : tuple of (str, str)
        Names (without commas and colons) and hashes of the LoRAs and the embeddings.
    """

    image_hash: str | None = setting(Text(), None, key="Init image hash", aliases=("init_hash",))
    mask_hash: str | None = setting(Text(), None, key="Mask hash")
    precision: str = setting(Choice((*PRECISIONS, "auto")), "f32", key="Precision")
    vae_tiling: bool = setting(Flag(), False, key="VAE tiling")
    model_name: str | None = setting(Text(), None, key="Model", aliases=("model",))
    model_hash: str | None = setting(Text(), None, key="Model hash")
    vae: str | None = setting(Text(), None, key="VAE")
    taesd: str | None = setting(Text(), None, key="TAESD")
    lora_hashes: Hashes = setting(_Hashes(), (), key="Lora hashes")
    ti_hashes: Hashes = setting(_Hashes(), (), key="TI hashes")

    def to_json(self) -> dict[str, Any]:
        """Return every field by its name, as `json` writes it."""
        return asdict(self)

    @classmethod
    def from_json(cls: type[R], values: Mapping[str, object]) -> R:
        """Make a recipe from the result of `to_json`, or from other spellings: see `read_fields`.

        Raises
        ------
        InputError
            As `read_fields`, or there is no prompt.
        """
        found = read_fields(values, cls)
        if "prompt" not in found:
            raise InputError("recipe: no prompt")
        return cls(**found)


def read_fields(values: Mapping[str, object], owner: type[Settings] = Recipe) -> dict[str, Any]:
    """Check settings that come from outside.

    Parameters
    ----------
    values : mapping of str to object
        Settings by the names of the fields, or by other programs' names for them (`Setting.aliases`), in any case and
        with blanks or hyphens for underscores; ``size`` is ``512x768``. Numbers may be text; None means not given.
    owner : type
        The class that has the fields.

    Returns
    -------
    dict
        The given settings by the names of the fields, with values of the fields' types. A negative seed, which other
        programs take for a random one, is left out.

    Raises
    ------
    InputError
        A key is unknown or given twice, or a value has another type; the message names the key.
    """
    known = settings_of(owner)
    field_of = {alias: name for name, about in known.items() for alias in about.aliases}
    found: dict[str, Any] = {}
    spacing = None
    for key, value in values.items():
        shown = str(key) if str(key).isprintable() else ascii(key)
        spelled = re.sub(r"[\s-]+", "_", str(key).strip().lower())
        name = field_of.get(spelled, spelled)
        if value is None:
            continue
        if name in SPACING_KEYS or (spelled == "scheduler" and str(value).lower() in (*PLAIN_SPACINGS, *SPACINGS)):
            spacing = read_value(shown, str(value).lower(), Choice((*PLAIN_SPACINGS, *SPACINGS)).read)
            continue
        if name == "size":
            width, height = read_value(shown, value, read_size)
            new: dict[str, Any] = {"width": width, "height": height}
        elif name in known:
            new = {name: read_value(shown, value, known[name].kind.read)}
        else:
            raise InputError(f"{shown:.80}: unknown setting; the settings are {', '.join(known)}")
        if twice := found.keys() & new.keys():
            raise InputError(f"{shown:.80}: {twice.pop()} is given twice; give it once")
        found |= new
    if spacing:
        if "scheduler" not in found:
            raise InputError(f"scheduler: spacing {spacing} needs a sampler as well")
        found["scheduler"] = with_spacing(found["scheduler"], spacing)
    return {name: value for name, value in found.items() if value is not None}


def with_spacing(sampler: str, spacing: str) -> str:
    """Return the name of the sampler with this spacing of its noise levels.

    Parameters
    ----------
    sampler : str
        One of `SAMPLER_NAMES`.
    spacing : str
        ``karras``, ``exponential``, or one of `PLAIN_SPACINGS`, which leaves the name as it is.

    Raises
    ------
    InputError
        The sampler does not support the spacing.
    """
    if spacing in PLAIN_SPACINGS or sampler.endswith(f"-{spacing}"):
        return sampler
    base = re.sub(rf"-({'|'.join(SPACINGS)})$", "", sampler)
    if f"{base}-{spacing}" not in SAMPLER_NAMES:
        able = [name.removesuffix(f"-{spacing}") for name in SAMPLER_NAMES if name.endswith(f"-{spacing}")]
        raise InputError(
            f"sampler {sampler} does not support the spacing {spacing}; these samplers do: {', '.join(able)}"
        )
    return f"{base}-{spacing}"


def read_size(value: object) -> tuple[int, int]:
    """Read a size such as ``512x768``: width, height."""
    match = re.fullmatch(r"\s*(\d+)\s*[x×X]\s*(\d+)\s*", value) if isinstance(value, str) else None
    if match is None:
        raise UnfitError("a size such as 512x768")
    return int(match[1]), int(match[2])
