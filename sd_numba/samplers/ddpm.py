"""DDPM and DDIM: the samplers that step along the training timesteps with a closed formula.

References: Ho et al., "Denoising diffusion probabilistic models" (arXiv:2006.11239); Song et al., "Denoising diffusion
implicit models" (arXiv:2010.02502).
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from ..errors import InputError
from .base import CLIP_SETTINGS, COMMON_SETTINGS, LIMIT_SETTINGS, Normal, Plan, Sampler, X0Limit
from .schedule import predict_noise, predict_x0


class TimestepSampler(Sampler):
    """Base of the samplers that look alpha-bar up at whole timesteps."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        # float32 as in diffusers, where 1 - a and a / b are rounded enough to show
        self._alphas = self.schedule.alphas_cumprod_float32
        to_one = self._reader.flag("set_alpha_to_one", False)
        self._final_alpha = np.float32(1) if to_one else self._alphas[0]
        self._limit = X0Limit(self._reader)

    def plan(self, num_steps: int) -> Plan:
        """Lay out a run of ``num_steps`` steps: one call each."""
        num_steps = self._check_steps(num_steps)
        return self._plan_of(num_steps, self._space(num_steps).round())

    def _plan_of(self, num_steps: int, timesteps: np.ndarray) -> Plan:
        timesteps = timesteps.astype(np.int64)
        alphas = self._alphas[timesteps].astype(np.float64)
        with np.errstate(divide="ignore"):
            sigmas = np.sqrt((1 - alphas) / alphas)
        return Plan(num_steps, timesteps, np.append(sigmas, 0).astype(np.float32))

    def denoised(self, output: np.ndarray, x: np.ndarray, plan: Plan, i: int) -> np.ndarray:
        """Return the predicted picture, within its limits."""
        a = self._alpha(int(plan.timesteps[i]))
        return self._limit(predict_x0(self.prediction_type, output, x, np.sqrt(a), np.sqrt(1 - a)))

    def _add_noise(self, x0: np.ndarray, noise: np.ndarray, plan: Plan, i: int) -> np.ndarray:
        a = self._alpha(int(plan.timesteps[i]))
        return np.sqrt(a) * x0 + np.sqrt(1 - a) * noise

    def _alpha(self, t: int) -> np.float32:
        """Return alpha-bar at ``t``; below 0 lies the finished picture."""
        return self._alphas[min(t, self.num_train_timesteps - 1)] if t >= 0 else self._final_alpha

    def _stride(self, plan: Plan) -> int:
        return self.num_train_timesteps // plan.num_steps


class DDPM(TimestepSampler):
    """Ancestral sampling from the posterior (Ho et al., arXiv:2006.11239, algorithm 2), over some of the timesteps."""

    name = "ddpm"
    title = "DDPM"
    diffusers_class = "DDPMScheduler"
    settings = COMMON_SETTINGS | LIMIT_SETTINGS | CLIP_SETTINGS | {"variance_type"}
    defaults: ClassVar[Mapping[str, Any]] = {
        "timestep_spacing": "leading",
        "clip_sample": True,
        "set_alpha_to_one": True,
    }

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__({**config, "set_alpha_to_one": True})
        self._limit = X0Limit(self._reader, clip=True, threshold=True)
        kinds = ("fixed_small", "fixed_small_log", "fixed_large")
        self._large_variance = self._reader.word("variance_type", "fixed_small", kinds) == "fixed_large"

    def step(
        self, output: np.ndarray, x: np.ndarray, plan: Plan, i: int, history: Any, normal: Normal
    ) -> tuple[np.ndarray, Any]:
        """Draw the next latents from the posterior, given the picture that the network predicts."""
        t = int(plan.timesteps[i])
        a = self._alpha(t)
        a_next = self._alpha(int(plan.timesteps[i + 1]) if i + 1 < len(plan) else -1)
        alpha = a / a_next
        beta = 1 - alpha
        x0 = self.denoised(output, x, plan, i)
        mean = np.sqrt(a_next) * beta / (1 - a) * x0 + np.sqrt(alpha) * (1 - a_next) / (1 - a) * x
        if t == 0:
            return mean, None
        variance = beta if self._large_variance else np.maximum((1 - a_next) / (1 - a) * beta, np.float32(1e-20))
        return mean + np.sqrt(variance) * normal(), None


class DDIM(TimestepSampler):
    """DDIM (Song et al., arXiv:2010.02502, eq. 12): deterministic at ``eta`` 0, as noisy as DDPM at 1.

    Parameters
    ----------
    config : mapping
        The parsed ``scheduler_config.json``.
    eta : float
        Share of the posterior's noise that each step adds.
    """

    name = "ddim"
    title = "DDIM"
    diffusers_class = "DDIMScheduler"
    settings = COMMON_SETTINGS | LIMIT_SETTINGS | CLIP_SETTINGS | {"set_alpha_to_one"}
    options = ("eta",)
    defaults: ClassVar[Mapping[str, Any]] = {
        "timestep_spacing": "leading",
        "clip_sample": True,
        "set_alpha_to_one": True,
    }

    def __init__(self, config: Mapping[str, Any], eta: float = 0.0) -> None:
        super().__init__(config)
        if not (math.isfinite(eta) and eta >= 0):
            raise InputError(name="eta", found=eta, expected="a number of at least 0 (0: no noise, 1: as much as DDPM)")
        self._limit = X0Limit(self._reader, clip=True, threshold=True)
        self._eta = float(eta)

    def step(
        self, output: np.ndarray, x: np.ndarray, plan: Plan, i: int, history: Any, normal: Normal
    ) -> tuple[np.ndarray, Any]:
        """Move to the next timestep along the predicted noise."""
        t = int(plan.timesteps[i])
        # By the stride, not to the plan's next timestep: they differ for linspace and trailing.
        a, a_next = self._alpha(t), self._alpha(t - self._stride(plan))
        x0 = self.denoised(output, x, plan, i)
        noise = predict_noise(self.prediction_type, output, x, np.sqrt(a), np.sqrt(1 - a))
        sigma = self._eta * np.sqrt((1 - a_next) / (1 - a) * (1 - a / a_next))
        x = np.sqrt(a_next) * x0 + np.sqrt(np.maximum(1 - a_next - sigma**2, np.float32(0))) * noise
        return (x + sigma * normal() if self._eta > 0 else x), None
