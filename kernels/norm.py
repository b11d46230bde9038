"""Normalisation: groups of channels of an image, and single vectors.

Group norm reads the image twice: once for each channel's sum and sum of squares, taken about that channel's first
value so that a large mean costs no digits, and once to scale, shift and optionally apply SiLU. Partial sums are made
for fixed blocks of pixels and combined in float64 in a fixed order, so the number of threads changes nothing.
"""

from __future__ import annotations

import math

import numpy as np
from numba import carray, prange

from .activations import copy_row, silu_scalar
from .checks import address, check_array, check_parts, check_shape, output
from .machine.jit import inline, kernel
from .machine.ops import op
from .machine.simd import double_pointer, float_pointer

_BLOCKS = 16  # blocks of pixels of an image, at most
_RUN = 64  # pixels that are summed in float32 before they go into a float64 sum


@inline
def _sum_pixels(x, first, last, c, part):
    """Sum channels c of the pixels first .. last of x, and their squares, about the first one, which goes there too."""
    run = np.empty((2, c), np.float32)
    origin = carray(float_pointer(x + first * c * 4), c)
    for j in range(c):
        part[0, j] = 0
        part[1, j] = 0
        part[2, j] = origin[j]
    for start in range(first, last, _RUN):
        run[:] = 0
        for p in range(start, min(start + _RUN, last)):
            row = carray(float_pointer(x + p * c * 4), c)
            for j in range(c):
                d = row[j] - origin[j]
                run[0, j] += d
                run[1, j] += d * d
        for j in range(c):
            part[0, j] += run[0, j]
            part[1, j] += run[1, j]


@kernel(10)
def _group_statistics(x, x_channels, y, n, pixels, c, groups, blocks, sums, statistics):
    """Find the statistics of the channels of x followed by those of y.

    `sums` is the address of (n, blocks, 3, c) float64 of scratch memory; mean and variance of each group go to
    `statistics`, (n, groups, 2) float64.
    """
    y_channels = c - x_channels
    for task in prange(n * blocks):
        first, last = pixels * (task % blocks) // blocks, pixels * (task % blocks + 1) // blocks
        before = task // blocks * pixels * 4
        part = carray(double_pointer(sums + task * 3 * c * 8), (3, c))
        _sum_pixels(x + before * x_channels, first, last, x_channels, part[:, :x_channels])
        if y_channels:
            _sum_pixels(y + before * y_channels, first, last, y_channels, part[:, x_channels:])

    width = c // groups
    found = carray(double_pointer(statistics), (n, groups, 2))
    for i in range(n):
        parts = carray(double_pointer(sums + i * blocks * 3 * c * 8), (blocks, 3, c))
        for g in range(groups):
            mean = 0.0
            for b in range(blocks):
                count = pixels * (b + 1) // blocks - pixels * b // blocks
                for j in range(g * width, (g + 1) * width):
                    mean += parts[b, 0, j] + count * parts[b, 2, j]
            mean /= pixels * width
            square = 0.0
            for b in range(blocks):
                count = pixels * (b + 1) // blocks - pixels * b // blocks
                for j in range(g * width, (g + 1) * width):
                    shift = parts[b, 2, j] - mean
                    square += parts[b, 1, j] + 2 * shift * parts[b, 0, j] + count * shift * shift
            found[i, g, 0], found[i, g, 1] = mean, max(square, 0.0) / (pixels * width)


@kernel(14)
def _group_norm(x, x_channels, y, out, n, pixels, c, groups, weight, bias, eps, silu, blocks, statistics):
    """Normalise the channels of x followed by those of y; `eps` is the address of a float64."""
    y_channels = c - x_channels
    width = c // groups
    gain = carray(float_pointer(weight), c)
    offset = carray(float_pointer(bias), c)
    epsilon = carray(double_pointer(eps), 1)[0]
    found = carray(double_pointer(statistics), (n, groups, 2))
    factors = np.empty((n, 2, c), np.float32)
    for i in range(n):
        for g in range(groups):
            mean, scale = found[i, g, 0], 1 / math.sqrt(found[i, g, 1] + epsilon)
            for j in range(g * width, (g + 1) * width):
                factors[i, 0, j] = gain[j] * scale
                factors[i, 1, j] = offset[j] - mean * scale * gain[j]

    for task in prange(n * blocks):
        first, last = pixels * (task % blocks) // blocks, pixels * (task % blocks + 1) // blocks
        i = task // blocks
        for p in range(first, last):
            pixel = (i * pixels + p) * 4
            copy_row(x + pixel * x_channels, out + pixel * c, x_channels)
            if y_channels:
                copy_row(y + pixel * y_channels, out + pixel * c + x_channels * 4, y_channels)
            row = carray(float_pointer(out + pixel * c), c)
            if silu:
                for j in range(c):
                    row[j] = silu_scalar(row[j] * factors[i, 0, j] + factors[i, 1, j])
            else:
                for j in range(c):
                    row[j] = row[j] * factors[i, 0, j] + factors[i, 1, j]


@op("norms")
def group_norm(
    x: np.ndarray | tuple[np.ndarray, ...],
    groups: int,
    weight: np.ndarray,
    bias: np.ndarray,
    eps: float = 1e-5,
    silu: bool = False,
    *,
    statistics: np.ndarray | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Group normalisation (Wu and He, arXiv:1803.08494), optionally followed by SiLU.

    Parameters
    ----------
    x : ndarray or tuple of two ndarray
        Float32 ``(n, ..., c)``, at least three dimensions, C-contiguous; statistics are over all but n and the group.
        Two are read as if concatenated along their last axis, without a copy.
    groups : int
        Number of groups; divides c.
    weight, bias : ndarray
        Float32 ``(c,)``.
    eps : float
        Added to the variance.
    silu : bool
        Apply ``y * sigmoid(y)`` to the result.
    statistics : ndarray, optional
        Float64 ``(n, groups, 2)``, those to use instead of x's own: as of `group_statistics`, of more than this x.
    out : ndarray, optional
        Float32 of the shape of x to write to; may be x itself, if that is one array.

    Returns
    -------
    ndarray
        Float32, the shape of x.

    Raises
    ------
    TypeError, ValueError
        If a dtype, shape or layout is not as above.
    """
    parts, n, pixels, c = _check_groups(x, groups)
    check_shape("weight", weight, (c,))
    check_shape("bias", bias, (c,))
    if statistics is not None:
        _check_statistics(statistics, (n, groups, 2))
    first, one = parts[0], len(parts) == 1
    out = output(out, (*first.shape[:-1], c), weight, bias, *parts[one:], same=first if one else None)
    if not out.size:
        return out
    if statistics is None:
        statistics = group_statistics(x, groups)
    epsilon = np.array([float(eps)])
    _group_norm(
        address(first), first.shape[-1], address(parts[-1]), address(out), n, pixels, c, groups,
        address(weight), address(bias), address(epsilon), int(silu), _block_count(pixels), address(statistics),
    )  # fmt: skip
    return out


def group_statistics(x: np.ndarray | tuple[np.ndarray, ...], groups: int) -> np.ndarray:
    """Mean and variance of each group of channels, of which `group_norm` takes its scale and shift.

    Parameters
    ----------
    x : ndarray or tuple of two ndarray
        As for `group_norm`, with at least one pixel.
    groups : int
        Number of groups; divides c.

    Returns
    -------
    ndarray
        Float64 ``(n, groups, 2)``: mean, variance.

    Raises
    ------
    TypeError, ValueError
        If a dtype, shape or layout is not as above.
    """
    parts, n, pixels, c = _check_groups(x, groups)
    if not pixels:
        raise ValueError(f"x: found shape {parts[0].shape}, expected at least one pixel")
    blocks = _block_count(pixels)
    sums, statistics = np.empty(n * blocks * 3 * c), np.empty((n, groups, 2))
    _group_statistics(
        address(parts[0]), parts[0].shape[-1], address(parts[-1]), n, pixels, c, groups, blocks,
        address(sums), address(statistics),
    )  # fmt: skip
    return statistics


def _check_groups(x: np.ndarray | tuple[np.ndarray, ...], groups: int) -> tuple[tuple[np.ndarray, ...], int, int, int]:
    """Return x as a tuple, how many images and pixels it has, and all its channels; raise unless all is right."""
    parts = check_parts(x)
    if len(parts) > 2:
        raise ValueError(f"x: found {len(parts)} arrays, expected one or two")
    first, c = parts[0], sum(part.shape[-1] for part in parts)
    if first.ndim < 3:
        raise ValueError(f"x: found {first.ndim} dimensions {first.shape}, expected at least 3: (n, ..., c)")
    if not isinstance(groups, (int, np.integer)) or groups < 1 or c % groups:
        raise ValueError(f"groups: found {groups!r} for {c} channels, expected a whole number that divides them")
    return parts, first.shape[0], math.prod(first.shape[1:-1]), c


def _check_statistics(statistics: np.ndarray, shape: tuple[int, ...]) -> None:
    if not isinstance(statistics, np.ndarray) or statistics.dtype != np.float64:
        found = getattr(statistics, "dtype", type(statistics).__name__)
        raise TypeError(f"statistics: found {found}, expected a float64 array, as group_statistics gives")
    if statistics.shape != shape or not statistics.flags.c_contiguous:
        raise ValueError(f"statistics: found shape {statistics.shape}, expected {shape}, C-contiguous")


def _block_count(pixels: int) -> int:
    return min(_BLOCKS, math.ceil(pixels / 16))


@kernel(7)
def _layer_norm(x, out, rows, c, weight, bias, eps):
    """`eps` is the address of a float64."""
    gain = carray(float_pointer(weight), c)
    offset = carray(float_pointer(bias), c)
    epsilon = np.float32(carray(double_pointer(eps), 1)[0])
    size = np.float32(c)
    for i in prange(rows):
        row = copy_row(x + i * c * 4, out + i * c * 4, c)
        mean = np.float32(0)
        for j in range(c):
            mean += row[j]
        mean /= size
        square = np.float32(0)
        for j in range(c):
            d = row[j] - mean
            square += d * d
        scale = np.float32(1) / np.sqrt(square / size + epsilon)
        for j in range(c):
            row[j] = (row[j] - mean) * scale * gain[j] + offset[j]


@op("norms")
def layer_norm(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float = 1e-5, *, out: np.ndarray | None = None
) -> np.ndarray:
    """Layer normalisation over the last dimension (Ba, Kiros and Hinton, arXiv:1607.06450).

    Parameters
    ----------
    x : ndarray
        Float32 ``(..., c)``, C-contiguous.
    weight, bias : ndarray
        Float32 ``(c,)``.
    eps : float
        Added to the variance.
    out : ndarray, optional
        Float32 of the shape of x to write to; may be x itself.

    Returns
    -------
    ndarray
        Float32, the shape of x.

    Raises
    ------
    TypeError, ValueError
        If a dtype, shape or layout is not as above.
    """
    check_array("x", x)
    c = x.shape[-1]
    check_shape("weight", weight, (c,))
    check_shape("bias", bias, (c,))
    out = output(out, x.shape, weight, bias, same=x)
    if out.size:
        epsilon = np.array([float(eps)])
        _layer_norm(
            address(x), address(out), out.size // c, c, address(weight), address(bias), address(epsilon)
        )  # fmt: skip
    return out
