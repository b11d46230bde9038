"""What the public functions check before they hand addresses to a kernel, which checks nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kernels.memory import empty
from kernels.simd import BFLOAT16, FLOAT16, FLOAT32, LANES

WRITE, ADD, PAST_CACHES = 0, 1, 2  # how results go to an output
_STREAM = 16 << 20  # bytes of an output from which they go past the caches: nobody will find them there
_KINDS = {np.dtype(np.float32): FLOAT32, np.dtype(np.float16): FLOAT16, np.dtype(np.uint16): BFLOAT16}


def address(array: np.ndarray) -> int:
    """Return the address of an array's first element."""
    return array.__array_interface__["data"][0]


def check_array(name: str, array: np.ndarray, ndim: int | Sequence[int] | None = None) -> None:
    """Raise unless `array` is a C-contiguous float32 array, of `ndim` dimensions if given."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name}: found {type(array).__name__}, expected a NumPy array")
    if array.dtype != np.float32:
        raise TypeError(f"{name}: found dtype {array.dtype}, expected float32; convert it with .astype(numpy.float32)")
    _check_layout(name, array, ndim)


def check_weight(name: str, weight: np.ndarray, ndim: int) -> int:
    """Raise unless `weight` is a stored weight; return how it is stored (a ``kind`` of `kernels.simd`)."""
    if not isinstance(weight, np.ndarray):
        raise TypeError(f"{name}: found {type(weight).__name__}, expected a NumPy array or a packed weight")
    kind = _KINDS.get(weight.dtype)
    if kind is None:
        raise TypeError(
            f"{name}: found dtype {weight.dtype}, expected float32, float16, or uint16 that holds bfloat16 bits"
        )
    _check_layout(name, weight, ndim)
    if not weight.size:
        raise ValueError(f"{name}: found an empty weight {weight.shape}, expected at least one value")
    return kind


def _check_layout(name: str, array: np.ndarray, ndim: int | Sequence[int] | None) -> None:
    allowed = (ndim,) if isinstance(ndim, int) else ndim
    if allowed is not None and array.ndim not in allowed:
        expected = " or ".join(map(str, allowed))
        raise ValueError(f"{name}: found {array.ndim} dimensions {array.shape}, expected {expected}")
    if array.ndim == 0:
        raise ValueError(f"{name}: found a scalar array, expected at least one dimension")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name}: found a non-contiguous array, expected C order; use numpy.ascontiguousarray")


def check_shape(name: str, array: np.ndarray, expected: Sequence[int]) -> None:
    """Raise unless `array` is a C-contiguous float32 array of the expected shape."""
    check_array(name, array)
    if array.shape != tuple(expected):
        raise ValueError(f"{name}: found shape {array.shape}, expected {tuple(expected)}")


def check_parts(x: np.ndarray | tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    """Return the arrays that are read as one, concatenated along the last axis, or raise."""
    if not isinstance(x, tuple):
        check_array("x", x)
        return (x,)
    if not x:
        raise ValueError("x: found an empty tuple, expected one or more arrays")
    for part in x:
        check_array("x", part)
        if part.shape[:-1] != x[0].shape[:-1]:
            raise ValueError(f"x: found shapes {x[0].shape} and {part.shape}, expected the same but for the last axis")
        if not part.shape[-1]:
            raise ValueError(f"x: found shape {part.shape}, expected at least one channel in each of several arrays")
    return x


def output(
    out: np.ndarray | None, shape: Sequence[int], *inputs: np.ndarray | None, same: np.ndarray | None = None
) -> np.ndarray:
    """Return `out` if it fits, or a new array; it must be writeable and not share memory with the inputs.

    The input `same`, of that shape, may be `out` itself, but not overlap it in part.
    """
    if out is None:
        return empty(shape)
    check_shape("out", out, shape)
    if not out.flags.writeable:
        raise ValueError("out: found a read-only array, expected a writeable one")
    if same is not None and address(same) != address(out):
        inputs = (*inputs, same)
    if any(x is not None and np.may_share_memory(out, x) for x in inputs):
        raise ValueError("out: shares memory with an input, expected an array of its own")
    return out


def manner(out: np.ndarray, accumulate: bool) -> int:
    """Return how results go to an array whose rows are its last axis: `WRITE`, `ADD` or `PAST_CACHES`."""
    if accumulate:
        return ADD
    aligned = out.shape[-1] % LANES == 0 and address(out) % (LANES * 4) == 0
    return PAST_CACHES if aligned and out.nbytes >= _STREAM else WRITE


def widen(w: np.ndarray) -> np.ndarray:
    """Return a float32 copy of a stored weight.

    Parameters
    ----------
    w : ndarray
        Float32, float16, or uint16 that holds bfloat16 bits; any shape and layout.

    Returns
    -------
    ndarray
        Float32, C-contiguous, same shape.

    Raises
    ------
    TypeError
        If w is no array or its dtype is none of these.
    """
    if not isinstance(w, np.ndarray):
        raise TypeError(f"w: found {type(w).__name__}, expected a NumPy array")
    kind = _KINDS.get(w.dtype)
    if kind is None:
        raise TypeError(f"w: found dtype {w.dtype}, expected float32, float16, or uint16 that holds bfloat16 bits")
    if kind == BFLOAT16:
        wide = w.astype(np.uint32, order="C")
        wide <<= np.uint32(16)
        return wide.view(np.float32)
    return np.array(w, np.float32, order="C")
