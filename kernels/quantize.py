"""Weights of bytes: symmetric about 0, with a scale for each output channel.

The scale makes the largest value of a channel 127; -128 does not occur. After Jacob et al., "Quantization and training
of neural networks for efficient integer-arithmetic-only inference" (2018), arXiv:1712.05877, section 2.1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .checks import check_shape, check_values, check_weight
from .dtypes import widen
from .machine.memory import aligned
from .products.microkernel import WIDTH

LARGEST = 127
_BLOCK = 1 << 20  # values that are looked at in one go


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight of whole numbers, with a scale for each output channel, accepted wherever a kernel takes a weight.

    Attributes
    ----------
    values : ndarray
        Int8, ``(c_out, c_in, kh, kw)`` or ``(n, k)``, C-contiguous.
    scales : ndarray
        Float32 ``(c_out,)``; channel i stands for ``values[i] * scales[i]``. They are copied.

    Raises
    ------
    TypeError, ValueError
        If the arrays are not such.
    """

    values: np.ndarray
    scales: np.ndarray
    _memory: dict[str, np.ndarray] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_values(self.values)
        check_shape("scales", self.scales, self.values.shape[:1])
        padded = aligned(len(self.scales) + WIDTH)  # kernels read whole vectors of them
        padded[: len(self.scales)], padded[len(self.scales) :] = self.scales, 0
        object.__setattr__(self, "scales", padded[: len(self.scales)])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.values.shape

    def remembered(self, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """Return what a kernel needs to know of the values, which is made once."""
        if name not in self._memory:
            self._memory[name] = make()
        return self._memory[name]

    def reshape(self, *shape: int) -> QuantizedWeight:
        """Return the same weight in another shape with as many output channels: 1x1 filters as a matrix, for one."""
        return QuantizedWeight(self.values.reshape(*shape), self.scales)

    def widen(self) -> np.ndarray:
        """Return the weight as float32."""
        return self.values * self.scales.reshape(-1, *[1] * (self.values.ndim - 1))

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it stands for."""
        return self.values.nbytes + self.scales.nbytes


def quantize(w: np.ndarray) -> QuantizedWeight:
    """Round a weight to whole numbers of -127 .. 127, with a scale for each output channel.

    Parameters
    ----------
    w : ndarray
        ``(n, k)`` or ``(c_out, c_in, kh, kw)``, in any dtype of stored weights (see `kernels`).

    Returns
    -------
    QuantizedWeight
        ``scales[i]`` is the largest magnitude of ``w[i]`` divided by 127; NaN or infinite if a value of it is.

    Raises
    ------
    TypeError, ValueError
        If w is not such an array.
    """
    check_weight("w", w, 4 if getattr(w, "ndim", 2) == 4 else 2)
    values, scales = np.empty(w.shape, np.int8), np.empty(len(w), np.float32)
    step = max(1, _BLOCK // (w.size // len(w)))
    for first in range(0, len(w), step):
        some = slice(first, first + step)
        wide = widen(w[some])
        each = (slice(None), *[np.newaxis] * (w.ndim - 1))
        scales[some] = np.abs(wide).max(axis=tuple(range(1, w.ndim))) / np.float32(LARGEST)
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            wide *= np.float32(1) / scales[some][each]
        values[some] = np.where(np.isfinite(wide), np.rint(wide), 0)
    return QuantizedWeight(values, scales)
