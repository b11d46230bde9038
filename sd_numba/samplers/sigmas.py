"""Noise levels as sigma, the ratio of noise to picture: spacings of a run, and the base of the samplers that use them.

References: Karras et al., "Elucidating the design space of diffusion-based generative models" (EDM, arXiv:2206.00364).
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from .base import COMMON_SETTINGS, Sampler
from .schedule import predict_x0

_UNSUPPORTED_SWITCHES = ("use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas")
_KARRAS_RHO = 7.0
SIGMA_SPACINGS = ("karras", "exponential")
SPACED_SETTINGS = COMMON_SETTINGS | {"use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"}


class SigmaSampler(Sampler):
    """Base of the samplers that step from sigma to sigma.

    Parameters
    ----------
    config : mapping
        The parsed ``scheduler_config.json``.
    sigma_spacing : str, optional
        ``"karras"`` or ``"exponential"``; by default the config's.
    """

    settings = SPACED_SETTINGS
    options: ClassVar[tuple[str, ...]] = ("sigma_spacing",)
    has_final_sigma: ClassVar[bool] = True
    """Whether final_sigmas_type has an effect; otherwise runs end at 0."""

    def __init__(self, config: Mapping[str, Any], sigma_spacing: str | None = None) -> None:
        super().__init__(config)
        alphas = self.schedule.alphas_cumprod_float32.copy()
        if self.schedule.zero_terminal_snr:
            alphas[-1] = 2.0**-24  # a large sigma in place of an infinite one
        self._sigma_table = np.sqrt((1 - alphas) / alphas)
        for switch in _UNSUPPORTED_SWITCHES:
            self._reader.only(switch, False)
        if sigma_spacing is None and self._reader.flag("use_karras_sigmas", False):
            sigma_spacing = "karras"
        if sigma_spacing is None and self._reader.flag("use_exponential_sigmas", False):
            sigma_spacing = "exponential"
        self._sigma_spacing = sigma_spacing
        last = self._reader.word("final_sigmas_type", "zero", ("zero", "sigma_min")) if self.has_final_sigma else "zero"
        self._final_sigma = 0.0 if last == "zero" else float(self._sigma_table[0])

    def _sigmas_at(self, timesteps: np.ndarray) -> np.ndarray:
        """Return the sigmas of timesteps, which may be fractional: float64."""
        return np.interp(timesteps, np.arange(len(self._sigma_table)), self._sigma_table)

    def _respace(self, highest: float, lowest: float, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Return Karras or exponential sigmas, and the timesteps that have these sigmas: float64 each."""
        lowest = self._reader.number("sigma_min", float(lowest))
        highest = self._reader.number("sigma_max", float(highest))
        if self._sigma_spacing == "karras":
            first, last = highest ** (1 / _KARRAS_RHO), lowest ** (1 / _KARRAS_RHO)
            sigmas = np.linspace(first, last, num_steps) ** _KARRAS_RHO
        else:
            sigmas = np.exp(np.linspace(np.log(highest), np.log(lowest), num_steps))
        # The table's logarithm is single precision, as in diffusers: some samplers cut the timestep to a whole number.
        table = np.log(self._sigma_table)
        return sigmas, np.interp(np.log(sigmas), table, np.arange(len(table)))

    def _end(self, sigmas: np.ndarray) -> np.ndarray:
        return np.append(sigmas, self._final_sigma).astype(np.float32)

    def _predict_x0(self, output: np.ndarray, x: np.ndarray, sigma: float) -> np.ndarray:
        """Return the predicted picture, for ``x`` scaled to unit variance."""
        alpha = unit_scale(sigma)
        return predict_x0(self.prediction_type, output, x, alpha, sigma * alpha)


def unit_scale(sigma: float) -> float:
    """Return the factor that brings ``picture + sigma noise`` to unit variance."""
    return 1 / float(np.sqrt(float(sigma) ** 2 + 1))
