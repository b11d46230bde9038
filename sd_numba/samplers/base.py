"""What all samplers share: the plan of a run, the reading of ``scheduler_config.json``, and the interface.

A sampler is a stateless object. ``plan(num_steps)`` lays out a run; ``step`` takes one step of it and returns the new
latents and the history that the next step needs::

    plan = sampler.plan(20)
    x, history = plan.init_noise_sigma * noise, None
    for i in range(len(plan)):
        output = unet(sampler.scale_model_input(x, plan, i), plan.timesteps[i], context)
        x, history = sampler.step(output, x, plan, i, history, normal)

An image-to-image run starts later: at call ``sampler.start_call(20, strength)``, from
``sampler.noised(picture, noise, plan, start)``.

Latents are float32 ``(n, c, h, w)``. Settings missing from a config take the defaults of diffusers' class
for the same method, so that the same config gives the same pictures. Where diffusers fails or yields NaN
(all 1000 steps with some spacings, for instance), these samplers use the nearest run that works.
"""

import numbers
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..config import ConfigReader
from ..errors import InputError, Range
from .schedule import PREDICTION_TYPES, NoiseSchedule

Normal = Callable[[], np.ndarray]
SPACINGS = ("leading", "linspace", "trailing")

# Settings of a scheduler config, by what they control
COMMON_SETTINGS = frozenset((
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
    "timestep_spacing", "steps_offset",
))  # fmt: skip
LIMIT_SETTINGS = frozenset((
    "thresholding", "dynamic_thresholding_ratio", "sample_max_value", "rescale_betas_zero_snr",
))  # fmt: skip
CLIP_SETTINGS = frozenset(("clip_sample", "clip_sample_range"))


@dataclass(frozen=True, eq=False)
class Plan:
    """The schedule of one run.

    Attributes
    ----------
    num_steps : int
        Steps asked for; some samplers call the network more often.
    timesteps : np.ndarray
        Timestep passed to the network at each call: int64 or float32 ``(calls,)``.
    sigmas : np.ndarray
        Ratio of noise to picture at each call and after the last one: float32 ``(calls + 1,)``.
    init_noise_sigma : float
        Standard deviation of the normal noise that a run starts from.
    """

    num_steps: int
    timesteps: np.ndarray
    sigmas: np.ndarray
    init_noise_sigma: float = 1.0

    def __len__(self) -> int:
        """Return the number of network calls."""
        return len(self.timesteps)


class Sampler:
    """Base of all samplers: reads the common part of the config.

    A class that sets `name` is a sampler that can be chosen; its other class attributes say what other programs call
    it. Nothing else has to be registered.

    Parameters
    ----------
    config : mapping
        The parsed ``scheduler_config.json``.

    Raises
    ------
    ModelError
        A value is not supported; the message names it.
    """

    name: ClassVar[str]
    """Our name for it."""
    title: ClassVar[str]
    """AUTOMATIC1111's name for it."""
    aliases: ClassVar[tuple[str, ...]] = ()
    """More names for it, besides `name` and `title`. Case, spaces, underscores and hyphens do not matter."""
    diffusers_class: ClassVar[str]
    """The scheduler class of diffusers that runs the same method."""
    algorithm_type: ClassVar[str | None] = None
    """Value of this setting that selects the sampler, if several samplers share a diffusers class."""
    settings: ClassVar[frozenset[str]] = COMMON_SETTINGS
    """Settings of the diffusers class that affect the sampler."""
    options: ClassVar[tuple[str, ...]] = ()
    """Constructor parameters besides config: ``"eta"``, ``"sigma_spacing"``."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Defaults of this sampler's class that differ from the common ones."""
    honours_zero_snr: ClassVar[bool] = True
    """Whether rescale_betas_zero_snr has an effect."""
    calls_per_step: ClassVar[int] = 1
    """Network calls between two steps that a run can start at."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        written = {key: value for key, value in config.items() if value is not None}
        values = {**self.defaults, **written}
        self._reader = ConfigReader(values, "scheduler")
        self.schedule = NoiseSchedule.from_config(values, zero_terminal_snr=self.honours_zero_snr)
        self.num_train_timesteps = self.schedule.num_train_timesteps
        self.prediction_type = self._reader.word("prediction_type", "epsilon", PREDICTION_TYPES)
        self._spacing = self._reader.word("timestep_spacing", "linspace", SPACINGS)
        self._offset = self._reader.integer("steps_offset", 0, minimum=0)

    def plan(self, num_steps: int) -> Plan:
        """Lay out a run of ``num_steps`` steps.

        Raises
        ------
        InputError
            ``num_steps`` is not a whole number from 1 to the number of training timesteps.
        """
        raise NotImplementedError

    def start_call(self, num_steps: int, strength: float) -> int:
        """Return the call at which an image-to-image run starts, as in diffusers' pipeline.

        Parameters
        ----------
        num_steps : int
            Steps of the whole run.
        strength : float
            Share of the steps to run, above 0 and at most 1: how much noise is added to the picture.

        Raises
        ------
        InputError
            The strength is out of range, `plan` refuses the number of steps, or the share is less than one step.
        """
        num_steps = self._check_steps(num_steps)
        if isinstance(strength, bool) or not isinstance(strength, numbers.Real) or not 0 < strength <= 1:
            raise InputError(name="strength", found=strength, expected="a number above 0, up to 1")
        steps = int(num_steps * float(strength))
        if steps == 0:
            raise InputError(
                f"a strength of {strength:g} runs less than one of {num_steps} steps; raise the strength or the steps"
            )
        return (num_steps - steps) * self.calls_per_step

    def noised(self, x0: np.ndarray, noise: np.ndarray, plan: Plan, i: int) -> np.ndarray:
        """Return the latents of a picture with the noise level that a run has before call ``i``.

        Parameters
        ----------
        x0 : np.ndarray
            Latents of the picture.
        noise : np.ndarray
            Unit normal noise of its shape.
        plan : Plan
            The run.
        i : int
            The call, 0 .. len(plan); after the last one, the picture is clean.
        """
        return x0 if i == len(plan) else self._add_noise(x0, noise, plan, i)

    def _add_noise(self, x0: np.ndarray, noise: np.ndarray, plan: Plan, i: int) -> np.ndarray:
        raise NotImplementedError

    def denoised(self, output: np.ndarray, x: np.ndarray, plan: Plan, i: int) -> np.ndarray:
        """Return the clean latents that the network's ``output`` at call ``i`` predicts.

        Parameters
        ----------
        output, x, plan, i
            As `step` takes them.
        """
        raise NotImplementedError

    def scale_model_input(self, x: np.ndarray, plan: Plan, i: int) -> np.ndarray:
        """Return the network's input at call ``i``, made from the latents ``x``."""
        return x

    def step(
        self, output: np.ndarray, x: np.ndarray, plan: Plan, i: int, history: Any, normal: Normal
    ) -> tuple[np.ndarray, Any]:
        """Return the latents after call ``i``, and the history for the next call.

        Parameters
        ----------
        output : np.ndarray
            The network's prediction at call ``i``, after guidance.
        x : np.ndarray
            The latents before the call.
        plan : Plan
            The run.
        i : int
            The call, 0 .. len(plan) - 1.
        history
            The history that the last call returned; None for the first call.
        normal : callable
            Returns fresh unit normal noise of x's shape; only stochastic samplers call it.
        """
        raise NotImplementedError

    def _check_steps(self, num_steps: int) -> int:
        try:
            n = 0 if isinstance(num_steps, bool) else operator.index(num_steps)
        except TypeError:
            n = 0
        if not 1 <= n <= self.num_train_timesteps:
            expected = Range("a whole number", 1, self.num_train_timesteps)
            raise InputError(name="num_inference_steps", found=num_steps, expected=expected)
        return n

    def _space(self, num_steps: int, *, skip_end: bool = False, last: int | None = None) -> np.ndarray:
        return space_timesteps(
            self._spacing, num_steps, self.num_train_timesteps, self._offset, skip_end=skip_end, last=last
        )


class X0Limit:
    """Keeps predicted pictures in range if the config asks for it: by clipping or dynamic thresholding.

    Dynamic thresholding (Saharia et al., arXiv:2205.11487) divides by a high quantile of each picture's values.
    """

    def __init__(self, reader: ConfigReader, *, clip: bool = False, threshold: bool = False) -> None:
        self._clip = reader.number("clip_sample_range", 1.0) if clip and reader.flag("clip_sample", False) else None
        self._threshold = threshold and reader.flag("thresholding", False)
        self._quantile = reader.number("dynamic_thresholding_ratio", 0.995)
        self._maximum = reader.number("sample_max_value", 1.0)

    def __call__(self, x0: np.ndarray) -> np.ndarray:
        """Return ``x0`` within the limits."""
        if self._threshold:
            quantiles = np.quantile(np.abs(x0).reshape(len(x0), -1), self._quantile, axis=1)
            limit = np.minimum(np.maximum(quantiles, 1), self._maximum).astype(x0.dtype)
            limit = limit.reshape((-1,) + (1,) * (x0.ndim - 1))
            return np.clip(x0, -limit, limit) / limit
        return x0 if self._clip is None else np.clip(x0, -self._clip, self._clip)


def space_timesteps(
    spacing: str, num_steps: int, total: int, offset: int = 0, *, skip_end: bool = False, last: int | None = None
) -> np.ndarray:
    """Choose ``num_steps`` of ``total`` training timesteps, in falling order (arXiv:2305.08891, table 2).

    Parameters
    ----------
    spacing : str
        ``"leading"``: equal whole distances from 0, raised by ``offset``; ``"linspace"``: from end to end, not
        rounded; ``"trailing"``: equal distances down from the noisy end.
    num_steps, total, offset : int
        See above.
    skip_end : bool
        Space one timestep more and leave out the cleanest one, as multistep solvers do.
    last : int, optional
        Number of timesteps in use, counted from the clean end; ``total`` by default.

    Returns
    -------
    np.ndarray
        float64 ``(num_steps,)``, whole numbers unless linspace; shorter where ``last`` leaves no room for all.
    """
    last = total if last is None else last
    points = num_steps + 1 if skip_end else num_steps
    if spacing == "trailing":
        # A distance that is not exact in binary can make arange one too long.
        return np.arange(last, 0, -total / num_steps)[:num_steps].round() - 1
    if spacing == "leading":
        timesteps = np.arange(points)[::-1][:num_steps] * float(max(last // points, 1))
        return timesteps + min(offset, total - 1 - timesteps[0])
    if points > last:
        return np.arange(last, dtype=np.float64)[::-1][:num_steps]
    return np.linspace(0, last - 1, points)[::-1][:num_steps]
