"""What the public functions check before they hand addresses to a kernel, which checks nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kernels.emit import BFLOAT16, E4M3, E5M2, FLOAT16, FLOAT32, LANES
from kernels.memory import empty

# How results go to an output, flags: `ADD` and `PAST_CACHES` exclude each other, `RELU` comes after what is added.
WRITE, ADD, PAST_CACHES, RELU = 0, 1, 2, 4
_STREAM = 16 << 20  # bytes of an output from which they go past the caches: nobody will find them there

# NumPy has no float8. These are the formats of Micikevicius et al., "FP8 formats for deep learning" (2022): E4M3 has no
# infinities, and E5M2 is the upper half of a float16.
float8_e4m3, float8_e5m2 = np.dtype([("e4m3", np.uint8)]), np.dtype([("e5m2", np.uint8)])
_KINDS = {
    np.dtype(np.float32): FLOAT32,
    np.dtype(np.float16): FLOAT16,
    np.dtype(np.uint16): BFLOAT16,
    float8_e4m3: E4M3,
    float8_e5m2: E5M2,
}


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
    """Raise unless `weight` is a stored weight; return how it is stored (a ``kind`` of `kernels.emit`)."""
    if not isinstance(weight, np.ndarray):
        raise TypeError(f"{name}: found {type(weight).__name__}, expected a NumPy array or a packed weight")
    kind = kind_of(name, weight)
    _check_layout(name, weight, ndim)
    if not weight.size:
        raise ValueError(f"{name}: found an empty weight {weight.shape}, expected at least one value")
    return kind


def kind_of(name: str, weight: np.ndarray) -> int:
    """Return how a weight is stored (a ``kind`` of `kernels.emit`), or raise if its dtype is not one of weights."""
    kind = _KINDS.get(weight.dtype)
    if kind is None:
        raise TypeError(
            f"{name}: found dtype {weight.dtype}, expected float32, float16, or uint16 that holds bfloat16 bits, or "
            "float8_e4m3 or float8_e5m2 of kernels"
        )
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


def manner(out: np.ndarray, accumulate: bool, relu: bool = False) -> int:
    """Return how results go to an array whose rows are its last axis: `WRITE`, `ADD`, `PAST_CACHES`, with `RELU`."""
    aligned = out.shape[-1] % LANES == 0 and address(out) % (LANES * 4) == 0
    how = ADD if accumulate else PAST_CACHES if aligned and out.nbytes >= _STREAM else WRITE
    return how | RELU if relu else how


def widen(w: np.ndarray) -> np.ndarray:
    """Return a float32 copy of a stored weight.

    Parameters
    ----------
    w : ndarray
        In any dtype of stored weights (see `kernels`), of any shape and layout.

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
    kind = kind_of("w", w)
    if kind in {E4M3, E5M2}:
        return _widen_float8(w.view(np.uint8), kind)
    if kind == BFLOAT16:
        wide = w.astype(np.uint32, order="C")
        wide <<= np.uint32(16)
        return wide.view(np.float32)
    return np.array(w, np.float32, order="C")


def narrow(x: np.ndarray) -> np.ndarray:
    """Return float32 as bfloat16, rounded to the nearest, ties to even: the opposite of `widen`.

    Parameters
    ----------
    x : ndarray
        Float32.

    Returns
    -------
    ndarray
        Uint16 bits of bfloat16, C-contiguous, same shape.

    Raises
    ------
    TypeError
        If x is no array or its dtype is another one.
    """
    if not isinstance(x, np.ndarray) or x.dtype != np.float32:
        raise TypeError(f"x: found {getattr(x, 'dtype', type(x).__name__)}, expected a NumPy array of float32")
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FC0), rounded).astype(np.uint16)


def _widen_float8(codes: np.ndarray, kind: int) -> np.ndarray:
    """Return codes of float8 as float32, by way of float16, as the kernels do."""
    bits = codes.astype(np.uint16, order="C")
    if kind == E5M2:
        bits <<= np.uint16(8)
        return bits.view(np.float16).astype(np.float32)
    magnitude = bits & np.uint16(0x7F)
    half = (bits & np.uint16(0x80)) << np.uint16(8) | magnitude << np.uint16(7)
    wide = half.view(np.float16).astype(np.float32) * np.float32(2**8)
    return np.where(magnitude == 0x7F, np.float32(np.nan), wide)
