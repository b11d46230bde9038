"""Matrix products: the driver that linear layers and direct convolutions share.

One driver serves both, because a linear layer is a 1x1 convolution:

    out[pixel, o] = sum over taps and channels of x[pixel moved by tap, channel] * w[o, channel, tap]

- A *task* is a panel of weights (`kernels.packing`), or a few, and a range of output pixels. If the weight is not
  packed beforehand, the thread packs the panels into a buffer of its own, which costs little if they then meet a few
  hundred pixels; and while it multiplies, it fetches the stored weights of its next task into the cache.
- *Inputs* are never packed: the micro-kernel (`kernels.product`) takes a table of row addresses. Padding is a row of
  zeros, strides and nearest-neighbour enlargement are other addresses, so they cost nothing.
- *Outputs* are summed in a block of a few rows that stays in the L1 or L2 cache, and leave it once: with the bias, an
  activation and what is to be added to them. Each output is summed in one order, whatever the blocking and the threads.

The blocking follows Goto and van de Geijn, "Anatomy of high-performance matrix multiplication" (2008).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numba import carray, prange

from kernels.activations import FUNCTIONS, GELU, activate
from kernels.arrays import (
    ADD,
    PAST_CACHES,
    RELU,
    address,
    check_array,
    check_parts,
    check_shape,
    check_weight,
    manner,
    output,
)
from kernels.jit import inline, kernel, threads
from kernels.memory import scratch
from kernels.packing import (
    AdaptedWeight,
    PackedWeight,
    Weight,
    chunk_size,
    first_row,
    pack,
    pack_offsets,
    pack_panel,
    pack_transposed,
    panel_count,
    stored_size,
    update_address,
    update_panel,
    without_update,
)
from kernels.product import SIX, STRIDE, VECTORS, WIDTH, product_rows
from kernels.simd import LANES, fence, float_pointer, load, next_task, store, stream
from kernels.simd import relu as relu_vector

_ROWS = 96  # output pixels of a block: their inputs and sums are used while they are in cache
_PACK_ROWS = 2048  # output pixels of a task that packs its weights, at most
_GROUP = 448 << 10  # bytes of the panels that a task packs, if they are more than one
_LINE = 64  # bytes of a cache line


# --- the end of a block -----------------------------------------------------------------------------------------------


@inline
def _set_shift(shift, bias, c_out, panel, gated):
    """Arrange a bias as a panel's channels are arranged."""
    for j in range(VECTORS):
        first, count = first_row(panel, j, c_out, gated)
        source = carray(float_pointer(bias + first * 4), count)
        for i in range(LANES):
            shift[j * LANES + i] = source[i] if i < count else np.float32(0)


@inline
def _add_bias(block, rows, shift, bias, bias_stride, row0, image_rows, c_out, panel, gated):
    image = -1
    for i in range(rows):
        if image < 0 or (bias_stride and (row0 + i) // image_rows != image):
            image = (row0 + i) // image_rows
            _set_shift(shift, bias + image * bias_stride, c_out, panel, gated)
        for j in range(VECTORS):
            where = block + i * STRIDE + j * LANES * 4
            store(where, load(where) + load(shift.ctypes.data + j * LANES * 4))


@inline
def _gate(block, rows, gates):
    """Multiply the first half of each row by the gelu of the second; it is made in a buffer, in one long loop."""
    half = STRIDE // 2
    for i in range(rows):
        for j in range(0, half, LANES * 4):
            store(gates + i * half + j, load(block + i * STRIDE + half + j))
    activate(gates, rows * WIDTH // 2, GELU)
    for i in range(rows):
        for j in range(0, half, LANES * 4):
            where = block + i * STRIDE + j
            store(where, load(where) * load(gates + i * half + j))


@inline
def _write(block, rows, columns, out, out_stride, how):
    """Copy the first columns of a block to the output, or add them to it; then no less than 0 if `how` has `RELU`."""
    whole = columns // LANES * LANES
    for i in range(rows):
        source, target = block + i * STRIDE, out + i * out_stride
        for j in range(0, whole * 4, LANES * 4):
            value = load(source + j)
            if how & ADD:
                value = load(target + j) + value
            if how & RELU:
                value = relu_vector(value)
            if how & PAST_CACHES:
                stream(target + j, value)
            else:
                store(target + j, value)
        if whole < columns:
            a = carray(float_pointer(source), columns)
            b = carray(float_pointer(target), columns)
            for j in range(whole, columns):
                value = b[j] + a[j] if how & ADD else a[j]
                b[j] = np.float32(0) if how & RELU and value < 0 else value


# --- the driver -------------------------------------------------------------------------------------------------------


@inline
def _address_rows(table, x, zeros, height, width, pixel_bytes, row0, rows, out_h, out_w, stride, dy, dx, enlarge):
    """Fill the table with the addresses of the input pixels that one tap of some output pixels reads."""
    y0, ox = row0 // out_w, row0 % out_w
    image, oy = y0 // out_h, y0 % out_h
    for i in range(rows):
        y, c = oy * stride + dy, ox * stride + dx
        if 0 <= y < (height << enlarge) and 0 <= c < (width << enlarge):
            table[i] = x + ((image * height + (y >> enlarge)) * width + (c >> enlarge)) * pixel_bytes
        else:
            table[i] = zeros
        ox += 1
        if ox == out_w:
            ox, oy = 0, oy + 1
            if oy == out_h:
                oy, image = 0, image + 1
    for i in range(rows, min(rows + SIX - 1, len(table))):
        table[i] = zeros


@kernel(37)
def _multiply(
    x, zeros, height, width, channels, kh, kw, stride, top, left, enlarge,
    w, kind, panels, row_channels, chunk, offsets, down, rank, up,
    out, images, out_h, out_w, c_out, bias, bias_stride, gated, function, how,
    row_block, row_blocks, panel_count, group, buffers, panel_bytes, workers,
):  # fmt: skip
    """Convolve x with a weight: with `panels` if that is an address, else with w, packed into `buffers` as needed.

    The weight is for `channels` of the `row_channels` that its rows have, from where `w` or `panels` points to; `down`,
    `rank` and `up` are the update of w, if there is one. A task takes up to `group` panels, which lie `panel_bytes`
    apart in a worker's buffer.
    """
    taps, pixels = kh * kw, images * out_h * out_w
    out_columns = c_out // 2 if gated else c_out
    panel_columns = WIDTH // 2 if gated else WIDTH
    row_bytes = row_channels * taps * stored_size(kind)
    groups = (panel_count + group - 1) // group
    tasks = row_blocks * groups
    counter = np.zeros(1, np.int64)
    for worker in prange(workers):
        table = np.empty(_ROWS + SIX, np.int64)
        sums = np.empty((_ROWS + SIX, WIDTH), np.float32)
        gates = np.empty(_ROWS * WIDTH // 2 if gated else 0, np.float32)
        shift = np.empty(WIDTH, np.float32)
        block = sums.ctypes.data
        packed = buffers + worker * group * panel_bytes
        task = next_task(counter.ctypes.data)
        while task < tasks:
            following = task + workers  # probably
            panel0, row0 = task % groups * group, task // groups * row_block
            last_panel = min(panel0 + group, panel_count)
            rows = min(row_block, pixels - row0)
            blocks = (rows + _ROWS - 1) // _ROWS
            most = (rows + blocks - 1) // blocks
            most += most % 2  # any even number of rows from 4 on is made of sixes and fours
            ahead, ahead_end, gap = packed, packed, 0
            if not panels:
                for panel in range(panel0, last_panel):
                    target = packed + (panel - panel0) * panel_bytes
                    pack_panel(w, kind, c_out, channels * taps, row_bytes, gated, offsets, panel, target)
                    if rank:
                        up_panel = up + panel * rank * STRIDE
                        update_panel(down, rank, up_panel, channels, taps, chunk, table, block, target)
                if following < tasks and groups > 1:
                    later = following % groups * group * panel_columns
                    ahead = w + later * row_bytes
                    ahead_end = ahead + min(group * panel_columns, out_columns - later) * row_bytes
                    gap = out_columns * row_bytes if gated else 0  # a gated panel has rows in two places
            for row in range(row0, row0 + rows, most):
                count = min(most, row0 + rows - row)
                for panel in range(panel0, last_panel):
                    columns = min(panel_columns, out_columns - panel * panel_columns)
                    vectors = VECTORS if gated else (columns + LANES - 1) // LANES
                    source = packed + (panel - panel0) * panel_bytes
                    if panels:
                        source = panels + panel * row_channels * taps * STRIDE
                    for c in range(0, channels, chunk):
                        depth = min(chunk, channels - c)
                        for tap in range(taps):
                            _address_rows(
                                table, x, zeros, height, width, channels * 4, row, count, out_h, out_w, stride,
                                tap // kw - top, tap % kw - left, enlarge,
                            )  # fmt: skip
                            ahead = product_rows(
                                table.ctypes.data, c * 4, 4, source + (c * taps + tap * depth) * STRIDE, block,
                                count, depth, vectors, c + tap == 0, ahead, _LINE if ahead < ahead_end else 0, gap,
                            )  # fmt: skip
                    if bias:
                        _add_bias(block, count, shift, bias, bias_stride, row, out_h * out_w, c_out, panel, gated)
                    if gated:
                        _gate(block, count, gates.ctypes.data)
                    elif function:
                        activate(block, count * WIDTH, function)
                    _write(
                        block, count, columns, out + (row * out_columns + panel * panel_columns) * 4,
                        out_columns * 4, how,
                    )  # fmt: skip
            task = next_task(counter.ctypes.data)
        fence()


@dataclass(frozen=True)
class Geometry:
    """Which input pixel each tap of each output pixel reads; all sizes in pixels.

    A linear layer over m rows is one image of m x 1 pixels, one tap.
    """

    images: int
    height: int
    width: int
    out_h: int
    out_w: int
    kh: int = 1
    kw: int = 1
    stride: int = 1
    top: int = 0
    left: int = 0
    enlarge: int = 0  # log2 of the nearest-neighbour enlargement before the convolution


def _plan(pixels: int, panels: int, panel_bytes: int, packed: bool) -> tuple[int, int, int]:
    """Return (row_block, row_blocks, group): tasks enough for the threads, and worth packing panels for.

    Many pixels, which do not stay in the cache, meet as many panels at a time as do.
    """
    group = 1 if packed or pixels < _PACK_ROWS else min(panels, max(1, _GROUP // panel_bytes))
    least = math.ceil(4 * threads() / math.ceil(panels / group))
    row_blocks = max(math.ceil(pixels / (_ROWS if packed else _PACK_ROWS)), min(least, math.ceil(pixels / _ROWS)))
    row_block = math.ceil(pixels / row_blocks)
    row_block += row_block % 2
    return row_block, math.ceil(pixels / row_block), group


def multiply(
    x: np.ndarray,
    w: Weight,
    bias: np.ndarray | None,
    out: np.ndarray,
    geometry: Geometry,
    accumulate: bool,
    activation: str | None = None,
    first: int = 0,
    relu: bool = False,
) -> None:
    """Convolve x (..., c_in) with w into out (..., c_out); every argument has been checked by the caller.

    Parameters
    ----------
    x, out : ndarray
        Float32, C-contiguous, channels last.
    w : ndarray, AdaptedWeight or PackedWeight
        ``(c_out, c_in, kh, kw)`` or ``(n, k)`` as stored, or packed.
    bias : ndarray or None
        Float32 ``(c_out,)``, or ``(images, c_out)`` for one row an image.
    geometry : Geometry
        Which input pixels make which output pixel.
    accumulate : bool
        Add to what out holds instead of overwriting it.
    activation : str or None
        Function of the sums and the bias, a key of `kernels.activations.FUNCTIONS` or ``geglu``, before they are added.
    first : int
        Which of w's input channels is the first of x; x may have fewer than w if there is one tap.
    relu : bool
        Whether what ends up in out, with what has been added, is raised to 0.
    """
    g, channels, c_out, gated = geometry, x.shape[-1], w.shape[0], activation == "geglu"
    taps, workers, panels, chunk = g.kh * g.kw, threads(), panel_count(c_out, gated), chunk_size(channels, g.kh * g.kw)
    panel_floats = taps * channels * WIDTH
    *blocks, group = _plan(g.images * g.out_h * g.out_w, panels, panel_floats * 4, isinstance(w, PackedWeight))
    if isinstance(w, PackedWeight):
        weight = 0, 0, address(w.panels) + first * STRIDE, w.shape[1], chunk, 0, 0, 0, 0
        buffers = 0
    else:
        stored, offsets = without_update(w), address(pack_offsets(channels, taps))
        where, kind = address(stored) + first * stored.itemsize, check_weight("w", stored, stored.ndim)
        weight = where, kind, 0, w.shape[1], chunk, offsets, *update_address(w, first)
        buffers = address(scratch.take("weights", workers * group * panel_floats))
    blank = zeros(channels)
    _multiply(
        address(x), address(blank), g.height, g.width, channels, g.kh, g.kw, g.stride, g.top, g.left, g.enlarge,
        *weight,
        address(out), g.images, g.out_h, g.out_w, c_out,
        *bias_address(bias), int(gated), 0 if gated or activation is None else FUNCTIONS[activation],
        manner(out, accumulate, relu),
        *blocks, panels, group, buffers, panel_floats * 4, workers,
    )  # fmt: skip


def bias_address(bias: np.ndarray | None) -> tuple[int, int]:
    """Return a bias's address and the bytes from an image's to the next one's; zeros for none."""
    if bias is None:
        return 0, 0
    return address(bias), 0 if bias.ndim == 1 else bias.shape[1] * 4


@lru_cache(maxsize=8)
def zeros(floats: int) -> np.ndarray:
    """A row of zeros: the pixel that padding reads."""
    return np.zeros(floats, np.float32)


# --- public -----------------------------------------------------------------------------------------------------------


def pack_linear(w: np.ndarray | AdaptedWeight, *, gated: bool = False) -> PackedWeight:
    """Pack the weight of a linear layer once, for many calls of `linear`.

    Parameters
    ----------
    w : ndarray or AdaptedWeight
        ``(n, k)``, in any dtype of stored weights (see `kernels`).
    gated : bool
        For ``activation="geglu"``, which needs its weight packed so, and for nothing else; n must be even.

    Returns
    -------
    PackedWeight
        Float32 panels, about ``4 * n * k`` bytes.

    Raises
    ------
    TypeError, ValueError
        If w is not such an array.
    """
    check_weight("w", without_update(w), 2)
    check_gated(w, gated)
    return pack(w, gated)


def check_gated(w: Weight, gated: bool) -> None:
    """Raise unless w can serve a gated activation, or one that is not."""
    if gated and w.shape[0] % 2:
        raise ValueError(f"w: found shape {w.shape}, expected an even number of rows for a gated activation")
    if isinstance(w, (AdaptedWeight, PackedWeight)) and w.gated != gated:
        raise ValueError(f"w: found a weight made with gated={w.gated}, expected gated={gated}")


def linear(
    x: np.ndarray | tuple[np.ndarray, ...],
    w: Weight,
    b: np.ndarray | None = None,
    *,
    activation: str | None = None,
    out: np.ndarray | None = None,
    accumulate: bool = False,
) -> np.ndarray:
    """Linear layer: ``x @ w.T + b``, optionally followed by an activation.

    Parameters
    ----------
    x : ndarray or tuple of ndarray
        Float32 ``(..., k)``, C-contiguous. Several are read as if concatenated along their last axis, without a copy.
    w : ndarray, AdaptedWeight or PackedWeight
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

    Returns
    -------
    ndarray
        Float32 ``(..., n)``, or ``(..., n / 2)`` with ``geglu``.

    Raises
    ------
    TypeError, ValueError
        If a dtype, shape or layout is not as above.
    """
    parts = check_parts(x)
    rows, k = parts[0].shape[:-1], sum(part.shape[-1] for part in parts)
    if not isinstance(w, PackedWeight):
        check_weight("w", without_update(w), 2)
    if len(w.shape) != 2 or w.shape[1] != k:
        raise ValueError(f"w: found shape {w.shape} for x {(*rows, k)}, expected (n, {k})")
    n = w.shape[0]
    check_activation(activation, w)
    if activation is not None and len(parts) > 1:
        raise ValueError(f"activation: found {activation!r} for {len(parts)} x, expected None")
    if b is not None:
        check_shape("b", b, (n,))
    columns = n // 2 if activation == "geglu" else n
    out = result(out, (*rows, columns), accumulate, w, b, *parts)
    geometry, first = Geometry(1, math.prod(rows), 1, math.prod(rows), 1), 0
    for part in parts if out.size else ():
        multiply(part, w, None if first else b, out, geometry, accumulate or first > 0, activation, first)
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
    return output(out, shape, w.panels if isinstance(w, PackedWeight) else without_update(w), *inputs)


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
