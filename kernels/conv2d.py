"""Convolution of images, channels last, in the sense of neural networks (correlation).

The direct algorithm of `kernels.gemm` multiplies, for each tap of the filter, the shifted input by that tap's weights.
For 3x3 filters at stride 1 the algorithms of `kernels.winograd` are faster. None copies the input to pad it.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np

from . import winograd
from .checks import check_array, check_shape
from .gemm import linear, result
from .low_rank import is_apart
from .machine.ops import op
from .products.driver import Geometry, multiply
from .products.packing import PackedWeight, StoredWeight, Weight, check_precision, check_stored, pack
from .quantize import QuantizedWeight

ALGORITHMS = ("auto", "direct", "winograd", *winograd.FORMS)

Padding = int | tuple[tuple[int, int], tuple[int, int]]


def pack_conv2d(w: StoredWeight) -> PackedWeight:
    """Pack the weight of a convolution once, for many calls of `conv2d`.

    Parameters
    ----------
    w : ndarray, QuantizedWeight or AdaptedWeight
        ``(c_out, c_in, kh, kw)``, in any dtype of stored weights (see `kernels`).

    Returns
    -------
    PackedWeight
        Float32 panels, about ``4 * c_out * c_in * kh * kw`` bytes.

    Raises
    ------
    TypeError, ValueError
        If w is not such an array.
    """
    check_stored(w, 4)
    return pack(w)


def _count(result: np.ndarray, _: Any, w: Weight, *__: Any, **___: Any) -> tuple[str, float]:
    return f"conv2d {w.shape[2]}x{w.shape[3]}", 2 * result.size * math.prod(w.shape[1:])


@op(_count)
def conv2d(
    x: np.ndarray,
    w: Weight,
    b: np.ndarray | None = None,
    stride: int = 1,
    padding: Padding = 1,
    *,
    upsample: bool = False,
    out: np.ndarray | None = None,
    accumulate: bool = False,
    activation: str | None = None,
    algorithm: str = "auto",
    precision: str = "f32",
) -> np.ndarray:
    """Two-dimensional convolution.

    Parameters
    ----------
    x : ndarray
        Float32 ``(n, h, w, c_in)``, C-contiguous.
    w : ndarray, QuantizedWeight, AdaptedWeight or PackedWeight
        ``(c_out, c_in, kh, kw)`` as checkpoints store it, in any of their dtypes (see `kernels`).
    b : ndarray, optional
        Float32 ``(c_out,)``, or ``(n, c_out)`` for another bias in each image (a time embedding).
    stride : int
        Step in both directions.
    padding : int or ((top, bottom), (left, right))
        Pixels of zeros around the image.
    upsample : bool
        Read x as if each pixel were a square of 2x2 (nearest-neighbour enlargement), without making a copy.
    out : ndarray, optional
        Float32 ``(n, h', w', c_out)`` to write to.
    accumulate : bool
        Add to what `out` holds (a residual) instead of overwriting it.
    activation : {"relu"}, optional
        Applied after the bias and, unlike the activation of `linear`, after what `out` held has been added.
    algorithm : {"auto", "direct", "winograd", "winograd2", "winograd4", "winograd_up"}
        Winograd's algorithms need 3x3 filters and stride 1. They compute tiles of 2x2 or 4x4 outputs (2, 4), or of 8x8
        by way of 2x2 filters (up, for `upsample` only); ``winograd`` is the fastest of these, ``auto`` of all.
        Largest errors relative to the largest value: direct 5e-7, winograd2 1e-6, winograd_up 1e-6, winograd4 2e-6. A
        packed weight is for the direct algorithm only.
    precision : {"f32", "bf16", "int8"}
        Precision of the products, one of `precisions`. Only winograd2 multiplies in less than float32, because the
        others would gain less or lose too many digits; ``auto`` takes that into account. ``int8`` needs a weight
        of `quantize`.

    Returns
    -------
    ndarray
        Float32 ``(n, h', w', c_out)`` with ``h' = (h * (2 if upsample else 1) + top + bottom - kh) // stride + 1``.

    Raises
    ------
    TypeError, ValueError
        If a dtype, shape or layout is not as above, or the filter does not fit the padded image.
    """
    check_array("x", x, 4)
    if not isinstance(w, PackedWeight):
        check_stored(w, 4)
    if len(w.shape) != 4 or w.shape[1] != x.shape[3]:
        raise ValueError(f"w: found shape {w.shape} for x {x.shape}, expected (c_out, {x.shape[3]}, kh, kw)")
    geometry = _geometry(x.shape, w.shape, stride, padding, upsample)
    c_out = w.shape[0]
    if b is not None:
        check_array("b", b, (1, 2))
        check_shape("b", b, (c_out,) if b.ndim == 1 else (x.shape[0], c_out))
    out = result(out, (x.shape[0], geometry.out_h, geometry.out_w, c_out), accumulate, w, x, b)
    if activation not in {None, "relu"}:
        raise ValueError(f"activation: found {activation!r}, expected relu or None")
    check_precision(precision)
    if precision == "int8" and not isinstance(w, QuantizedWeight):
        raise TypeError(f"w: found {type(w).__name__}, expected what quantize makes of it, for int8")
    chosen = _choose(algorithm, x.shape[3], c_out, geometry, precision)
    if not out.size:
        return out
    unpacked = w.stored if isinstance(w, PackedWeight) else w
    relu = activation == "relu"
    if chosen == "direct" and unpacked is not w:
        multiply(x, w, b, out, geometry, accumulate, relu=relu)
    elif is_apart(unpacked, geometry, chosen):
        convolve = partial(conv2d, x, stride=stride, padding=padding, upsample=upsample)
        convolve(w=unpacked.stored, b=b, out=out, accumulate=accumulate, algorithm=chosen, precision=precision)
        linear(convolve(w=unpacked.filters), unpacked.up, out=out, accumulate=True)
        if relu:
            np.maximum(out, 0, out=out)
    elif chosen == "direct":
        multiply(x, unpacked, b, out, geometry, accumulate, relu=relu)
    else:
        products = precision if chosen in winograd.COARSE else "f32"
        winograd.winograd(x, unpacked, b, out, geometry, accumulate, relu, chosen, products)
    return out


def _choose(algorithm: str, channels: int, c_out: int, geometry: Geometry, precision: str) -> str:
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm: found {algorithm!r}, expected one of {', '.join(ALGORITHMS)}")
    costs = winograd.costs(channels, c_out, geometry, precision)
    able = {name: cost for name, cost in costs.items() if algorithm == "auto" or name.startswith(algorithm)}
    if not able:
        raise ValueError(
            f"algorithm: {algorithm} cannot do {geometry.kh}x{geometry.kw} filters with stride {geometry.stride}"
            f"{' and' if geometry.enlarge else ' without'} upsampling; expected 3x3 and stride 1"
            f"{' and upsampling' if algorithm == 'winograd_up' else ''}"
        )
    return min(able, key=lambda name: able[name])


def _geometry(x: tuple[int, ...], w: tuple[int, ...], stride: int, padding: Padding, upsample: bool) -> Geometry:
    if not isinstance(stride, (int, np.integer)) or stride < 1:
        raise ValueError(f"stride: found {stride!r}, expected a whole number from 1 on")
    if isinstance(padding, (int, np.integer)):
        padding = ((padding, padding), (padding, padding))
    try:
        (top, bottom), (left, right) = padding
    except (TypeError, ValueError):
        raise ValueError(f"padding: found {padding!r}, expected a number or ((top, bottom), (left, right))") from None
    if not all(isinstance(side, (int, np.integer)) for side in (top, bottom, left, right)):
        raise TypeError(f"padding: found {padding!r}, expected whole numbers")
    if min(top, bottom, left, right) < 0:
        raise ValueError(f"padding: found {padding!r}, expected no negative number")
    (n, height, width, _), (_, _, kh, kw), scale = x, w, 2 if upsample else 1
    out_h = (height * scale + top + bottom - kh) // stride + 1
    out_w = (width * scale + left + right - kw) // stride + 1
    if out_h < 1 or out_w < 1:
        raise ValueError(f"x: found {height}x{width} pixels, too few for a {kh}x{kw} filter with padding {padding}")
    return Geometry(n, height, width, out_h, out_w, kh, kw, stride, top, left, int(upsample))
