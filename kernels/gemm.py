"""Matrix products: linear layers, in any precision, and plain products. `products.driver` does the work."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .activations import FUNCTIONS
from .checks import check_array, check_parts, check_shape, output
from .machine.ops import op
from .products.driver import Geometry, multiply
from .products.packing import (
    GROUPS,
    AdaptedWeight,
    PackedWeight,
    StoredWeight,
    Weight,
    array_of,
    check_precision,
    check_stored,
    pack,
    pack_transposed,
)
from .quantize import QuantizedWeight

_MOST_BYTES = (1 << 31) // (127 * 128)  # columns of int8 products, whose sums must fit int32


def pack_linear(w: StoredWeight, *, gated: bool = False, precision: str = "f32") -> PackedWeight:
    """Pack the weight of a linear layer once, for many calls of `linear`.

    Parameters
    ----------
    w : ndarray, QuantizedWeight or AdaptedWeight
        ``(n, k)``, in any dtype of stored weights (see `kernels`).
    gated : bool
        For ``activation="geglu"``, which needs its weight packed so, and for nothing else; n must be even.
    precision : {"f32", "bf16", "int8"}
        Precision of the products of `linear`.

    Returns
    -------
    PackedWeight
        Panels of about ``4 * n * k`` bytes, in ``bf16`` and ``int8`` a half and a quarter of that.

    Raises
    ------
    TypeError, ValueError
        If w is not such an array, or not fit for the precision.
    """
    check_stored(w, 2)
    check_gated(w, gated)
    check_suits(w, precision)
    return pack(w, gated, precision)


def check_suits(w: Weight, precision: str) -> None:
    """Raise unless this CPU can do products of a precision, and w suits them."""
    check_precision(precision)
    if isinstance(w, PackedWeight):
        if w.precision != precision:
            raise ValueError(f"w: found a weight packed for {w.precision}, expected one packed for {precision}")
    elif precision == "int8" and not isinstance(w, QuantizedWeight):
        raise TypeError(f"w: found {type(w).__name__}, expected what quantize makes of it, for int8")
    elif precision == "int8" and w.shape[1] > _MOST_BYTES:
        raise ValueError(f"w: found shape {w.shape}, expected at most {_MOST_BYTES} columns for int8; use bf16 or f32")
    elif precision == "bf16" and isinstance(w, AdaptedWeight):
        raise TypeError("w: found a weight with an update, expected what merge makes of it, for bf16")


def check_gated(w: Weight, gated: bool) -> None:
    """Raise unless w can serve a gated activation, or one that is not."""
    if gated and w.shape[0] % 2:
        raise ValueError(f"w: found shape {w.shape}, expected an even number of rows for a gated activation")
    if isinstance(w, (AdaptedWeight, PackedWeight)) and w.gated != gated:
        raise ValueError(f"w: found a weight made with gated={w.gated}, expected gated={gated}")


def _count(result: np.ndarray, _: Any, w: Weight, *__: Any, **___: Any) -> tuple[str, float]:
    return "linear", 2 * result.size // result.shape[-1] * math.prod(w.shape)


@op(_count)
def linear(
    x: np.ndarray | tuple[np.ndarray, ...],
    w: Weight,
    b: np.ndarray | None = None,
    *,
    activation: str | None = None,
    out: np.ndarray | None = None,
    accumulate: bool = False,
    precision: str = "f32",
) -> np.ndarray:
    """Linear layer: ``x @ w.T + b``, optionally followed by an activation.

    Parameters
    ----------
    x : ndarray or tuple of ndarray
        Float32 ``(..., k)``, C-contiguous. Several are read as if concatenated along their last axis, without a copy.
    w : ndarray, QuantizedWeight, AdaptedWeight or PackedWeight
        ``(n, k)`` as checkpoints store it, in any of their dtypes (see `kernels`).
    b : ndarray, optional
        Float32 ``(n,)``.
    activation : {"silu", "gelu", "gelu_tanh", "quick_gelu", "geglu"}, optional
        Applied while the result is in cache. ``geglu`` halves the width, as the function `geglu` does. Not for several
        x.
    out : ndarray, optional
        Float32 ``(..., n)`` to write to (``(..., n / 2)`` with ``geglu``).
    accumulate : bool
        Add to what `out` holds (a residual) instead of overwriting it.
    precision : {"f32", "bf16", "int8"}
        Precision of the products, one of `precisions`. ``bf16`` rounds x and w to bfloat16, subnormals to zero, and
        adds up in float32; ``int8`` needs a weight of `quantize`, and rounds each row of x to 255 levels (of several x,
        each by itself).

    Returns
    -------
    ndarray
        Float32 ``(..., n)``, or ``(..., n / 2)`` with ``geglu``.

    Raises
    ------
    TypeError, ValueError
        If a dtype, shape or layout is not as above, or the CPU lacks such products.
    """
    parts = check_parts(x)
    rows, k = parts[0].shape[:-1], sum(part.shape[-1] for part in parts)
    if not isinstance(w, PackedWeight):
        check_stored(w, 2)
    if len(w.shape) != 2 or w.shape[1] != k:
        raise ValueError(f"w: found shape {w.shape} for x {(*rows, k)}, expected (n, {k})")
    n = w.shape[0]
    check_activation(activation, w)
    check_suits(w, precision)
    if activation is not None and len(parts) > 1:
        raise ValueError(f"activation: found {activation!r} for {len(parts)} x, expected None")
    if b is not None:
        check_shape("b", b, (n,))
    columns = n // 2 if activation == "geglu" else n
    out = result(out, (*rows, columns), accumulate, w, b, *parts)
    if any(part.shape[-1] % GROUPS[precision] for part in parts[:-1]):
        parts = (np.concatenate(parts, axis=-1),)  # words must not straddle them
    geometry, first = Geometry(1, math.prod(rows), 1, math.prod(rows), 1), 0
    for part in parts if out.size else ():
        adds = accumulate or first > 0
        multiply(part, w, None if first else b, out, geometry, adds, activation, first, precision=precision)
        first += part.shape[-1]
    return out


def check_activation(activation: str | None, w: Weight) -> None:
    """Raise unless there is such an activation and w suits it."""
    gated = activation == "geglu"
    if not gated and activation is not None and activation not in FUNCTIONS:
        raise ValueError(f"activation: found {activation!r}, expected one of {', '.join(FUNCTIONS)}, geglu, or None")
    check_gated(w, gated)


def result(
    out: np.ndarray | None,
    shape: tuple[int, ...],
    accumulate: bool,
    w: Weight,
    *inputs: np.ndarray | None,
) -> np.ndarray:
    """Return the array to write to: `out`, checked, or a new one."""
    if accumulate and out is None:
        raise ValueError("out: found None, expected the array to add to, because accumulate is true")
    return output(out, shape, array_of(w), *inputs)


def matmul(a: np.ndarray, b: np.ndarray, *, out: np.ndarray | None = None) -> np.ndarray:
    """Matrix product ``a @ b``.

    Parameters
    ----------
    a, b : ndarray
        Float32 ``(m, k)`` and ``(k, n)``, C-contiguous.
    out : ndarray, optional
        Float32 ``(m, n)`` to write to.

    Returns
    -------
    ndarray
        Float32 ``(m, n)``.

    Raises
    ------
    TypeError, ValueError
        If a dtype, shape or layout is not as above.
    """
    check_array("a", a, 2)
    check_array("b", b, 2)
    if a.shape[1] != b.shape[0]:
        raise ValueError(f"b: found shape {b.shape} for a {a.shape}, expected ({a.shape[1]}, n)")
    depth, columns = b.shape
    out = output(out, (a.shape[0], columns), a, b)
    if not depth:
        out[...] = 0
    elif out.size:
        multiply(a, pack_transposed(b), None, out, Geometry(1, a.shape[0], 1, a.shape[0], 1), False)
    return out
