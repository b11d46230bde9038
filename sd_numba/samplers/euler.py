"""Euler, Euler ancestral, Heun and LMS: solvers of the probability-flow equation dx / dsigma = (x - x0) / sigma.

They keep latents as ``picture + sigma noise`` and pass the network a copy scaled to unit variance.

References: Karras et al., "EDM" (arXiv:2206.00364): Euler and Heun (algorithm 1); Katherine Crowson's k-diffusion:
the ancestral step and LMS (Adams-Bashforth on uneven steps, Hairer et al., "Solving ODEs I", III.5).
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from .base import CLIP_SETTINGS, COMMON_SETTINGS, Normal, Plan, X0Limit
from .sigmas import SPACED_SETTINGS, SigmaSampler, unit_scale

_LMS_ORDER = 4
_GAUSS_NODES, _GAUSS_WEIGHTS = np.polynomial.legendre.leggauss(2)  # exact for cubic polynomials


class VarianceExplodingSampler(SigmaSampler):
    """Base of the samplers of this module: the plan and the scaling."""

    def plan(self, num_steps: int) -> Plan:
        """Lay out a run of ``num_steps`` steps, one call each; timesteps are float32."""
        num_steps = self._check_steps(num_steps)
        timesteps = self._space(num_steps).astype(np.float32)
        sigmas = self._sigmas_at(timesteps)
        if self._sigma_spacing:
            sigmas, timesteps = self._respace(sigmas[0], sigmas[-1], num_steps)
        return self._plan_of(num_steps, timesteps, self._end(sigmas))

    def _plan_of(self, num_steps: int, timesteps: np.ndarray, sigmas: np.ndarray) -> Plan:
        start = float(sigmas.max())
        if self._spacing == "leading":
            start = float(np.sqrt(start**2 + 1))
        return Plan(num_steps, timesteps.astype(np.float32), sigmas, start)

    def scale_model_input(self, x: np.ndarray, plan: Plan, i: int) -> np.ndarray:
        """Return ``x`` scaled to unit variance."""
        return x * unit_scale(plan.sigmas[i])

    def denoised(self, output: np.ndarray, x: np.ndarray, plan: Plan, i: int) -> np.ndarray:
        """Return the predicted picture."""
        sigma = float(plan.sigmas[i])
        return self._predict_x0(output, x * unit_scale(sigma), sigma)

    def _add_noise(self, x0: np.ndarray, noise: np.ndarray, plan: Plan, i: int) -> np.ndarray:
        return x0 + float(plan.sigmas[i]) * noise


class Euler(VarianceExplodingSampler):
    """Euler's method (Karras et al., arXiv:2206.00364, algorithm 2 without churn)."""

    name = "euler"
    title = "Euler"
    diffusers_class = "EulerDiscreteScheduler"
    settings = SPACED_SETTINGS | {
        "interpolation_type", "timestep_type", "sigma_min", "sigma_max", "final_sigmas_type", "rescale_betas_zero_snr",
    }  # fmt: skip

    def __init__(self, config: Mapping[str, Any], sigma_spacing: str | None = None) -> None:
        super().__init__(config, sigma_spacing)
        self._reader.only("interpolation_type", "linear")
        self._reader.only("timestep_type", "discrete")

    def step(
        self, output: np.ndarray, x: np.ndarray, plan: Plan, i: int, history: Any, normal: Normal
    ) -> tuple[np.ndarray, Any]:
        """Follow the slope to the next sigma."""
        sigma, sigma_next = map(float, plan.sigmas[i : i + 2])
        slope = (x - self.denoised(output, x, plan, i)) / sigma
        return x + slope * (sigma_next - sigma), None


class EulerAncestral(VarianceExplodingSampler):
    """Euler ancestral: steps below the next sigma, and noise that brings the latents back up to it."""

    name = "euler-a"
    title = "Euler a"
    diffusers_class = "EulerAncestralDiscreteScheduler"
    aliases = ("eulerancestral",)
    settings = COMMON_SETTINGS | {"rescale_betas_zero_snr"}
    options = ()
    has_final_sigma = False

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__({**config, "use_karras_sigmas": False, "use_exponential_sigmas": False})

    def step(
        self, output: np.ndarray, x: np.ndarray, plan: Plan, i: int, history: Any, normal: Normal
    ) -> tuple[np.ndarray, Any]:
        """Follow the slope below the next sigma and add noise."""
        sigma, sigma_next = map(float, plan.sigmas[i : i + 2])
        sigma_up = sigma_next * np.sqrt(max(sigma**2 - sigma_next**2, 0.0)) / sigma
        sigma_down = np.sqrt(sigma_next**2 - sigma_up**2)
        slope = (x - self.denoised(output, x, plan, i)) / sigma
        return x + slope * float(sigma_down - sigma) + float(sigma_up) * normal(), None


class Heun(VarianceExplodingSampler):
    """Heun's method (Karras et al., arXiv:2206.00364, algorithm 1): each step but the last takes two calls."""

    name = "heun"
    title = "Heun"
    diffusers_class = "HeunDiscreteScheduler"
    settings = SPACED_SETTINGS | CLIP_SETTINGS
    defaults: ClassVar[Mapping[str, Any]] = {"beta_start": 0.00085, "beta_end": 0.012}
    honours_zero_snr = False
    has_final_sigma = False
    calls_per_step = 2

    def __init__(self, config: Mapping[str, Any], sigma_spacing: str | None = None) -> None:
        super().__init__(config, sigma_spacing)
        self._limit = X0Limit(self._reader, clip=True)

    def plan(self, num_steps: int) -> Plan:
        """Lay out a run of ``2 num_steps - 1`` calls."""
        plan = super().plan(num_steps)
        timesteps = np.append(plan.timesteps[:1], np.repeat(plan.timesteps[1:], 2))
        sigmas = np.concatenate([plan.sigmas[:1], np.repeat(plan.sigmas[1:-1], 2), plan.sigmas[-1:]])
        return self._plan_of(plan.num_steps, timesteps, sigmas)

    def denoised(self, output: np.ndarray, x: np.ndarray, plan: Plan, i: int) -> np.ndarray:
        """Return the predicted picture, within its limits."""
        return self._limit(super().denoised(output, x, plan, i))

    def step(
        self, output: np.ndarray, x: np.ndarray, plan: Plan, i: int, history: Any, normal: Normal
    ) -> tuple[np.ndarray, Any]:
        """Follow the slope; at the second call, repeat the step with the mean of the slopes at both ends."""
        sigma, sigma_next = map(float, plan.sigmas[i : i + 2])
        slope = (x - self.denoised(output, x, plan, i)) / sigma
        if history is None:
            step = sigma_next - sigma
            return x + slope * step, (x, slope, step) if sigma_next > 0 else None
        start, first_slope, step = history
        return start + (first_slope + slope) / 2 * step, None


class LMS(VarianceExplodingSampler):
    """Linear multistep: the polynomial through the last four slopes, integrated to the next sigma.

    A run that starts in the middle starts with one slope, like any other run; diffusers weights that slope as if it
    were the newest of four.
    """

    name = "lms"
    title = "LMS"
    diffusers_class = "LMSDiscreteScheduler"
    honours_zero_snr = False
    has_final_sigma = False

    def __init__(self, config: Mapping[str, Any], sigma_spacing: str | None = None) -> None:
        # diffusers' LMS ignores these two, which limit the sigmas of its other samplers.
        super().__init__({**config, "sigma_min": None, "sigma_max": None}, sigma_spacing)

    def step(
        self, output: np.ndarray, x: np.ndarray, plan: Plan, i: int, history: Any, normal: Normal
    ) -> tuple[np.ndarray, Any]:
        """Integrate the polynomial through the slopes."""
        slope = (x - self.denoised(output, x, plan, i)) / float(plan.sigmas[i])
        slopes = (*(history or ()), slope)[-_LMS_ORDER:]
        nodes = plan.sigmas[i + 1 - len(slopes) : i + 1].astype(np.float64)
        weights = _lagrange_integrals(nodes, float(plan.sigmas[i]), float(plan.sigmas[i + 1]))
        return x + sum(weight * slope for weight, slope in zip(weights, slopes, strict=True)), slopes


def _lagrange_integrals(nodes: np.ndarray, start: float, end: float) -> list[float]:
    """Integrate each Lagrange polynomial of up to four ``nodes`` from ``start`` to ``end``."""
    at = (start + end) / 2 + (end - start) / 2 * _GAUSS_NODES
    integrals = []
    for k, node in enumerate(nodes):
        others = np.delete(nodes, k)
        values = np.prod((at[:, None] - others) / (node - others), axis=1)
        integrals.append(float(values @ _GAUSS_WEIGHTS * (end - start) / 2))
    return integrals
