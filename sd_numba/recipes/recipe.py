"""A recipe: everything that decides what a picture looks like, in one place.

The command line builds it from options, prompt files, a picture's text or the state of an interrupted run, and a
picture's text is written from it (:mod:`sd_numba.recipes.infotext`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from ..errors import InputError
from ..networks import layers
from ..prompts.encoding import SYNTAXES
from ..samplers import SAMPLER_NAMES, canonical_sampler_name

Hashes = tuple[tuple[str, str], ...]

PLAIN_SPACINGS = ("normal", "uniform", "discrete", "automatic")  # what others call the spacing without a name
SPACINGS = ("karras", "exponential")
RNGS = ("cpu", "cuda")

# What other programs call a field: sd.cpp's options, AUTOMATIC1111's API and text, FastSD CPU, diffusers.
ALIASES = {
    "negative_prompt": ("negative", "neg_prompt", "uncond_prompt"),
    "num_inference_steps": ("steps", "inference_steps", "sample_steps", "n_steps"),
    "guidance_scale": ("cfg_scale", "cfg", "guidance"),
    "width": ("image_width",),
    "height": ("image_height",),
    "scheduler": ("sampler", "sampler_name", "sampling_method", "sample_method"),
    "rng": ("randn_source",),
    "strength": ("denoising_strength", "img2img_strength"),
    "init_image": ("init_img", "image"),
    "mask_image": ("mask",),
    "hires_scale": ("hr_scale", "hires_upscale"),
    "hires_steps": ("hr_second_pass_steps",),
    "hires_strength": ("hires_denoising_strength",),
    "tome": ("token_merging_ratio",),
    "model_name": ("model",),
}
SPACING_KEYS = ("schedule_type", "schedule")
_FIELD_OF = {alias: name for name, aliases in ALIASES.items() for alias in aliases}


@dataclass(frozen=True)
class Recipe:
    """What a picture is made from. None stands for the model's default, until it is known.

    Attributes
    ----------
    prompt, negative_prompt : str
        As typed, with the tags of LoRAs.
    seed, num_inference_steps, guidance_scale, width, height, eta, rng, prompt_syntax, strength
        As `StableDiffusionPipeline.generate` takes them.
    scheduler : str, optional
        One of `SAMPLER_NAMES`.
    clip_skip : int
        Layers of the text encoder that are left out; AUTOMATIC1111 and sd.cpp count one more.
    init_image, mask_image : str, optional
        Paths of the picture to start from and of the mask.
    init_hash, mask_hash : str, optional
        First ten hexadecimal digits of the SHA-256 of these files.
    expand : tuple of int, optional
        Pixels added on the left, the top, the right and the bottom.
    hires_scale, hires_steps, hires_strength
        Of the second pass over an enlarged picture; None: there is none.
    cfg_interval : tuple of float
        Share of the steps that are guided: from, to.
    cache : str, optional
        Such as ``deepcache:3``.
    tome : float
        Share of the tokens that are merged.
    precision : str
        Of the products.
    vae_tiling : bool
        Whether the picture was decoded in strips, which changes it by a hair.
    model_name, model_hash, vae, taesd : str, optional
        Names of the model and of the files that took the place of its autoencoder.
    lora_hashes, ti_hashes : tuple of (str, str)
        Names (without commas and colons) and hashes of the LoRAs and the embeddings.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    width: int | None = None
    height: int | None = None
    scheduler: str | None = None
    eta: float = 0.0
    rng: str = "cpu"
    prompt_syntax: str = "a1111"
    clip_skip: int = 0
    strength: float | None = None
    init_image: str | None = None
    init_hash: str | None = None
    mask_image: str | None = None
    mask_hash: str | None = None
    expand: tuple[int, ...] | None = None
    hires_scale: float | None = None
    hires_steps: int | None = None
    hires_strength: float | None = None
    cfg_interval: tuple[float, ...] = (0.0, 1.0)
    cache: str | None = None
    tome: float = 0.0
    precision: str = "f32"
    vae_tiling: bool = False
    model_name: str | None = None
    model_hash: str | None = None
    vae: str | None = None
    taesd: str | None = None
    lora_hashes: Hashes = ()
    ti_hashes: Hashes = ()

    def to_json(self) -> dict[str, Any]:
        """Every field by its name, as `json` writes it."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> Recipe:
        """Make a recipe of what `to_json` gave, or of other spellings: see `read_fields`.

        Raises
        ------
        InputError
            As `read_fields`, or there is no prompt.
        """
        found = read_fields(values)
        if "prompt" not in found:
            raise InputError("recipe: found no prompt, expected one")
        return cls(**found)


DEFAULTS = {field.name: field.default for field in fields(Recipe) if field.default is not MISSING}


def read_fields(values: Mapping[str, object]) -> dict[str, Any]:
    """Check settings that come from outside.

    Parameters
    ----------
    values : mapping of str to object
        Settings by the names of the fields or those that other programs have for them (`ALIASES`), in any case and with
        blanks or hyphens for underscores; ``size`` is ``512x768``. Numbers may be texts. None: not given.

    Returns
    -------
    dict
        Those given, by the names of the fields, with values of their types. A negative seed, which elsewhere asks for a
        random one, is left out.

    Raises
    ------
    InputError
        A key is unknown or given twice, or a value has another type; names the key, what was found and expected.
    """
    found: dict[str, Any] = {}
    spacing = None
    for key, value in values.items():
        shown = str(key) if str(key).isprintable() else ascii(key)
        spelled = re.sub(r"[\s-]+", "_", str(key).strip().lower())
        name = _FIELD_OF.get(spelled, spelled)
        if value is None:
            continue
        if name in SPACING_KEYS or (spelled == "scheduler" and str(value).lower() in (*PLAIN_SPACINGS, *SPACINGS)):
            spacing = check_value(shown, str(value).lower(), one_of(*PLAIN_SPACINGS, *SPACINGS))
            continue
        new = _sizes(shown, value) if name == "size" else {name: _checked(shown, name, value)}
        if twice := found.keys() & new.keys():
            raise InputError(f"{shown:.80}: {twice.pop()} is given twice, expected one of its names")
        found |= new
    if spacing:
        if "scheduler" not in found:
            raise InputError(f"scheduler: found spacing {spacing} without a sampler, expected both")
        found["scheduler"] = with_spacing(found["scheduler"], spacing)
    return {name: value for name, value in found.items() if value is not None}


def with_spacing(sampler: str, spacing: str) -> str:
    """Name the sampler that spaces its noise levels so.

    Parameters
    ----------
    sampler : str
        One of `SAMPLER_NAMES`.
    spacing : str
        ``karras``, ``exponential``, or one of `PLAIN_SPACINGS`, which leaves the name as it is.

    Raises
    ------
    InputError
        This sampler cannot.
    """
    if spacing in PLAIN_SPACINGS or sampler.endswith(f"-{spacing}"):
        return sampler
    base = re.sub(rf"-({'|'.join(SPACINGS)})$", "", sampler)
    if f"{base}-{spacing}" not in SAMPLER_NAMES:
        able = [name.removesuffix(f"-{spacing}") for name in SAMPLER_NAMES if name.endswith(f"-{spacing}")]
        raise InputError(
            f"scheduler: found {spacing} for sampler {sampler}, expected one of the samplers {', '.join(able)}"
        )
    return f"{base}-{spacing}"


def check_value(key: str, value: object, kind: Callable[[Any], Any]) -> Any:
    """Give `value` as `kind` reads it.

    Raises
    ------
    InputError
        `kind` does not; its ValueError says what was expected.
    """
    try:
        return kind(value)
    except InputError:
        raise
    except (ValueError, OverflowError) as error:
        expected = error.args[0] if isinstance(error, _UnfitError) else "a number of fewer digits"
        raise InputError(f"{key:.80}: found {value!r:.80}, expected {expected}") from None


class _UnfitError(ValueError):
    """Says what was expected."""


def _checked(key: str, name: str, value: object) -> Any:
    if name not in KINDS:
        raise InputError(f"{key:.80}: unknown setting, expected one of {', '.join(KINDS)}")
    return check_value(key, value, KINDS[name])


def _sizes(key: str, value: object) -> dict[str, int]:
    width, height = check_value(key, value, read_size)
    return {"width": width, "height": height}


def read_size(value: object) -> tuple[int, int]:
    """Read a size such as ``512x768``: width, height."""
    match = re.fullmatch(r"\s*(\d+)\s*[x×X]\s*(\d+)\s*", value) if isinstance(value, str) else None
    if match is None:
        raise _UnfitError("a size such as 512x768")
    return int(match[1]), int(match[2])


def as_text(value: object) -> str:
    """Read a text."""
    if not isinstance(value, str):
        raise _UnfitError("a text")
    return value


def as_whole(value: object) -> int:
    """Read a whole number; of more digits than float64 holds only without a point."""
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d+\s*", value):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    try:
        found = as_number(value)
    except _UnfitError:
        found = math.nan
    if not found.is_integer() or abs(found) >= 2**53:
        raise _UnfitError("a whole number")
    return int(found)


def as_number(value: object) -> float:
    """Read a finite number."""
    try:
        found = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise _UnfitError("a number")
    return found


def as_flag(value: object) -> bool:
    """Read true or false."""
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if str(value).strip().lower() not in words:
        raise _UnfitError("true or false")
    return words[str(value).strip().lower()]


def one_of(*names: str) -> Callable[[object], str]:
    """Make a reader of one of these words, in any case."""

    def read(value: object) -> str:
        if str(value).lower() not in names:
            raise _UnfitError(" or ".join(names))
        return str(value).lower()

    return read


def several(kind: Callable[[object], Any], count: int, expected: str) -> Callable[[object], tuple[Any, ...]]:
    """Make a reader of so many values of a kind, in a list or a text with commas."""

    def read(value: object) -> tuple[Any, ...]:
        items = value.split(",") if isinstance(value, str) else value
        try:
            if isinstance(items, list | tuple) and len(items) == count:
                return tuple(kind(item) for item in items)
        except _UnfitError:
            pass
        raise _UnfitError(expected)

    return read


def as_hashes(value: object) -> Hashes:
    """Read names with hashes: a mapping, pairs, or AUTOMATIC1111's text ``name: hash, name: hash``."""
    if isinstance(value, str):
        value = [item.strip().rsplit(": ", 1) for item in value.split(",") if item.strip()]
    pairs: Any = list(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, list | tuple) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(part, str) for part in pair)
        for pair in pairs
    ):
        raise _UnfitError("names with hashes")
    return tuple((name, digest) for name, digest in pairs)


def _seed(value: object) -> int | None:
    found = as_whole(value)
    return found if found >= 0 else None


def _second_steps(value: object) -> int | None:
    found = as_whole(value)
    if found < 0:
        raise _UnfitError("a whole number of at least 1, or 0 for as many as in the first pass")
    return found or None


def _sampler(value: object) -> str:
    return canonical_sampler_name(as_text(value))


KINDS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(
        ("prompt", "negative_prompt", "init_image", "init_hash", "mask_image", "mask_hash", "cache"), as_text
    ),
    **dict.fromkeys(("model_name", "model_hash", "vae", "taesd"), as_text),
    **dict.fromkeys(("num_inference_steps", "width", "height", "clip_skip"), as_whole),
    "hires_steps": _second_steps,
    **dict.fromkeys(("guidance_scale", "eta", "strength", "hires_scale", "hires_strength", "tome"), as_number),
    **dict.fromkeys(("lora_hashes", "ti_hashes"), as_hashes),
    "seed": _seed,
    "scheduler": _sampler,
    "rng": one_of(*RNGS),
    "prompt_syntax": one_of(*SYNTAXES),
    "precision": one_of(*layers.PRECISIONS, "auto"),
    "vae_tiling": as_flag,
    "expand": several(as_whole, 4, "4 whole numbers: pixels on the left, the top, the right, the bottom"),
    "cfg_interval": several(as_number, 2, "2 numbers: from, to"),
}
"""How each field is read; the order is that of the message about an unknown one."""
