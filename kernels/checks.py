"""What the public functions check before they hand addresses to a kernel, which checks nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .dtypes import kind_of
from .machine.emit import LANES
from .machine.memory import empty

# How results go to an output, flags: `ADD` and `PAST_CACHES` exclude each other, `RELU` comes after what is added.
WRITE, ADD, PAST_CACHES, RELU = 0, 1, 2, 4
_STREAM = 16 << 20  # bytes of an output from which they go past the caches: nobody will find them there


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
    """Raise unless `weight` is a stored weight; return how it is stored (a ``kind`` of `machine.emit`)."""
    if not isinstance(weight, np.ndarray):
        raise TypeError(f"{name}: found {type(weight).__name__}, expected a NumPy array or a packed weight")
    kind = kind_of(name, weight)
    _check_layout(name, weight, ndim)
    if not weight.size:
        raise ValueError(f"{name}: found an empty weight {weight.shape}, expected at least one value")
    return kind


def check_values(values: np.ndarray) -> None:
    """Raise unless `values` are those of a quantized weight."""
    if not isinstance(values, np.ndarray):
        raise TypeError(f"values: found {type(values).__name__}, expected a NumPy array")
    if values.dtype != np.int8:
        raise TypeError(f"values: found dtype {values.dtype}, expected int8")
    _check_layout("values", values, (2, 4))
    if not values.size:
        raise ValueError(f"values: found an empty weight {values.shape}, expected at least one value")


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


def write_mode(out: np.ndarray, accumulate: bool, relu: bool = False) -> int:
    """Return how results go to an array whose rows are its last axis: `WRITE`, `ADD`, `PAST_CACHES`, with `RELU`."""
    aligned = out.shape[-1] % LANES == 0 and address(out) % (LANES * 4) == 0
    how = ADD if accumulate else PAST_CACHES if aligned and out.nbytes >= _STREAM else WRITE
    return how | RELU if relu else how
