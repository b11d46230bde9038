"""What scripts written for diffusers import and call beside the pipeline itself: scheduler classes, and its methods.

Each scheduler class is a name for one of our samplers together with a config; nothing is computed here.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from ..checkpoints.opening import find_path
from ..errors import InputError
from ..files.folders import read_json
from ..samplers import SAMPLERS, Sampler, make_sampler, sampler_name_from_config
from .ignored import IDLE_FILES, closest

log = logging.getLogger(__name__)

S = TypeVar("S", bound="Scheduler")

# Where several samplers share a class of diffusers, the first one has the settings that choose among them.
_SAMPLERS: dict[str, type[Sampler]] = {kind.diffusers_class: kind for kind in reversed(SAMPLERS.values())}


class SchedulerConfig(Mapping[str, Any]):
    """The settings of a scheduler, read-only; attributes read them too."""

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_values" or name not in self._values:
            raise AttributeError(f"the scheduler's config says nothing of {name!r}")
        return self._values[name]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._values})"


class Scheduler:
    """A sampler and the settings it runs with, as diffusers' scheduler of the same name.

    Parameters
    ----------
    **settings
        Settings, by the names in `settings`; the defaults are diffusers'.

    Attributes
    ----------
    config : SchedulerConfig

    Raises
    ------
    InputError
        The class has no such setting.
    ModelError
        A setting has a value that is not supported.
    """

    settings: ClassVar[frozenset[str]] = Sampler.settings

    def __init_subclass__(cls) -> None:
        """Take the settings of the sampler that the class stands for."""
        cls.settings = _SAMPLERS[cls.__name__].settings

    def __init__(self, **settings: Any) -> None:
        for name in settings:
            if name not in self.settings:
                raise _unknown(type(self).__name__, name, self.settings)
        self._configure(settings)

    @classmethod
    def from_config(cls: type[S], config: Mapping[str, Any], **changes: Any) -> S:
        """Make one with the settings of another, ``pipe.scheduler.config``, and changes to them.

        A change that has no meaning for this class, but for another one, is left out, as in diffusers.
        """
        if not isinstance(config, Mapping):
            raise InputError(f"config: found {type(config).__name__}, expected settings, such as pipe.scheduler.config")
        everywhere = set().union(*(other.settings for other in SCHEDULERS.values()))
        for name in changes:
            if name not in everywhere:
                raise _unknown(cls.__name__, name, cls.settings)
            if name not in cls.settings:
                log.warning("%s: %s has no meaning for it", cls.__name__, name)
        made = cls()
        made._configure({**config, **{name: changes[name] for name in changes if name in cls.settings}})
        return made

    @classmethod
    def from_pretrained(cls: type[S], model: str | os.PathLike[str], subfolder: str = "", **changes: Any) -> S:
        """Make one with the settings in a model's folder; ``subfolder="scheduler"`` is where models keep them."""
        config = read_json(Path(find_path(model), subfolder, "scheduler_config.json"))
        return cls.from_config(config, **{name: changes[name] for name in changes if name not in IDLE_FILES})

    def _configure(self, settings: Mapping[str, Any]) -> None:
        self.config = SchedulerConfig({**settings, "_class_name": type(self).__name__})
        make_sampler(self.sampler, self.config)  # for its errors

    @property
    def sampler(self) -> str:
        """The name that ``scheduler=`` of a call takes for it."""
        return sampler_name_from_config(self.config)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({dict(self.config)})"


class DDIMScheduler(Scheduler):
    """DDIM (Song et al., arXiv:2010.02502)."""


class DDPMScheduler(Scheduler):
    """Ancestral sampling (Ho et al., arXiv:2006.11239)."""


class PNDMScheduler(Scheduler):
    """Pseudo linear multistep (Liu et al., arXiv:2202.09778)."""


class EulerDiscreteScheduler(Scheduler):
    """Euler's method (Karras et al., arXiv:2206.00364)."""


class EulerAncestralDiscreteScheduler(Scheduler):
    """Euler's method with noise added at each step."""


class HeunDiscreteScheduler(Scheduler):
    """Heun's method (Karras et al., arXiv:2206.00364)."""


class LMSDiscreteScheduler(Scheduler):
    """Linear multistep."""


class DPMSolverMultistepScheduler(Scheduler):
    """DPM-Solver++ (Lu et al., arXiv:2211.01095), also with noise: ``algorithm_type="sde-dpmsolver++"``."""


class UniPCMultistepScheduler(Scheduler):
    """UniPC (Zhao et al., arXiv:2302.04867)."""


class LCMScheduler(Scheduler):
    """Latent consistency models (Luo et al., arXiv:2310.04378)."""


# The classes above are written out for readers and type checkers; those of other samplers are made here.
for _name in _SAMPLERS.keys() - {kind.__name__ for kind in Scheduler.__subclasses__()}:
    globals()[_name] = type(_name, (Scheduler,), {"__module__": __name__, "__doc__": _SAMPLERS[_name].__doc__})

SCHEDULERS: dict[str, type[Scheduler]] = {kind.__name__: kind for kind in Scheduler.__subclasses__()}


def _unknown(owner: str, name: str, known: Collection[str]) -> InputError:
    return InputError(f"{owner}: found the setting {name!r}, expected one that it has{closest(name, known)}")
