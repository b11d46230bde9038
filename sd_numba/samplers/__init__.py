"""Samplers: from noise to latents in few network calls, by the names that people know.

:func:`make_sampler` builds one from its name and the model's ``scheduler_config.json``; :mod:`sd_numba.samplers.base`
shows how to run it.
"""

import difflib
import re
from collections.abc import Mapping
from typing import Any

from ..config import ConfigReader
from ..errors import InputError
from .base import Plan, Sampler
from .ddpm import DDIM, DDPM
from .dpm import DPMSolverPP, DPMSolverPPSDE, UniPC
from .euler import LMS, Euler, EulerAncestral, Heun
from .lcm import LCM
from .pndm import PNDM

__all__ = [
    "DISPLAY_NAMES",
    "SAMPLER_NAMES",
    "Plan",
    "Sampler",
    "canonical_sampler_name",
    "config_with_sampler",
    "make_sampler",
    "sampler_name_from_config",
]

# Our name: the class, what AUTOMATIC1111 calls it, the class of diffusers that a config names
_SAMPLERS: dict[str, tuple[type[Sampler], str, str]] = {
    "ddpm": (DDPM, "DDPM", "DDPMScheduler"),
    "ddim": (DDIM, "DDIM", "DDIMScheduler"),
    "pndm": (PNDM, "PLMS", "PNDMScheduler"),
    "euler": (Euler, "Euler", "EulerDiscreteScheduler"),
    "euler-a": (EulerAncestral, "Euler a", "EulerAncestralDiscreteScheduler"),
    "heun": (Heun, "Heun", "HeunDiscreteScheduler"),
    "lms": (LMS, "LMS", "LMSDiscreteScheduler"),
    "dpm++2m": (DPMSolverPP, "DPM++ 2M", "DPMSolverMultistepScheduler"),
    "dpm++2m-sde": (DPMSolverPPSDE, "DPM++ 2M SDE", "DPMSolverMultistepScheduler"),
    "unipc": (UniPC, "UniPC", "UniPCMultistepScheduler"),
    "lcm": (LCM, "LCM", "LCMScheduler"),
}
_SIGMA_SPACINGS = ("karras", "exponential")
_RESPACED = ("euler", "heun", "lms", "dpm++2m", "dpm++2m-sde", "unipc")

SAMPLER_NAMES: tuple[str, ...] = (
    *_SAMPLERS,
    *(f"{name}-{spacing}" for name in _RESPACED for spacing in _SIGMA_SPACINGS),
)
"""Every name that :func:`make_sampler` knows, in our spelling."""

# What other programs call them, without case, blanks, underscores and hyphens
_ALIASES = {
    "eulera": "euler-a",
    "eulerancestral": "euler-a",
    "plms": "pndm",
    "dpmsolver++": "dpm++2m",
    "sdedpmsolver++": "dpm++2m-sde",
}


def _split(name: str) -> tuple[str, str | None]:
    """Split one of the names into the sampler and its sigma spacing."""
    base, _, spacing = name.rpartition("-")
    return (base, spacing) if spacing in _SIGMA_SPACINGS else (name, None)


def _display_name(name: str) -> tuple[str, str]:
    base, spacing = _split(name)
    return _SAMPLERS[base][1], spacing.capitalize() if spacing else "Automatic"


DISPLAY_NAMES: dict[str, tuple[str, str]] = {name: _display_name(name) for name in SAMPLER_NAMES}
"""What AUTOMATIC1111 calls each: the sampler, and the schedule type."""


def canonical_sampler_name(name: str) -> str:
    """Return our spelling of a sampler's name.

    ``"DPM++ 2M Karras"`` and ``"k_dpmpp_2m_karras"`` are ``"dpm++2m-karras"``.

    Raises
    ------
    InputError
        No sampler has that name; the message lists them and the closest match.
    """
    known = {_compact(ours): ours for ours in SAMPLER_NAMES}
    for alias, base in _ALIASES.items():
        known |= {alias + spacing: f"{base}-{spacing}" for spacing in _SIGMA_SPACINGS if base in _RESPACED}
        known[alias] = base
    compact = _compact(str(name))
    found = known.get(compact) or known.get(compact.removeprefix("k"))
    if found is None:
        close = difflib.get_close_matches(compact, known, n=1)
        hint = f" (did you mean {known[close[0]]!r}?)" if close else ""
        raise InputError(f"unknown sampler {name!r}{hint}: it can be {', '.join(SAMPLER_NAMES)}")
    return found


def _compact(name: str) -> str:
    return re.sub(r"[\s_-]", "", name.lower()).replace("dpmpp", "dpm++")


def make_sampler(name: str, config: Mapping[str, Any], eta: float = 0.0) -> Sampler:
    """Return the sampler called ``name``, for a model with this scheduler config.

    Parameters
    ----------
    name : str
        One of :data:`SAMPLER_NAMES`, or another spelling that :func:`canonical_sampler_name` understands. A name that
        ends in ``-karras`` or ``-exponential`` spaces the sigmas so; otherwise the config decides.
    config : mapping
        The parsed ``scheduler_config.json``, whichever sampler it was written for. What it says holds; what it does not
        say takes the default of this sampler's class in diffusers.
    eta : float
        Noise of ddim, 0 .. 1; of no use to the others.

    Raises
    ------
    InputError
        An unknown name, or a negative eta.
    ModelError
        A value in the config that is not supported.
    """
    base, spacing = _split(canonical_sampler_name(name))
    kind = _SAMPLERS[base][0]
    if kind is DDIM:
        return DDIM(config, eta)
    if base in _RESPACED:
        return kind(config, spacing)  # type: ignore[call-arg]
    return kind(config)


def sampler_name_from_config(config: Mapping[str, Any]) -> str:
    """Return the name of the sampler that a ``scheduler_config.json`` was written for.

    Raises
    ------
    ModelError
        Its ``_class_name`` or ``algorithm_type`` is missing or not supported.
    """
    reader = ConfigReader(config, "scheduler")
    names = {class_name: name for name, (_, _, class_name) in reversed(_SAMPLERS.items())}
    name = names[reader.word("_class_name", "", tuple(sorted(names)))]
    if name == "dpm++2m":
        algorithm = reader.word("algorithm_type", "dpmsolver++", ("dpmsolver++", "sde-dpmsolver++"))
        name = "dpm++2m-sde" if algorithm.startswith("sde") else name
    if name in _RESPACED:
        for spacing in _SIGMA_SPACINGS:
            if reader.flag(f"use_{spacing}_sigmas", False):
                return f"{name}-{spacing}"
    return name


def config_with_sampler(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config that asks for the sampler called ``name``, and is otherwise the same.

    Raises
    ------
    InputError
        No sampler has that name.
    """
    name = canonical_sampler_name(name)
    base, spacing = _split(name)
    class_name = _SAMPLERS[base][2]
    changed = {**config, "_class_name": class_name}
    if class_name == "DPMSolverMultistepScheduler" and (base == "dpm++2m-sde" or "algorithm_type" in config):
        changed["algorithm_type"] = "sde-dpmsolver++" if base == "dpm++2m-sde" else "dpmsolver++"
    if spacing:
        changed |= {f"use_{one}_sigmas": one == spacing for one in _SIGMA_SPACINGS}
    return changed
