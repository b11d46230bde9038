"""What scripts written for diffusers import and call beside the pipeline itself: scheduler classes, and its methods.

Each scheduler class is a name for one of our samplers together with a config; nothing is computed here.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np

from ..checkpoints.opening import find_path
from ..errors import InputError
from ..files.folders import read_json
from ..generation.model import ModelParts
from ..samplers import config_with_sampler, make_sampler, sampler_name_from_config

log = logging.getLogger(__name__)

S = TypeVar("S", bound="Scheduler")

# Arguments of diffusers' `from_pretrained` that choose among files, devices and precisions, or leave out a part that is
# not here either.
IDLE_FILES = ("use_safetensors", "variant", "local_files_only", "revision", "cache_dir", "token", "force_download")
IDLE_OPENING = (
    *IDLE_FILES, "torch_dtype", "dtype", "low_cpu_mem_usage", "device_map", "safety_checker", "feature_extractor",
    "requires_safety_checker",
)  # fmt: skip
# Arguments of diffusers' `__call__` that are taken as long as they change nothing.
IDLE_CALL: dict[str, tuple[Any, ...]] = {
    "callback_on_step_end_tensor_inputs": (["latents"],),
    "guidance_rescale": (0,),
    "cross_attention_kwargs": (),
    "prompt_embeds": (),
    "negative_prompt_embeds": (),
    "ip_adapter_image": (),
    "timesteps": (),
    "sigmas": (),
    "padding_mask_crop": (),
}

# What scheduler classes have in common
_ALL = frozenset((
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
    "timestep_spacing", "steps_offset",
))  # fmt: skip
_SPACED = _ALL | {"use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"}
_LIMITED = _ALL | {"thresholding", "dynamic_thresholding_ratio", "sample_max_value", "rescale_betas_zero_snr"}
_CLIPPED = _LIMITED | {"clip_sample", "clip_sample_range"}
_SOLVER = _SPACED | _LIMITED | {
    "solver_order", "solver_type", "lower_order_final", "final_sigmas_type", "use_flow_sigmas",
}  # fmt: skip


class SchedulerConfig(Mapping[str, Any]):
    """The settings of a scheduler, which can be read as attributes as well, and not be changed."""

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
        Those of `settings`; what is not given has the same default as in diffusers.

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

    settings: ClassVar[frozenset[str]] = _ALL

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

    settings = _CLIPPED | {"set_alpha_to_one"}


class DDPMScheduler(Scheduler):
    """Ancestral sampling (Ho et al., arXiv:2006.11239)."""

    settings = _CLIPPED | {"variance_type"}


class PNDMScheduler(Scheduler):
    """Pseudo linear multistep (Liu et al., arXiv:2202.09778)."""

    settings = _ALL | {"skip_prk_steps", "set_alpha_to_one"}


class EulerDiscreteScheduler(Scheduler):
    """Euler's method (Karras et al., arXiv:2206.00364)."""

    settings = _SPACED | {
        "interpolation_type", "timestep_type", "sigma_min", "sigma_max", "final_sigmas_type", "rescale_betas_zero_snr",
    }  # fmt: skip


class EulerAncestralDiscreteScheduler(Scheduler):
    """Euler's method with noise added at each step."""

    settings = _ALL | {"rescale_betas_zero_snr"}


class HeunDiscreteScheduler(Scheduler):
    """Heun's method (Karras et al., arXiv:2206.00364)."""

    settings = _SPACED | {"clip_sample", "clip_sample_range"}


class LMSDiscreteScheduler(Scheduler):
    """Linear multistep."""

    settings = _SPACED


class DPMSolverMultistepScheduler(Scheduler):
    """DPM-Solver++ (Lu et al., arXiv:2211.01095), also with noise: ``algorithm_type="sde-dpmsolver++"``."""

    settings = _SOLVER | {"algorithm_type", "euler_at_final", "use_lu_lambdas", "lambda_min_clipped"}


class UniPCMultistepScheduler(Scheduler):
    """UniPC (Zhao et al., arXiv:2302.04867)."""

    settings = _SOLVER | {"predict_x0", "disable_corrector", "sigma_min", "sigma_max"}


class LCMScheduler(Scheduler):
    """Latent consistency models (Luo et al., arXiv:2310.04378)."""

    settings = _CLIPPED | {"original_inference_steps", "set_alpha_to_one", "timestep_scaling"}


SCHEDULERS: dict[str, type[Scheduler]] = {kind.__name__: kind for kind in Scheduler.__subclasses__()}


class CompatibleParts(ModelParts):
    """The parts of a model, with the attributes and methods of diffusers' pipelines that scripts use.

    What would spare the memory of a GPU, or move networks to one, does nothing.
    """

    device = "cpu"
    dtype = np.dtype(np.float32)
    safety_checker = None

    def to(self, *devices: Any, **named: Any) -> Any:
        """Return the pipeline itself: everything is computed on the CPU, in the precision it was opened with."""
        for device in (*devices, *named.values()):
            if not str(device).startswith("cpu"):
                log.info("to %s: stays on the CPU, in %s", device, self.precision)
        return self

    @property
    def scheduler(self) -> Scheduler:
        """The sampler that runs by default, with its settings; assign another one to change both."""
        name, config = self.defaults["scheduler"], self.scheduler_config
        if name is not None:
            return SCHEDULERS[(config := config_with_sampler(name, config))["_class_name"]].from_config(config)
        own = Scheduler.__new__(Scheduler)  # the model's own, which is not supported; others can be made of its config
        own.config = SchedulerConfig(config)
        return own

    @scheduler.setter
    def scheduler(self, scheduler: Scheduler) -> None:
        if not isinstance(scheduler, Scheduler):
            raise InputError(
                f"scheduler: found {type(scheduler).__name__}, expected a scheduler of sd_numba, such as "
                "EulerDiscreteScheduler.from_config(pipe.scheduler.config)"
            )
        self.defaults = {**self.defaults, "scheduler": scheduler.sampler}
        self.scheduler_config = dict(scheduler.config)

    def enable_vae_tiling(self) -> None:
        """Decode in strips, whatever the memory."""
        self.vae_tiling = "on"

    def disable_vae_tiling(self) -> None:
        """Decode in strips only if memory would be short."""
        self.vae_tiling = "auto"

    def fuse_lora(self, *, lora_scale: float = 1.0, **options: Any) -> None:
        """Do nothing: LoRAs are in effect once they are loaded."""
        if lora_scale != 1:
            raise InputError(f"lora_scale: found {lora_scale!r}, expected 1; give load_lora_weights(path, weight) it")

    def _idle(self, *arguments: Any, **named: Any) -> None:
        """Do nothing, since there is no GPU whose memory to spare, and no progress bar."""

    enable_attention_slicing = disable_attention_slicing = _idle
    enable_vae_slicing = disable_vae_slicing = _idle
    enable_model_cpu_offload = enable_sequential_cpu_offload = _idle
    enable_xformers_memory_efficient_attention = disable_xformers_memory_efficient_attention = _idle
    set_progress_bar_config = _idle


def check_opening(options: Mapping[str, Any]) -> None:
    """Raise InputError unless these are arguments of diffusers' ``from_pretrained`` that have no effect here."""
    for name in options:
        if name not in IDLE_OPENING:
            hint = _hint(name, IDLE_OPENING)
            raise InputError(f"from_pretrained: found {name}=, expected an argument that it has{hint}")


def without_idle(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call without those that change nothing.

    Raises
    ------
    InputError
        One of them would change something in diffusers.
    """
    for name, idle in IDLE_CALL.items():
        value = options.get(name)
        if value is not None and not any(type(value) in {int, float, list} and value == one for one in idle):
            shown = " ".join(repr(value).split())  # arrays have several lines
            raise InputError(f"{name}: found {shown:.80}, expected {' or '.join(map(repr, (*idle, None)))}")
    return {name: value for name, value in options.items() if name not in IDLE_CALL}


def _unknown(owner: str, name: str, known: Collection[str]) -> InputError:
    return InputError(f"{owner}: found the setting {name!r}, expected one that it has{_hint(name, known)}")


def _hint(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
