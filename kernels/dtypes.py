"""The dtypes of stored weights, and float32 made of them and back."""

from __future__ import annotations

import numpy as np

from .machine.emit import BFLOAT16, E4M3, E5M2, FLOAT16, FLOAT32

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


def kind_of(name: str, weight: np.ndarray) -> int:
    """Return how a weight is stored (a ``kind`` of `machine.emit`), or raise if its dtype is not one of weights."""
    kind = _KINDS.get(weight.dtype)
    if kind is None:
        raise TypeError(
            f"{name}: found dtype {weight.dtype}, expected float32, float16, or uint16 that holds bfloat16 bits, or "
            "float8_e4m3 or float8_e5m2 of kernels"
        )
    return kind


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
