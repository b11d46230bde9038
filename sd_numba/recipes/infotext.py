"""Conversion of recipes to the settings in a picture's text and back, whichever program wrote it.

Keys and values are those of AUTOMATIC1111's web UI (``modules/processing.py``, ``infotext_utils.py``, version 1.10)
where it has them; our own keys follow its style. Texts by its older versions, Forge, exporters of ComfyUI, Civitai, and
stable-diffusion.cpp (``examples/common/common.cpp``, with its own names and its JSON) can be read as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import PureWindowsPath
from typing import Any

from .._version import __version__
from ..errors import InputError
from ..generation.settings import RNGS, Setting, defaults_of, settings_of
from ..samplers import DISPLAY_NAMES, SAMPLER_NAMES, canonical_sampler_name
from ..values import NUMBER, TEXT, WHOLE, Choice, number_text, read_value
from .a1111 import AUTOMATIC, AUTOMATIC_TYPES, Parameters, format_parameters, sampler_title
from .recipe import PLAIN_SPACINGS, SPACINGS, Hashes, Recipe, read_size, with_spacing

PROGRAM = "sd-numba"
RNG_NAMES = {"cpu": "CPU", "cuda": "NV"}  # NV: the noise of Nvidia's cards, on any machine
RNG_WORDS = {"cpu": "cpu", "gpu": "cuda", "nv": "cuda", "cuda": "cuda"}
# In other programs' texts these do not change the picture, or repeat another key.
IDLE_KEYS = frozenset(
    {
        "version", "user", "hashes", "vae hash", "created date", "civitai resources", "civitai metadata", "te", "unet",
        "guidance", "template", "negative template", "wildcard prompt", "batch size", "batch pos", "app", "backend",
        "parser", "operations", "time taken", "hardware info", "sdcpp",
    }
)  # fmt: skip
IDLE_VALUES = ("", "0", "none", "false", "disable", "disabled")
RANDOM_SAMPLERS = ("euler-a", "dpm++2m-sde")  # the web UI's Eta says how much noise they add
SINCE_TYPES = (1, 9)  # the web UI's version that took the spacing out of the samplers' names


def recipe_text(recipe: Recipe) -> str:
    """Return the text for the file of a picture that was made from a recipe."""
    return format_parameters(recipe_to_parameters(recipe, __version__))


def recipe_to_parameters(recipe: Recipe, version: str) -> Parameters:
    """Write a recipe as the text that goes into a picture.

    Parameters
    ----------
    recipe : Recipe
        Fields that are None are left out, so resolve the model's defaults first.
    version : str
        Version of sd-numba.

    Returns
    -------
    sd_numba.recipes.a1111.Parameters
        `recipe_from_parameters` gives the same recipe again, also after `format_parameters` and `parse_parameters`.
    """
    kind = type(recipe)
    special = _special(recipe)
    settings: dict[str, Any] = {}
    for name in sorted(settings_of(kind), key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER)):
        about, value = settings_of(kind)[name], getattr(recipe, name)
        if name in special:
            settings |= special[name]
        elif about.key:
            given = value is not None and value != defaults_of(kind)[name]
            settings[about.key] = (about.write or _written)(value) if given else None
    settings["Version"] = f"{PROGRAM} {version}"
    written = {key: _written(value) for key, value in settings.items() if value is not None}
    return Parameters(recipe.prompt, recipe.negative_prompt, written)


def _special(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Return keys and values of fields that have several keys, or keys that depend on other fields."""
    size = None if None in (recipe.width, recipe.height) else f"{recipe.width}x{recipe.height}"
    hires = recipe.hires_scale is not None
    return {
        "scheduler": sampler_title(recipe.scheduler) if recipe.scheduler is not None else {},
        "width": {"Size": size} if size else {"Width": recipe.width, "Height": recipe.height},
        "strength": {"Init image strength" if hires else "Denoising strength": recipe.strength},
        "hires_strength": {"Denoising strength" if hires else "Hires denoising strength": recipe.hires_strength},
        "rng": {"RNG": RNG_NAMES.get(recipe.rng, recipe.rng)},
        "hires_steps": {"Hires steps": recipe.hires_steps, "Hires upscaler": "Latent" if hires else None},
    }


# The web UI's order; other settings follow.
ORDER = (
    "num_inference_steps", "scheduler", "guidance_scale", "seed", "width", "model_hash", "model_name", "vae", "taesd",
    "strength", "clip_skip", "tome", "image", "image_hash", "mask_image", "mask_hash", "expand", "rng", "eta",
    "hires_scale", "hires_steps", "hires_strength", "cfg_interval", "cache", "precision", "vae_tiling",
    "prompt_syntax", "lora_hashes", "ti_hashes",
)  # fmt: skip


def _written(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return number_text(value)
    if isinstance(value, tuple):
        return _written_hashes(value) if isinstance(value[0], tuple) else ",".join(map(str, value))
    return str(value)


def _written_hashes(hashes: Hashes) -> str:
    return ", ".join(f"{re.sub('[,:]', '', name)}: {digest}" for name, digest in hashes)


def recipe_from_parameters(parameters: Parameters, owner: type[Recipe] = Recipe) -> tuple[Recipe, list[str]]:
    """Make a recipe from a picture's text, whichever program wrote it. Raises nothing.

    Parameters
    ----------
    parameters : Parameters
        From `parse_parameters`.
    owner : type
        `Recipe`, or a class that adds settings to it.

    Returns
    -------
    Recipe
        Settings that are missing or cannot be read are None or have their defaults.
    list of str
        A line for each setting that is left out although it changes the picture, such as an unknown sampler.
    """
    prompt, settings = _with_json(parameters.prompt, parameters.settings)
    reader = _Reader(settings)
    version = str(settings.get("Version", ""))
    ours = version.startswith(PROGRAM)
    found = {name: _take(reader, about) for name, about in settings_of(owner).items() if about.key and name != "rng"}
    found["scheduler"] = _take_sampler(reader, version)
    found["width"], found["height"] = reader.take("Size", read_size) or (
        reader.take("Width", WHOLE.read),
        reader.take("Height", WHOLE.read),
    )
    found["rng"] = _take_rng(reader, version)
    _take_hires(reader, found)
    if not ours:
        _take_eta(reader, found, version)
        _ask_for_picture(reader, found)
    reader.note_rest()
    given = {name: value for name, value in found.items() if value is not None}
    return owner(prompt, parameters.negative_prompt, **given), reader.notes


def _take(reader: _Reader, about: Setting) -> Any:
    """Return the value of a setting, counted as in Python."""
    value = reader.take(str(about.key), about.parse or about.kind.read)
    return max(value - about.offset, 0) if about.offset and value is not None else value


class _Reader:
    """Settings by their keys, in any case; those left at the end are not supported."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.left = {key.strip().lower(): (key, str(value)) for key, value in settings.items()}
        self.any = bool(settings)
        self.notes: list[str] = []

    def take(self, key: str, read: Callable[[Any], Any] = TEXT.read) -> Any:
        """Return a setting converted by `read`; None if it is missing, or, with a note, if it cannot be read."""
        _, value = self.left.pop(key.lower(), ("", None))
        if value is None:
            return None
        try:
            return read_value(key, value, read)
        except InputError as error:
            self.notes.append(f"{error}; left out")
            return None

    def note_rest(self) -> None:
        """Note the keys that were not taken; keys that begin with the same word (an extension's) share a line."""
        groups: dict[str, list[str]] = {}
        for name, (key, value) in self.left.items():
            if name not in IDLE_KEYS and value.strip().lower() not in IDLE_VALUES:
                groups.setdefault(key.partition(" ")[0], []).append(key)
        self.notes += [f"{', '.join(keys):.100}: not supported, left out" for keys in groups.values()]


def _with_json(prompt: str, settings: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Add what only the JSON of stable-diffusion.cpp contains: LoRAs to the prompt, the second pass to the settings."""
    try:
        record = json.loads(str(settings.get("SDCPP", "")))
    except (ValueError, RecursionError):
        return prompt, settings
    if not isinstance(record, dict):
        return prompt, settings
    loras, hires = record.get("loras"), record.get("hires")
    for lora in loras if isinstance(loras, list) and "<lora:" not in prompt else ():
        if isinstance(lora, dict) and "name" in lora:
            name = PureWindowsPath(str(lora["name"])).name.removesuffix(".safetensors")
            prompt += f" <lora:{name}:{lora.get('multiplier', 1)}>"
    more = {}
    if isinstance(hires, dict) and hires.get("enabled"):
        more = {
            "Hires upscale": hires.get("scale"),
            "Hires steps": hires.get("steps"),
            "Hires upscaler": hires.get("upscaler"),
            "Denoising strength": hires.get("denoising_strength"),
        }
        if hires.get("target_width") and hires.get("target_height"):
            more |= {"Hires upscale": None, "Hires resize": f"{hires['target_width']}x{hires['target_height']}"}
    return prompt, {**settings, **{key: value for key, value in more.items() if value is not None}}


def _take_sampler(reader: _Reader, version: str) -> str | None:
    title, schedule = reader.take("Sampler"), (reader.take("Schedule type") or "").strip().lower()
    if title is None:
        return None
    name, base = _find_sampler(title), title.strip().rpartition(" ")[0]
    if name is None and base and not schedule:  # stable-diffusion.cpp writes the spacing after the name
        name, schedule = _find_sampler(base), title.split()[-1].lower()
    if name is None:
        reader.notes.append(f"Sampler {title!r:.80}: not supported, left out; choose one of {', '.join(SAMPLER_NAMES)}")
        return None
    release = re.search(r"v(\d{1,9})\.(\d{1,9})", version)
    if schedule == "automatic" or (not schedule and release and tuple(map(int, release.groups())) >= SINCE_TYPES):
        sampler, spacing = DISPLAY_NAMES[name]
        schedule = AUTOMATIC_TYPES.get(sampler, "").lower() if spacing == AUTOMATIC else ""
    if schedule in ("", "default", "none", *PLAIN_SPACINGS):
        return name
    try:
        return with_spacing(name, read_value("Schedule type", schedule, Choice(SPACINGS).read))
    except InputError:
        reader.notes.append(f"Schedule type {schedule!r:.80}: not supported with {name}, left out")
        return name


def _find_sampler(title: str) -> str | None:
    try:
        return canonical_sampler_name(title)
    except InputError:
        return None


def _take_rng(reader: _Reader, version: str) -> str | None:
    word = reader.take("RNG")
    if word is None:  # the web UI does not write its default, noise of a GPU; ComfyUI's default is noise of the CPU
        named = reader.any and not version.startswith(PROGRAM) and "comfyui" not in version.lower()
        return "cuda" if named else None
    rng = RNG_WORDS.get(word.strip().lower())
    if rng is None:
        reader.notes.append(f"RNG {word!r:.80}: not supported, left out; choose one of {', '.join(RNGS)}")
    other = reader.take("Sampler RNG")
    if other is not None and RNG_WORDS.get(other.strip().lower()) != rng:
        reader.notes.append(f"Sampler RNG {other!r:.80}: not supported, left out")
    return rng


def _take_hires(reader: _Reader, found: dict[str, Any]) -> None:
    """Read the second pass. AUTOMATIC1111's denoising strength belongs to it if there is one, else to the first."""
    upscaler, target = reader.take("Hires upscaler"), reader.take("Hires resize", read_size)
    size = (found["width"], found["height"])
    if target and any(target) and found["hires_scale"] is None:
        scales = {side / base for side, base in zip(target, size, strict=True) if base}
        if all(size) and len(scales) == 1:
            found["hires_scale"] = scales.pop()
        else:
            reader.notes.append("Hires resize: a change of aspect ratio is not supported, left out")
    if found["hires_scale"] is None:
        found["strength"] = reader.take("Denoising strength", NUMBER.read)
        found["hires_strength"] = reader.take("Hires denoising strength", NUMBER.read)
    else:
        found["hires_strength"] = reader.take("Denoising strength", NUMBER.read)
        found["strength"] = reader.take("Init image strength", NUMBER.read)
        if upscaler is not None and upscaler != "Latent":
            reader.notes.append(f"Hires upscaler {upscaler!r:.80}: not supported, replaced by Latent")


def _take_eta(reader: _Reader, found: dict[str, Any], version: str) -> None:
    """Read eta: our samplers behave as other programs' do at 1; sd.cpp writes 0 whatever it uses."""
    eta, sampler = reader.take("Eta", _eta), found["scheduler"]
    if eta is None:
        return
    if sampler == "ddim":
        found["eta"] = eta
    elif (sampler or "").startswith(RANDOM_SAMPLERS) and eta != 1 and not (eta == 0 and "cpp" in version):
        reader.notes.append(f"Eta: {eta:g} is not supported with {sampler}, left out")


def _ask_for_picture(reader: _Reader, found: dict[str, Any]) -> None:
    """Note that other programs do not name the picture that they started from; their hash is of another kind."""
    if found["image_hash"] is not None or (found["strength"] is not None and found["image"] is None):
        reader.notes.append("Init image: not named; give the picture that this one was made from")
    found["image_hash"] = None


def _eta(value: str) -> float:
    return 1.0 if value.strip().lower() == "inf" else NUMBER.read(value)  # stable-diffusion.cpp's default
