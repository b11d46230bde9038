"""Samplers: from noise to latents in a few network calls, under their usual names.

:func:`make_sampler` builds one from its name and the model's ``scheduler_config.json``; :mod:`sd_numba.samplers.base`
shows how to run it.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from ..config import ConfigReader
from ..errors import InputError
from .base import Plan, Sampler
from .sigmas import SIGMA_SPACINGS

__all__ = [
    "DISPLAY_NAMES",
    "SAMPLERS",
    "SAMPLER_NAMES",
    "Plan",
    "Sampler",
    "canonical_sampler_name",
    "config_with_sampler",
    "make_sampler",
    "sampler_name_from_config",
]

_FIRST_MODULES = ("ddpm", "pndm", "euler", "dpm", "lcm")  # the order of lists of samplers; other modules follow


def _find_samplers() -> Iterator[type[Sampler]]:
    """Yield the classes of this package's modules that have a name of their own."""
    found = {module.name for module in iter_modules(__path__)}
    for name in (*_FIRST_MODULES, *sorted(found.difference(_FIRST_MODULES))):
        module = import_module(f"{__name__}.{name}")
        classes = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Sampler)]
        yield from (kind for kind in classes if kind.__module__ == module.__name__ and "name" in vars(kind))


SAMPLERS: dict[str, type[Sampler]] = {kind.name: kind for kind in _find_samplers()}
"""The class of each sampler, by our name for it."""


def _names(kind: type[Sampler], base: str) -> tuple[str, ...]:
    """Return ``base`` and, if the sampler takes a sigma spacing, ``base`` with each one."""
    return (base, *(f"{base}-{spacing}" for spacing in SIGMA_SPACINGS if "sigma_spacing" in kind.options))


SAMPLER_NAMES: tuple[str, ...] = (
    *SAMPLERS,
    *(name for kind in SAMPLERS.values() for name in _names(kind, kind.name)[1:]),
)
"""Every name that :func:`make_sampler` knows, in our spelling."""


def _split(name: str) -> tuple[str, str | None]:
    """Split one of the names into the sampler and its sigma spacing."""
    base, _, spacing = name.rpartition("-")
    return (base, spacing) if spacing in SIGMA_SPACINGS else (name, None)


def _display_name(name: str) -> tuple[str, str]:
    base, spacing = _split(name)
    return SAMPLERS[base].title, spacing.capitalize() if spacing else "Automatic"


DISPLAY_NAMES: dict[str, tuple[str, str]] = {name: _display_name(name) for name in SAMPLER_NAMES}
"""AUTOMATIC1111's name for each: the sampler, and the schedule type."""


def canonical_sampler_name(name: str) -> str:
    """Return our spelling of a sampler's name.

    ``"DPM++ 2M Karras"`` and ``"k_dpmpp_2m_karras"`` are ``"dpm++2m-karras"``.

    Raises
    ------
    InputError
        No sampler has that name; the message lists them and the closest match.
    """
    known = {_compact(ours): ours for ours in SAMPLER_NAMES}
    for kind in SAMPLERS.values():
        for alias in (kind.title, *kind.aliases):
            known |= zip(map(_compact, _names(kind, alias)), _names(kind, kind.name), strict=True)
    compact = _compact(str(name))
    found = known.get(compact) or known.get(compact.removeprefix("k"))
    if found is None:
        close = difflib.get_close_matches(compact, known, n=1)
        hint = f"; did you mean {known[close[0]]!r}?" if close else ""
        raise InputError(name="scheduler", found=name, expected=f"one of {', '.join(SAMPLER_NAMES)}{hint}")
    return found


def _compact(name: str) -> str:
    return re.sub(r"[\s_-]", "", name.lower()).replace("dpmpp", "dpm++")


def make_sampler(name: str, config: Mapping[str, Any], eta: float = 0.0) -> Sampler:
    """Return the sampler called ``name``, for a model with this scheduler config.

    Parameters
    ----------
    name : str
        One of :data:`SAMPLER_NAMES`, or another spelling that :func:`canonical_sampler_name` understands. A name that
        ends in ``-karras`` or ``-exponential`` selects that spacing of the sigmas; otherwise the config does.
    config : mapping
        The parsed ``scheduler_config.json``, whichever sampler it was written for. Settings
        it leaves out take the defaults of this sampler's class in diffusers.
    eta : float
        Noise of ddim, 0 .. 1; ignored by the other samplers.

    Raises
    ------
    InputError
        The name is unknown, or eta is negative.
    ModelError
        A value in the config is not supported.
    """
    base, spacing = _split(canonical_sampler_name(name))
    kind = SAMPLERS[base]
    options = {"eta": eta, "sigma_spacing": spacing}
    return kind(config, **{option: options[option] for option in kind.options})


def sampler_name_from_config(config: Mapping[str, Any]) -> str:
    """Return the name of the sampler that a ``scheduler_config.json`` was written for.

    Raises
    ------
    ModelError
        Its ``_class_name`` or ``algorithm_type`` is missing or not supported.
    """
    reader = ConfigReader(config, "scheduler")
    classes = sorted({kind.diffusers_class for kind in SAMPLERS.values()})
    kinds = _samplers_of(reader.word("_class_name", "", tuple(classes)))
    kind = kinds[0]
    if kind.algorithm_type is not None:
        of_type = {one.algorithm_type: one for one in kinds if one.algorithm_type is not None}
        kind = of_type[reader.word("algorithm_type", kind.algorithm_type, tuple(of_type))]
    if "sigma_spacing" in kind.options:
        for spacing in SIGMA_SPACINGS:
            if reader.flag(f"use_{spacing}_sigmas", False):
                return f"{kind.name}-{spacing}"
    return kind.name


def _samplers_of(diffusers_class: str) -> list[type[Sampler]]:
    """Return the samplers that a class of diffusers stands for, its default first."""
    return [kind for kind in SAMPLERS.values() if kind.diffusers_class == diffusers_class]


def config_with_sampler(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of the config that selects the sampler called ``name``.

    Raises
    ------
    InputError
        No sampler has that name.
    """
    name = canonical_sampler_name(name)
    base, spacing = _split(name)
    kind = SAMPLERS[base]
    changed = {**config, "_class_name": kind.diffusers_class}
    is_default = kind is _samplers_of(kind.diffusers_class)[0]
    if kind.algorithm_type is not None and (not is_default or "algorithm_type" in config):
        changed["algorithm_type"] = kind.algorithm_type
    if spacing:
        changed |= {f"use_{one}_sigmas": one == spacing for one in SIGMA_SPACINGS}
    return changed
