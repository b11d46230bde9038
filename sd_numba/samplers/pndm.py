"""PNDM, also known as PLMS: linear multistep over the transfer formula of DDIM.

Reference: Liu et al., "Pseudo numerical methods for diffusion models on manifolds" (arXiv:2202.09778).
"""

from collections.abc import Mapping
from typing import Any, ClassVar, TypedDict

import numpy as np

from .base import COMMON_SETTINGS, Normal, Plan
from .ddpm import TimestepSampler
from .schedule import predict_noise

_WARM_UP_STEPS = 3  # Runge-Kutta steps of four calls each, before the multistep formula has its history


class _History(TypedDict):
    calls: int
    outputs: tuple[np.ndarray, ...]  # of the last four steps, newest last
    start: Any  # the latents that a step of several calls set out from
    total: Any  # weighted sum of the outputs of a Runge-Kutta step so far


class PNDM(TimestepSampler):
    """Pseudo linear multistep sampling (Liu et al., arXiv:2202.09778).

    The run warms up with pseudo Runge-Kutta steps unless the config skips them, as Stable Diffusion's does. Without
    them, the first step is made twice (Heun's rule), and the order grows to four. A run that starts in the middle makes
    its first step twice as well, as in diffusers. Its latents then stay one step behind the timesteps, which leaves a
    little noise in the picture.
    """

    name = "pndm"
    title = "PLMS"
    diffusers_class = "PNDMScheduler"
    settings = COMMON_SETTINGS | {"skip_prk_steps", "set_alpha_to_one"}
    defaults: ClassVar[Mapping[str, Any]] = {"timestep_spacing": "leading"}
    honours_zero_snr = False

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self._skip_runge_kutta = self._reader.flag("skip_prk_steps", False)

    def plan(self, num_steps: int) -> Plan:
        """Lay out a run: ``num_steps + 1`` calls (a single step is one call), or ``num_steps + 9`` with Runge-Kutta."""
        num_steps = self._check_steps(num_steps)
        steps = self._space(num_steps).round()
        if not self._uses_runge_kutta(num_steps):
            return self._plan_of(num_steps, np.concatenate([steps[:2], steps[1:]]))
        half = self.num_train_timesteps // num_steps // 2
        starts, ends = steps[:_WARM_UP_STEPS], steps[1 : _WARM_UP_STEPS + 1]
        middles = ends + half
        warm_up = np.stack([starts, middles, middles, ends], axis=1).reshape(-1)
        return self._plan_of(num_steps, np.concatenate([warm_up, steps[_WARM_UP_STEPS:]]))

    def start_call(self, num_steps: int, strength: float) -> int:
        """Return the call at which an image-to-image run starts: the first call of a step."""
        start = super().start_call(num_steps, strength)
        # diffusers starts in the middle of a Runge-Kutta step, which gives no usable picture
        return start + 3 * min(start, _WARM_UP_STEPS) if self._uses_runge_kutta(num_steps) else start

    def step(
        self, output: np.ndarray, x: np.ndarray, plan: Plan, i: int, history: Any, normal: Normal
    ) -> tuple[np.ndarray, Any]:
        """Make one call's part of a Runge-Kutta step, or one multistep step."""
        warm_up = 4 * _WARM_UP_STEPS if self._uses_runge_kutta(plan.num_steps) else 0
        history = history or {"calls": i if warm_up else 0, "outputs": (), "start": None, "total": None}
        take = self._runge_kutta if history["calls"] < warm_up else self._multistep
        x, history = take(output, x, plan, i, history)
        return x, {**history, "calls": history["calls"] + 1}

    def _uses_runge_kutta(self, num_steps: int) -> bool:
        return not self._skip_runge_kutta and num_steps > _WARM_UP_STEPS

    def _runge_kutta(
        self, output: np.ndarray, x: np.ndarray, plan: Plan, i: int, history: _History
    ) -> tuple[np.ndarray, _History]:
        stage = history["calls"] % 4
        t_start, t = int(plan.timesteps[i - stage]), int(plan.timesteps[i])
        half = self._stride(plan) // 2
        if stage == 0:
            outputs = (*history["outputs"], output)
            history = {**history, "start": x, "total": output / 6, "outputs": outputs}
            return self._transfer(x, output, t_start, t - half), history
        start, total = history["start"], history["total"]
        if stage == 3:
            return self._transfer(start, total + output / 6, t_start, t), {**history, "start": None, "total": None}
        t_end = t if stage == 1 else t - half
        return self._transfer(start, output, t_start, t_end), {**history, "total": total + output / 3}

    def _multistep(
        self, output: np.ndarray, x: np.ndarray, plan: Plan, i: int, history: _History
    ) -> tuple[np.ndarray, _History]:
        t, stride = int(plan.timesteps[i]), self._stride(plan)
        if history["calls"] == 1:
            # The second call repeats the first step, with the mean of the slopes at its two ends.
            mean = (output + history["outputs"][-1]) / 2
            return self._transfer(history["start"], mean, t + stride, t), {**history, "start": None}
        outputs = (*history["outputs"][-3:], output)
        start = x if history["calls"] == 0 else None
        return self._transfer(x, _adams_bashforth(outputs), t, t - stride), {
            **history,
            "outputs": outputs,
            "start": start,
        }

    def _transfer(self, x: np.ndarray, output: np.ndarray, t: int, t_next: int) -> np.ndarray:
        """Move ``x`` from ``t`` to ``t_next`` along the predicted noise (arXiv:2202.09778, eq. 9)."""
        a, a_next = self._alpha(t), self._alpha(t_next)
        noise = predict_noise(self.prediction_type, output, x, np.sqrt(a), np.sqrt(1 - a))
        denominator = a * np.sqrt(1 - a_next) + np.sqrt(a * (1 - a) * a_next)
        return np.sqrt(a_next / a) * x - (a_next - a) / denominator * noise


def _adams_bashforth(outputs: tuple[np.ndarray, ...]) -> np.ndarray:
    """Return the slope of the next step, from up to four slopes at equal distances, newest last."""
    newest = outputs[::-1]
    if len(newest) == 1:
        return newest[0]
    if len(newest) == 2:
        return (3 * newest[0] - newest[1]) / 2
    if len(newest) == 3:
        return (23 * newest[0] - 16 * newest[1] + 5 * newest[2]) / 12
    return (55 * newest[0] - 59 * newest[1] + 37 * newest[2] - 9 * newest[3]) / 24
