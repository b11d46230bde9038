"""Elementwise activations: gelu, gelu_tanh, quick_gelu, silu, geglu.

The scalar functions below are written so that LLVM turns loops over them into vector code: the exponential is a
polynomial, not a library call. Their largest error is about 2e-7 of x's magnitude, or of 1 where x is smaller.
"""

from __future__ import annotations

import numpy as np
from numba import carray, prange

from .checks import address, check_array, output
from .machine.emit import EXP2_COEFFICIENTS
from .machine.jit import inline_fast, kernel
from .machine.ops import op
from .machine.simd import float_pointer

_C0, _C1, _C2, _C3, _C4, _C5 = EXP2_COEFFICIENTS
_LOG2_E = np.float32(np.log2(np.e))
_BLOCK = 4096  # elements of a task: they stay in the L1 cache
GELU, _GELU_TANH, _QUICK_GELU, _SILU = range(1, 5)
FUNCTIONS = {"gelu": GELU, "gelu_tanh": _GELU_TANH, "quick_gelu": _QUICK_GELU, "silu": _SILU}


@inline_fast
def _exp(x):
    """e**x for x in [-87, 88], clamped outside."""
    y = min(max(x, np.float32(-87)), np.float32(88)) * _LOG2_E
    whole = np.floor(y + np.float32(0.5))
    r = y - whole
    p = _C0 + r * (_C1 + r * (_C2 + r * (_C3 + r * (_C4 + r * _C5))))
    return p * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)


@inline_fast
def _sigmoid(x):
    return np.float32(1) / (np.float32(1) + _exp(-x))


@inline_fast
def _erf(x):
    """Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26."""
    a = abs(x)
    t = np.float32(1) / (np.float32(1) + np.float32(0.3275911) * a)
    p = np.float32(-1.453152027) + t * np.float32(1.061405429)
    p = np.float32(0.254829592) + t * (np.float32(-0.284496736) + t * (np.float32(1.421413741) + t * p))
    return np.copysign(np.float32(1) - p * t * _exp(-a * a), x)


@inline_fast
def silu_scalar(x):
    """``x * sigmoid(x)`` of one float32, for other kernels."""
    return x * _sigmoid(x)


@inline_fast
def _gelu(x):
    """``x * Phi(x)`` of one float32."""
    return np.float32(0.5) * x * (np.float32(1) + _erf(x * np.float32(0.70710678)))


@inline_fast
def copy_row(x, out, count):
    """Copy `count` floats, unless source and target are the same.

    A loop that then works on `out` alone vectorises; one that reads x and writes `out` does so only if they differ.
    """
    target = carray(float_pointer(out), count)
    if x != out:
        source = carray(float_pointer(x), count)
        for i in range(count):
            target[i] = source[i]
    return target


@inline_fast
def activate(address, count, function):
    """Apply one of the `FUNCTIONS` to `count` floats, in place."""
    a = carray(float_pointer(address), count)
    if function == GELU:
        for i in range(count):
            a[i] = _gelu(a[i])
    elif function == _GELU_TANH:
        for i in range(count):
            v = a[i]
            a[i] = v * _sigmoid(np.float32(1.5957691216) * (v + np.float32(0.044715) * v * v * v))
    elif function == _QUICK_GELU:
        for i in range(count):
            a[i] = a[i] * _sigmoid(np.float32(1.702) * a[i])
    else:
        for i in range(count):
            a[i] = silu_scalar(a[i])


@kernel(4)
def _activate(x, out, count, function):
    """Apply one of the `FUNCTIONS` to `count` floats."""
    for block in prange((count + _BLOCK - 1) // _BLOCK):
        start = block * _BLOCK
        n = min(_BLOCK, count - start)
        copy_row(x + 4 * start, out + 4 * start, n)
        activate(out + 4 * start, n, function)


@kernel(4)
def _geglu(x, out, rows, columns):
    for i in prange(rows):
        value = carray(float_pointer(x + i * columns * 8), columns)
        gate = carray(float_pointer(x + i * columns * 8 + columns * 4), columns)
        target = carray(float_pointer(out + i * columns * 4), columns)
        for j in range(columns):
            target[j] = value[j] * _gelu(gate[j])


def _apply(x: np.ndarray, out: np.ndarray | None, function: int) -> np.ndarray:
    check_array("x", x)
    out = output(out, x.shape, same=x)
    _activate(address(x), address(out), x.size, function)
    return out


@op("activations")
def gelu(x: np.ndarray, *, out: np.ndarray | None = None) -> np.ndarray:
    """Gaussian error linear unit ``x * Phi(x)``, the exact form with erf (Hendrycks and Gimpel, arXiv:1606.08415).

    Parameters
    ----------
    x : ndarray
        Float32, any shape, C-contiguous.
    out : ndarray, optional
        Float32 of the same shape to write to; may be x itself.

    Returns
    -------
    ndarray
        Float32, the shape of x.

    Raises
    ------
    TypeError, ValueError
        If a dtype, shape or layout is not as above.
    """
    return _apply(x, out, GELU)


@op("activations")
def gelu_tanh(x: np.ndarray, *, out: np.ndarray | None = None) -> np.ndarray:
    """Gaussian error linear unit in its tanh approximation (arXiv:1606.08415, section 2).

    Parameters, result and errors are those of `gelu`.
    """
    return _apply(x, out, _GELU_TANH)


@op("activations")
def quick_gelu(x: np.ndarray, *, out: np.ndarray | None = None) -> np.ndarray:
    """Compute ``x * sigmoid(1.702 x)``, the approximation that CLIP uses (arXiv:1606.08415, section 2).

    Parameters, result and errors are those of `gelu`.
    """
    return _apply(x, out, _QUICK_GELU)


@op("activations")
def silu(x: np.ndarray, *, out: np.ndarray | None = None) -> np.ndarray:
    """Sigmoid linear unit ``x * sigmoid(x)`` (Elfwing et al., arXiv:1702.03118).

    Parameters, result and errors are those of `gelu`.
    """
    return _apply(x, out, _SILU)


@op("activations")
def geglu(x: np.ndarray, *, out: np.ndarray | None = None) -> np.ndarray:
    """Gated linear unit: the first half of the channels times the gelu of the second (Shazeer, arXiv:2002.05202).

    Parameters
    ----------
    x : ndarray
        Float32 ``(..., 2c)``, C-contiguous.
    out : ndarray, optional
        Float32 ``(..., c)`` to write to.

    Returns
    -------
    ndarray
        Float32 ``(..., c)``.

    Raises
    ------
    TypeError, ValueError
        If a dtype, shape or layout is not as above, or the number of channels is odd.
    """
    check_array("x", x)
    if x.shape[-1] % 2:
        raise ValueError(f"x: found {x.shape[-1]} channels, expected an even number")
    columns = x.shape[-1] // 2
    out = output(out, (*x.shape[:-1], columns), x)
    if out.size:
        _geglu(address(x), address(out), out.size // columns, columns)
    return out
