"""DPM-Solver++ multistep and UniPC: exponential integrators in the half log signal-to-noise ratio.

Latents have unit variance: ``alpha picture + sigma alpha noise``; a step's length is ``h``, the growth of
``lambda = -log(sigma)``.

References: Lu et al., "DPM-Solver++" (arXiv:2211.01095): algorithm 2 and, with noise, appendix F; Zhao et al., "UniPC"
(arXiv:2302.04867): algorithms 5 and 6.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from .base import LIMIT_SETTINGS, Normal, Plan, X0Limit
from .sigmas import SPACED_SETTINGS, SigmaSampler, unit_scale

_SOLVER_SETTINGS = SPACED_SETTINGS | LIMIT_SETTINGS | {
    "solver_order", "solver_type", "lower_order_final", "final_sigmas_type", "use_flow_sigmas",
}  # fmt: skip
_FEW_STEPS = 15  # runs shorter than this lower the order at their end


class VariancePreservingSampler(SigmaSampler):
    """Base of the samplers of this module: the plan and the predicted pictures."""

    def __init__(self, config: Mapping[str, Any], sigma_spacing: str | None = None) -> None:
        super().__init__(config, sigma_spacing)
        self._limit = X0Limit(self._reader, threshold=True)
        self._order = self._reader.integer("solver_order", 2, maximum=3)
        self._lower_order_final = self._reader.flag("lower_order_final", True)

    def plan(self, num_steps: int) -> Plan:
        """Lay out a run of ``num_steps`` steps, one call each; timesteps are whole."""
        num_steps = self._check_steps(num_steps)
        if self._sigma_spacing:
            sigmas, timesteps = self._respace(self._sigma_table[-1], self._sigma_table[0], num_steps)
            if self._rounds_timesteps():
                timesteps = timesteps.round()
        else:
            timesteps = self._space(num_steps, skip_end=True, last=self._last_timestep()).round()
            sigmas = self._sigmas_at(timesteps)
        return Plan(num_steps, timesteps.astype(np.int64), self._end(sigmas))

    def _rounds_timesteps(self) -> bool:
        return self._sigma_spacing == "karras"

    def _last_timestep(self) -> int:
        return self.num_train_timesteps

    def denoised(self, output: np.ndarray, x: np.ndarray, plan: Plan, i: int) -> np.ndarray:
        """Return the predicted picture, within its limits."""
        return self._limit(self._predict_x0(output, x, float(plan.sigmas[i])))

    def _add_noise(self, x0: np.ndarray, noise: np.ndarray, plan: Plan, i: int) -> np.ndarray:
        sigma = float(plan.sigmas[i])
        return (x0 + sigma * noise) * unit_scale(sigma)


class DPMSolverPP(VariancePreservingSampler):
    """DPM-Solver++ multistep (Lu et al., arXiv:2211.01095): 2M by default, up to order 3 if the config asks for it.

    The config's ``algorithm_type="sde-dpmsolver++"`` selects `DPMSolverPPSDE`.
    """

    name = "dpm++2m"
    title = "DPM++ 2M"
    diffusers_class = "DPMSolverMultistepScheduler"
    algorithm_type = "dpmsolver++"
    aliases = ("dpmsolver++",)
    settings = _SOLVER_SETTINGS | {"algorithm_type", "euler_at_final", "use_lu_lambdas", "lambda_min_clipped"}
    stochastic: ClassVar[bool] = False

    def __init__(self, config: Mapping[str, Any], sigma_spacing: str | None = None) -> None:
        super().__init__(config, sigma_spacing)
        # A config written for another solver may name one of that solver's types, which stands for the default.
        kinds = ("midpoint", "heun", "logrho", "bh1", "bh2")
        self._heun = self._reader.word("solver_type", "midpoint", kinds) == "heun"
        self._euler_at_final = self._reader.flag("euler_at_final", False)

    def _rounds_timesteps(self) -> bool:
        return super()._rounds_timesteps() and self.schedule.kind != "cosine"

    def _last_timestep(self) -> int:
        # A limit on lambda keeps the cosine schedule away from its nearly infinite last sigmas.
        lowest = self._reader.values.get("lambda_min_clipped", -math.inf)
        if lowest == -math.inf:
            return self.num_train_timesteps
        lowest = self._reader.number("lambda_min_clipped", lowest)
        return max(int(np.sum(-np.log(self._sigma_table) >= lowest)), 1)

    def step(
        self, output: np.ndarray, x: np.ndarray, plan: Plan, i: int, history: Any, normal: Normal
    ) -> tuple[np.ndarray, Any]:
        """Extrapolate the predicted picture from the last ones and move towards it."""
        pictures = (*(history or ()), self.denoised(output, x, plan, i))[-self._order :]
        noise = normal() if self.stochastic else None
        return self._move(pictures[-self._order_at(plan, i, len(pictures)) :], x, plan, i, noise), pictures

    def _order_at(self, plan: Plan, i: int, available: int) -> int:
        left = len(plan) - i
        lower = self._lower_order_final and len(plan) < _FEW_STEPS
        if left == 1 and (lower or self._euler_at_final or plan.sigmas[-1] == 0):
            return 1
        return min(available, 2) if left == 2 and lower else available

    def _move(
        self, pictures: tuple[np.ndarray, ...], x: np.ndarray, plan: Plan, i: int, noise: np.ndarray | None
    ) -> np.ndarray:
        sigma, sigma_next = map(float, plan.sigmas[i : i + 2])
        if sigma_next == sigma:
            return x
        scale, scale_next = unit_scale(sigma), unit_scale(sigma_next)
        h = _step_length(sigma, sigma_next)
        # The stochastic equation pulls towards the picture twice as hard.
        pull = 2 * h if noise is not None else h
        share = -math.expm1(-pull)
        kept = (sigma_next * scale_next) / (sigma * scale) * (1 if noise is None else math.exp(-h))
        x = kept * x + scale_next * share * pictures[-1]
        if noise is not None:
            x = x + sigma_next * scale_next * math.sqrt(share) * noise
        if len(pictures) == 1:
            return x
        h_last = _step_length(plan.sigmas[i - 1], sigma)
        slope = h / h_last * (pictures[-1] - pictures[-2])
        if len(pictures) == 2:
            return x + scale_next * (1 - share / pull if self._heun else share / 2) * slope
        h_before = _step_length(plan.sigmas[i - 2], plan.sigmas[i - 1])
        change = slope - h / h_before * (pictures[-2] - pictures[-3])
        slope = slope + h_last / (h_last + h_before) * change
        curvature = h / (h_last + h_before) * change
        # -1/2 with noise does not follow from the derivation, but diffusers uses it
        weight = (-0.5 if noise is not None else 0.5) - (pull - share) / pull**2
        return x + scale_next * ((1 - share / pull) * slope + weight * curvature)


class DPMSolverPPSDE(DPMSolverPP):
    """SDE-DPM-Solver++ multistep: the method for the reverse stochastic equation, with fresh noise at each step."""

    name = "dpm++2m-sde"
    title = "DPM++ 2M SDE"
    algorithm_type = "sde-dpmsolver++"
    aliases = ("sdedpmsolver++",)
    stochastic: ClassVar[bool] = True


class UniPC(VariancePreservingSampler):
    """UniPC (Zhao et al., arXiv:2302.04867).

    A multistep predictor, and a corrector that reuses the next call's prediction.
    """

    name = "unipc"
    title = "UniPC"
    diffusers_class = "UniPCMultistepScheduler"
    settings = _SOLVER_SETTINGS | {"predict_x0", "disable_corrector", "sigma_min", "sigma_max"}

    def __init__(self, config: Mapping[str, Any], sigma_spacing: str | None = None) -> None:
        super().__init__(config, sigma_spacing)
        self._reader.only("predict_x0", True)
        kinds = ("bh2", "bh1", "midpoint", "heun", "logrho")
        self._bh1 = self._reader.word("solver_type", "bh2", kinds) == "bh1"
        uncorrected = self._reader.values.get("disable_corrector", [])
        if not isinstance(uncorrected, list | tuple):
            self._reader.fail("disable_corrector", "a list of steps")
        self._uncorrected = frozenset(uncorrected)

    def _end(self, sigmas: np.ndarray) -> np.ndarray:
        # As in diffusers, the last step does not move with Karras or exponential sigmas that end above 0.
        stays = self._sigma_spacing is not None and self._final_sigma > 0
        return np.append(sigmas, sigmas[-1]).astype(np.float32) if stays else super()._end(sigmas)

    def step(
        self, output: np.ndarray, x: np.ndarray, plan: Plan, i: int, history: Any, normal: Normal
    ) -> tuple[np.ndarray, Any]:
        """Correct the last step with the new prediction, then take the next one."""
        picture = self.denoised(output, x, plan, i)
        pictures: tuple[np.ndarray, ...] = ()
        if history is not None:
            pictures, start, order = history
            if i - 1 not in self._uncorrected:
                x = self._move(pictures[-order:], start, plan, i - 1, corrected=picture)
        pictures = (*pictures, picture)[-self._order :]
        order = min(len(pictures), len(plan) - i if self._lower_order_final else self._order)
        if plan.sigmas[i + 1] == 0:
            order = 1
        return self._move(pictures[-order:], x, plan, i), (pictures, x, order)

    def _move(
        self,
        pictures: tuple[np.ndarray, ...],
        x: np.ndarray,
        plan: Plan,
        i: int,
        corrected: np.ndarray | None = None,
    ) -> np.ndarray:
        """Step from sigma i to i + 1, with the picture predicted there (``corrected``) or without it."""
        sigma, sigma_next = map(float, plan.sigmas[i : i + 2])
        if sigma_next == sigma:
            return x
        scale, scale_next = unit_scale(sigma), unit_scale(sigma_next)
        h = _step_length(sigma, sigma_next)
        newest = pictures[-1]
        moved = (sigma_next * scale_next) / (sigma * scale) * x - scale_next * math.expm1(-h) * newest
        # Positions of the older pictures (and of the new one) in units of h, and their slopes
        places = [-_step_length(plan.sigmas[i - k], sigma) / h for k in range(1, len(pictures))]
        slopes = [(older - newest) / place for older, place in zip(pictures[-2::-1], places, strict=True)]
        if corrected is not None:
            places, slopes = [*places, 1.0], [*slopes, corrected - newest]
        if not slopes:
            return moved
        base = -h if self._bh1 else math.expm1(-h)
        # A single slope has the weight 1/2, as in diffusers; it keeps the method's order
        weights = _unipc_weights(places, -h, base) if len(slopes) > 1 else [0.5]
        correction = sum(weight * slope for weight, slope in zip(weights, slopes, strict=True))
        return moved - scale_next * base * correction


def _unipc_weights(places: list[float], step: float, base: float) -> list[float]:
    """Solve for the weights that match the exponential integrals of all powers (arXiv:2302.04867, eq. 11)."""
    integral = math.expm1(step) / step - 1
    factorial = 1.0
    right = []
    for k in range(1, len(places) + 1):
        right.append(integral * factorial / base)
        factorial *= k + 1
        integral = integral / step - 1 / factorial
    left = np.array(places) ** np.arange(len(places))[:, None]
    return np.linalg.solve(left, np.array(right)).tolist()


def _step_length(sigma: float, sigma_next: float) -> float:
    """Return how much lambda grows from ``sigma`` to ``sigma_next``; infinite if that is 0."""
    return math.log(float(sigma) / float(sigma_next)) if sigma_next > 0 else math.inf
