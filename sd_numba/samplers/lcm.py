"""LCM: few-step sampling of latent consistency models.

Reference: Luo et al., "Latent consistency models" (arXiv:2310.04378), multistep consistency sampling (algorithm 3).
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from .base import CLIP_SETTINGS, COMMON_SETTINGS, LIMIT_SETTINGS, Normal, Plan, X0Limit, space_timesteps
from .ddpm import TimestepSampler

_SIGMA_DATA = 0.5  # standard deviation of the data that the boundary condition assumes


class LCM(TimestepSampler):
    """Multistep consistency sampling (Luo et al., arXiv:2310.04378).

    Each call predicts the picture. All calls but the last add fresh noise to it, for the next timestep.
    """

    name = "lcm"
    title = "LCM"
    diffusers_class = "LCMScheduler"
    settings = (
        COMMON_SETTINGS
        | LIMIT_SETTINGS
        | CLIP_SETTINGS
        | {"original_inference_steps", "set_alpha_to_one", "timestep_scaling"}
    )
    defaults: ClassVar[Mapping[str, Any]] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self._limit = X0Limit(self._reader, clip=True, threshold=True)
        self._grid = self._reader.integer("original_inference_steps", 50, maximum=self.num_train_timesteps)
        self._timestep_scaling = self._reader.number("timestep_scaling", 10.0)

    def plan(self, num_steps: int) -> Plan:
        """Lay out a run on the timesteps that the model was distilled at (or, for more steps than those, on all)."""
        num_steps = self._check_steps(num_steps)
        if num_steps > self._grid:
            return self._plan_of(num_steps, space_timesteps("trailing", num_steps, self.num_train_timesteps))
        grid = np.arange(self._grid, 0, -1) * (self.num_train_timesteps // self._grid) - 1
        return self._plan_of(
            num_steps, grid[np.floor(np.linspace(0, self._grid, num_steps, endpoint=False)).astype(int)]
        )

    def step(
        self, output: np.ndarray, x: np.ndarray, plan: Plan, i: int, history: Any, normal: Normal
    ) -> tuple[np.ndarray, Any]:
        """Predict the picture and, unless it is the last call, add noise for the next timestep."""
        t = int(plan.timesteps[i])
        x0 = self.denoised(output, x, plan, i)
        # The boundary condition: at timestep 0 the picture is x itself.
        scaled = t * self._timestep_scaling
        variance = scaled**2 + _SIGMA_DATA**2
        picture = scaled / variance**0.5 * x0 + _SIGMA_DATA**2 / variance * x
        if i + 1 == len(plan):
            return picture, None
        a_next = self._alpha(int(plan.timesteps[i + 1]))
        return np.sqrt(a_next) * picture + np.sqrt(1 - a_next) * normal(), None
