"""Noise schedules: how much of the picture is left at each training timestep, and the processes built on that.

The forward process adds noise to a picture: ``x_t = sqrt(alphas_cumprod[t]) x_0 + sqrt(1 - alphas_cumprod[t]) noise``.
Backward, the full DDPM process removes it again, one training timestep after the other; the samplers in
:mod:`sd_numba.samplers` take far fewer steps.

References: Ho et al., "DDPM" (arXiv:2006.11239): the linear schedule and both processes; Nichol and Dhariwal, "Improved
DDPM" (arXiv:2102.09672): cosine; Rombach et al., "Latent diffusion" (arXiv:2112.10752): scaled linear; Salimans and Ho,
"Progressive distillation" (arXiv:2202.00512): v-prediction; Lin et al., "Common diffusion noise schedules and sample
steps are flawed" (arXiv:2305.08891): zero terminal SNR.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..config import ConfigReader
from ..errors import InputError, ModelError

SCHEDULE_KINDS = ("linear", "scaled_linear", "cosine")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")

_BETA_RANGES = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}
_KIND_OF_BETA_SCHEDULE = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
_MAX_BETA = 0.999  # caps the cosine schedule, which would otherwise end in a division by zero


@dataclass(frozen=True)
class NoiseSchedule:
    """The noise variances of a diffusion process. All arrays are float64 ``(num_train_timesteps,)`` and read-only.

    Parameters
    ----------
    kind : str
        ``"linear"``, ``"scaled_linear"`` (linear in the root of beta; Stable Diffusion), ``"cosine"``, or
        ``"trained"`` with ``trained_betas``.
    num_train_timesteps : int
        Number of timesteps.
    beta_start, beta_end : float, optional
        First and last beta; 1e-4 and 0.02 for linear, 0.00085 and 0.012 for scaled_linear; other kinds ignore them.
    trained_betas : tuple of float, optional
        The betas themselves.
    zero_terminal_snr : bool
        Whether the betas are rescaled so that nothing of the picture is left at the last timestep.

    Raises
    ------
    InputError
        An unknown kind, too few betas, or betas outside (0, 1].
    """

    kind: str = "scaled_linear"
    num_train_timesteps: int = 1000
    beta_start: float | None = None
    beta_end: float | None = None
    trained_betas: tuple[float, ...] | None = None
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        kinds = SCHEDULE_KINDS if self.trained_betas is None else ("trained",)
        if self.kind not in kinds:
            raise InputError(name="kind", found=self.kind, expected=" or ".join(kinds))
        n = self.num_train_timesteps if self.trained_betas is None else len(self.trained_betas)
        if n != self.num_train_timesteps or n < 2:
            raise InputError(f"found {n} betas, expected one for each of at least 2 training timesteps")
        given = self.trained_betas or tuple(end for end in (self.beta_start, self.beta_end) if end is not None)
        if not all(0 < beta <= 1 for beta in given):
            raise InputError(
                f"found betas (beta_start to beta_end) from {min(given):g} to {max(given):g}, expected them in (0, 1]"
            )

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        *,
        beta_schedule: str = "linear",
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        zero_terminal_snr: bool = True,
    ) -> "NoiseSchedule":
        """Return the schedule that a ``scheduler_config.json`` describes.

        Parameters
        ----------
        config : mapping
            The parsed file: num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas,
            rescale_betas_zero_snr.
        beta_schedule, beta_start, beta_end
            Defaults for keys that the file leaves out.
        zero_terminal_snr : bool
            False ignores rescale_betas_zero_snr, as some samplers do.

        Raises
        ------
        ModelError
            A value that is not supported.
        """
        reader = ConfigReader(config, "scheduler")
        zero_terminal_snr = reader.flag("rescale_betas_zero_snr", False) and zero_terminal_snr
        num_train_timesteps = reader.integer("num_train_timesteps", 1000, minimum=2)
        trained = config.get("trained_betas")
        if trained is not None and not _are_numbers(trained):
            reader.fail("trained_betas", "a list of numbers")
        try:
            if trained is not None:
                return cls("trained", len(trained), None, None, tuple(trained), zero_terminal_snr)
            kind = _KIND_OF_BETA_SCHEDULE[reader.word("beta_schedule", beta_schedule, tuple(_KIND_OF_BETA_SCHEDULE))]
            beta_start, beta_end = reader.number("beta_start", beta_start), reader.number("beta_end", beta_end)
            return cls(kind, num_train_timesteps, beta_start, beta_end, zero_terminal_snr=zero_terminal_snr)
        except InputError as error:
            raise ModelError(f"scheduler config: {error}") from None

    @cached_property
    def betas(self) -> np.ndarray:
        """Variance of the noise that each timestep adds."""
        betas = self._plain_betas
        return _read_only(_rescale_to_zero_snr(betas) if self.zero_terminal_snr else betas)

    @cached_property
    def alphas(self) -> np.ndarray:
        """1 - betas."""
        return _read_only(1 - self.betas)

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """Share of the picture's variance that is left at each timestep (alpha-bar)."""
        return _read_only(np.cumprod(self.alphas))

    @cached_property
    def sqrt_alphas_cumprod(self) -> np.ndarray:
        """Factor of the picture in the noisy picture of each timestep."""
        return _read_only(np.sqrt(self.alphas_cumprod))

    @cached_property
    def sqrt_one_minus_alphas_cumprod(self) -> np.ndarray:
        """Factor of the noise in the noisy picture of each timestep."""
        return _read_only(np.sqrt(1 - self.alphas_cumprod))

    @cached_property
    def posterior_variance(self) -> np.ndarray:
        """Variance of x_{t-1} given x_t and x_0 (eq. 7 of arXiv:2006.11239); 0 at the first timestep."""
        return _read_only((1 - self._alphas_cumprod_before) / (1 - self.alphas_cumprod) * self.betas)

    @cached_property
    def alphas_cumprod_float32(self) -> np.ndarray:
        """``alphas_cumprod`` computed from float32 betas and alphas, as in diffusers: float32.

        Near the first timestep the rounding of 1 - beta moves the noise level by 1e-5, which can be visible in
        pictures. The samplers therefore use these values.
        """
        betas = self._make_betas(_linspace_float32).astype(np.float32)
        if self.zero_terminal_snr:
            betas = _rescale_to_zero_snr(betas)
        return _read_only(np.cumprod(1 - betas, dtype=np.float64).astype(np.float32))

    @cached_property
    def _plain_betas(self) -> np.ndarray:
        return self._make_betas(np.linspace)

    def _make_betas(self, linspace: Callable[[float, float, int], np.ndarray]) -> np.ndarray:
        if self.trained_betas is not None:
            return np.array(self.trained_betas, np.float64)
        n = self.num_train_timesteps
        if self.kind == "cosine":
            alpha_bar = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * math.pi / 2) ** 2
            return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], _MAX_BETA)
        default_start, default_end = _BETA_RANGES[self.kind]
        start = default_start if self.beta_start is None else self.beta_start
        end = default_end if self.beta_end is None else self.beta_end
        if self.kind == "linear":
            return linspace(start, end, n)
        return linspace(start**0.5, end**0.5, n) ** 2

    @cached_property
    def _alphas_cumprod_before(self) -> np.ndarray:
        return np.append(1.0, self.alphas_cumprod[:-1])

    def add_noise(self, x0: np.ndarray, noise: np.ndarray, t: int | np.ndarray) -> np.ndarray:
        """Return ``x_t``: ``x0`` after ``t`` timesteps of the forward process.

        Parameters
        ----------
        x0, noise : np.ndarray
            A picture or latents, and unit normal noise of its shape.
        t : int or np.ndarray
            A timestep 0 .. num_train_timesteps - 1; or ``(n,)`` of them, one for each entry of x0's first axis.

        Returns
        -------
        np.ndarray
            With x0's shape and dtype.
        """
        scale, sigma = _at(self.sqrt_alphas_cumprod, t, x0), _at(self.sqrt_one_minus_alphas_cumprod, t, x0)
        return (scale * x0 + sigma * noise).astype(x0.dtype)

    def posterior_mean(self, x0: np.ndarray, x: np.ndarray, t: int) -> np.ndarray:
        """Return the mean of the state before ``x`` of timestep ``t``, given the picture (arXiv:2006.11239, eq. 7)."""
        left, before = self.alphas_cumprod[t], self._alphas_cumprod_before[t]
        weight_x0 = math.sqrt(before) * self.betas[t] / (1 - left)
        weight_x = math.sqrt(self.alphas[t]) * (1 - before) / (1 - left)
        return (weight_x0 * x0 + weight_x * x).astype(x.dtype)

    def reverse(
        self,
        model: Callable[[np.ndarray, int], np.ndarray],
        x: np.ndarray,
        normal: Callable[[], np.ndarray],
        prediction_type: str = "epsilon",
        clip: float | None = None,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Run the full DDPM reverse process, one network call for every training timestep.

        Parameters
        ----------
        model : callable
            ``model(x, t)`` returns the network's prediction for x at timestep t, an array of x's shape;
            ``prediction_type`` says what it predicts.
        x : np.ndarray
            Unit normal noise: the state at the last timestep.
        normal : callable
            Returns fresh unit normal noise of x's shape.
        prediction_type : str
            ``"epsilon"``, ``"v_prediction"`` or ``"sample"``.
        clip : float, optional
            Limit of the predicted picture's values.

        Yields
        ------
        int, np.ndarray
            The timestep t just undone and the state before it, from ``num_train_timesteps - 1`` down to 0; the last
            state is the picture.
        """
        for t in range(self.num_train_timesteps - 1, -1, -1):
            alpha, sigma = float(self.sqrt_alphas_cumprod[t]), float(self.sqrt_one_minus_alphas_cumprod[t])
            x0 = predict_x0(prediction_type, model(x, t), x, alpha, sigma)
            if clip is not None:
                x0 = np.clip(x0, -clip, clip)
            x = self.posterior_mean(x0, x, t)
            if t > 0:
                x = (x + math.sqrt(self.posterior_variance[t]) * normal()).astype(x.dtype)
            yield t, x


def predict_x0(prediction_type: str, output: np.ndarray, x: np.ndarray, alpha: Any, sigma: Any) -> np.ndarray:
    """Return the picture x0 that a network's ``output`` for ``x = alpha x0 + sigma noise`` predicts.

    ``alpha`` and ``sigma`` are numbers with ``alpha**2 + sigma**2 = 1``.

    Raises
    ------
    InputError
        An unknown prediction type.
    """
    if prediction_type == "epsilon":
        return (x - sigma * output) / alpha
    if prediction_type == "v_prediction":
        return alpha * x - sigma * output
    if prediction_type == "sample":
        return output
    raise InputError(name="prediction_type", found=prediction_type, expected=" or ".join(PREDICTION_TYPES))


def predict_noise(prediction_type: str, output: np.ndarray, x: np.ndarray, alpha: Any, sigma: Any) -> np.ndarray:
    """Return the noise that a network's ``output`` predicts; the counterpart of :func:`predict_x0`."""
    if prediction_type == "epsilon":
        return output
    if prediction_type == "v_prediction":
        return alpha * output + sigma * x
    return (x - alpha * predict_x0(prediction_type, output, x, alpha, sigma)) / sigma


def _linspace_float32(start: float, end: float, n: int) -> np.ndarray:
    """Return ``np.linspace`` with torch's rounding: a float32 step, counted from the nearer end."""
    first, last = np.float32(start), np.float32(end)
    step = np.float64((last - first) / np.float32(n - 1))
    i = np.arange(n)
    return np.where(i < n // 2, first + step * i, last - step * (n - 1 - i)).astype(np.float32)


def _rescale_to_zero_snr(betas: np.ndarray) -> np.ndarray:
    """Shift and scale the root of alpha-bar to end in 0 and start as before (arXiv:2305.08891, algorithm 1)."""
    root = np.sqrt(np.cumprod(1 - betas, dtype=np.float64).astype(betas.dtype))
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    alphas_cumprod = root**2
    return 1 - np.append(alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1])


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(value, int | float) for value in values)


def _at(values: np.ndarray, t: int | np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return ``values[t]``, shaped to multiply ``x``: a number, or one for each entry of its first axis."""
    picked = values[np.asarray(t)]
    return picked.reshape(picked.shape + (1,) * (x.ndim - picked.ndim)) if picked.ndim else picked


def _read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array
