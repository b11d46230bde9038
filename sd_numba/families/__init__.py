"""The kinds of model that can be run: a module for each, with a `Family` called ``FAMILY``.

`FAMILIES` holds that of every module of this room, by the modules' names. What follows from it alone, such as messages
that list the families, is here too.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Collection
from importlib import import_module

from .base import Conditioning, Family, Network

__all__ = ["FAMILIES", "Conditioning", "Family", "Network", "family_of_file", "pipelines", "titles", "widths"]

_modules = [import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
FAMILIES: list[Family] = [module.FAMILY for module in _modules if hasattr(module, "FAMILY")]


def family_of_file(names: Collection[str]) -> Family | None:
    """Tell by its tensors' names which family's model a single file holds; None: none that can be run."""
    return next((family for family in FAMILIES if family.recognises_file(names)), None)


def pipelines() -> tuple[str, ...]:
    """List the classes in ``model_index.json`` that can be run."""
    return tuple(dict.fromkeys(family.pipeline for family in FAMILIES))


def titles(conjunction: str = "and") -> str:
    """List the families, such as "Stable Diffusion 1.x and 2.x"."""
    lines: dict[str, list[str]] = {}
    for family in FAMILIES:
        lines.setdefault(family.line, []).append(family.version)
    return ", ".join(f"{line} {f' {conjunction} '.join(versions)}".strip() for line, versions in lines.items())


def widths() -> str:
    """Say how wide each family's text is, such as "768 values: 1.x, 1024: 2.x"."""
    first, *others = FAMILIES
    return ", ".join(
        [f"{first.text_width} values: {first.version}", *(f"{one.text_width}: {one.version}" for one in others)]
    )
