"""The driver of matrix products that linear layers and direct convolutions share.

One driver serves both, because a linear layer is a 1x1 convolution:

    out[pixel, o] = sum over taps and channels of x[pixel moved by tap, channel] * w[o, channel, tap]

- A *task* is a panel of weights (`products.packing`), or a few, and a range of output pixels. If the weight is not
  packed beforehand, the thread packs the panels into a buffer of its own, which costs little if they then meet a few
  hundred pixels; and while it multiplies, it fetches the stored weights of its next task into the cache.
- *Inputs* are never packed: the micro-kernel (`products.microkernel`) takes a table of row addresses. Padding is a row
  of zeros, strides and nearest-neighbour enlargement are other addresses, so they cost nothing.
- *Outputs* are summed in a block of a few rows that stays in the L1 or L2 cache, and leave it once: with the bias, an
  activation and what is to be added to them. Each output is summed in one order, whatever the blocking and the threads.

The blocking follows Goto and van de Geijn, "Anatomy of high-performance matrix multiplication" (2008).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numba import carray

from ..activations import FUNCTIONS, GELU, activate
from ..checks import ADD, PAST_CACHES, RELU, address, write_mode
from ..machine.emit import LANES
from ..machine.jit import inline, task_kernel, threads
from ..machine.memory import scratch
from ..machine.simd import fence, float_pointer, load, load_sums, next_task, splat, store, stream
from ..machine.simd import relu as relu_vector
from .microkernel import SIX, STRIDE, VECTORS, WIDTH, product_bytes, product_pairs, product_rows
from .operands import as_words, zero_words
from .packing import (
    GROUPS,
    PackedWeight,
    Weight,
    chunk_size,
    first_row,
    pack_bytes,
    pack_offsets,
    pack_pairs,
    pack_panel,
    panel_count,
    stored_address,
    stored_size,
    update_address,
    update_panel,
    words_of,
)

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


@inline
def _pack_floats(
    w, kind, scales, c_out, columns, row_bytes, gated, offsets, down, rank, up, channels, taps, chunk,
    panel, table, spare, target,
):  # fmt: skip
    pack_panel(w, kind, scales, c_out, columns, row_bytes, gated, offsets, panel, target)
    if rank:
        update_panel(down, rank, up + panel * rank * STRIDE, channels, taps, chunk, table, spare, target)


def _make_pack(pack_words):
    """Make a function with the arguments of `_pack_floats` that packs words; updates have been merged before."""

    @inline
    def pack(
        w, kind, scales, c_out, columns, row_bytes, gated, offsets, down, rank, up, channels, taps, chunk,
        panel, table, spare, target,
    ):  # fmt: skip
        pack_words(w, kind, c_out, columns, row_bytes, gated, panel, target)

    return pack


_pack_pairs, _pack_bytes = _make_pack(pack_pairs), _make_pack(pack_bytes)

# What makes float32 of a block's sums, for the three precisions. The extras of a panel are its zero sums, which the
# zero point of the inputs alone gives, and its channels' scales: `begin` sets them up, `settle` uses them.


@inline
def _begin_floats(extras, scales, c_out, panel, gated, source, words, zeros, table):
    pass


@inline
def _settle_floats(block, rows, extras, scales, row_scales):
    pass


@inline
def _begin_pairs(extras, scales, c_out, panel, gated, source, words, zeros, table):
    if scales:
        _set_shift(extras[WIDTH:], scales, c_out, panel, gated)


@inline
def _settle_pairs(block, rows, extras, scales, row_scales):
    if scales:
        for i in range(rows):
            for j in range(0, STRIDE, LANES * 4):
                where = block + i * STRIDE + j
                store(where, load(where) * load(extras.ctypes.data + STRIDE + j))


@inline
def _begin_bytes(extras, scales, c_out, panel, gated, source, words, zeros, table):
    _set_shift(extras[WIDTH:], scales, c_out, panel, gated)
    table[0] = zeros
    product_bytes(table.ctypes.data, 0, 4, source, extras.ctypes.data, 1, words, VECTORS, True, 0, 0, 0)


@inline
def _settle_bytes(block, rows, extras, scales, row_scales):
    where = extras.ctypes.data
    for i in range(rows):
        row_scale = splat(carray(float_pointer(row_scales + i * 4), 1)[0])
        for j in range(0, STRIDE, LANES * 4):
            sums = block + i * STRIDE + j
            store(sums, load_sums(sums, where + j) * (row_scale * load(where + STRIDE + j)))


def _make_work(pack, product_rows, begin, settle):
    """Make what a worker does, of `multiply`: tasks until there are none left."""

    @inline
    def work(parameters, worker, counter):
        (
            x, zeros, height, width, channels, kh, kw, stride, top, left, enlarge,
            w, kind, scales, columns, row_bytes, panels, panel_stride, chunk, offsets, down, rank, up,
            out, images, out_h, out_w, c_out, bias, bias_stride, gated, function, how,
            row_block, row_blocks, panel_count, group, buffers, panel_bytes, row_scales, workers,
        ) = parameters  # fmt: skip
        buffer = buffers + worker * group * panel_bytes
        taps, pixels = kh * kw, images * out_h * out_w
        out_columns = c_out // 2 if gated else c_out
        panel_columns = WIDTH // 2 if gated else WIDTH
        groups = (panel_count + group - 1) // group
        tasks = row_blocks * groups
        table = np.empty(_ROWS + SIX, np.int64)
        sums = np.empty((_ROWS + SIX, WIDTH), np.float32)
        gates = np.empty(_ROWS * WIDTH // 2 if gated else 0, np.float32)
        shift = np.empty(WIDTH, np.float32)
        extras = np.empty((group, 2 * WIDTH), np.float32)
        task = next_task(counter)
        while task < tasks:
            block = sums.ctypes.data  # here, so that the loop keeps it: see `machine.jit`
            following = task + workers  # probably
            panel0, row0 = task % groups * group, task // groups * row_block
            last_panel = min(panel0 + group, panel_count)
            rows = min(row_block, pixels - row0)
            blocks = (rows + _ROWS - 1) // _ROWS
            most = (rows + blocks - 1) // blocks
            most += most % 2  # any even number of rows from 4 on is made of sixes and fours
            ahead, ahead_end, gap = buffer, buffer, 0
            if not panels and following < tasks and groups > 1:
                later = following % groups * group * panel_columns
                ahead = w + later * row_bytes
                ahead_end = ahead + min(group * panel_columns, out_columns - later) * row_bytes
                gap = out_columns * row_bytes if gated else 0  # a gated panel has rows in two places
            for panel in range(panel0, last_panel):
                source = panels + panel * panel_stride if panels else buffer + (panel - panel0) * panel_bytes
                if not panels:
                    pack(
                        w, kind, scales, c_out, columns, row_bytes, gated, offsets,
                        down, rank, up, channels, taps, chunk, panel, table, block, source,
                    )  # fmt: skip
                begin(extras[panel - panel0], scales, c_out, panel, gated, source, channels, zeros, table)
            for row in range(row0, row0 + rows, most):
                count = min(most, row0 + rows - row)
                for panel in range(panel0, last_panel):
                    wide = min(panel_columns, out_columns - panel * panel_columns)
                    vectors = VECTORS if gated else (wide + LANES - 1) // LANES
                    source = panels + panel * panel_stride if panels else buffer + (panel - panel0) * panel_bytes
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
                    settle(block, count, extras[panel - panel0], scales, row_scales + row * 4)
                    if bias:
                        _add_bias(block, count, shift, bias, bias_stride, row, out_h * out_w, c_out, panel, gated)
                    if gated:
                        _gate(block, count, gates.ctypes.data)
                    elif function:
                        activate(block, count * WIDTH, function)
                    _write(
                        block, count, wide, out + (row * out_columns + panel * panel_columns) * 4, out_columns * 4, how
                    )
            task = next_task(counter)
        fence()

    return work


_work = _make_work(_pack_floats, product_rows, _begin_floats, _settle_floats)
_work_pairs = _make_work(_pack_pairs, product_pairs, _begin_pairs, _settle_pairs)
_work_bytes = _make_work(_pack_bytes, product_bytes, _begin_bytes, _settle_bytes)


# Each kernel convolves x with a weight: with `panels` if that is an address, else with w, which a worker packs into
# its part of `buffers`. The weight covers `channels` of the input channels, from where `w` or `panels` points to:
# `columns` values of rows `row_bytes` apart, or panels `panel_stride` apart. `down`, `rank` and `up` are the low-rank
# update of w, if there is one. A task takes up to `group` panels, which lie `panel_bytes` apart in a worker's buffer.
# In bfloat16 and int8, a channel is a word of two or four values, and there is one tap; in int8, each row of x has
# its own scale.
_multiply = task_kernel("multiply", 41, _work)
_multiply_pairs = task_kernel("multiply_pairs", 41, _work_pairs, "bf16")
_multiply_bytes = task_kernel("multiply_bytes", 41, _work_bytes, "int8")


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
    precision: str = "f32",
) -> None:
    """Convolve x (..., c_in) with w into out (..., c_out); every argument has been checked by the caller.

    Parameters
    ----------
    x, out : ndarray
        Float32, C-contiguous, channels last.
    w : ndarray, QuantizedWeight, AdaptedWeight or PackedWeight
        ``(c_out, c_in, kh, kw)`` or ``(n, k)`` as stored, or packed for this precision.
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
        Whether ReLU is applied to the result, after what is added to it.
    precision : str
        Precision of the products; ``bf16`` and ``int8`` are for linear layers only. ``int8`` needs a QuantizedWeight,
        neither supports an update, and `first` must be at the start of a word.
    """
    g, channels, c_out, gated = geometry, words_of(x.shape[-1], precision), w.shape[0], activation == "geglu"
    taps, workers, panels, chunk = g.kh * g.kw, threads(), panel_count(c_out, gated), chunk_size(channels, g.kh * g.kw)
    panel_floats = taps * channels * WIDTH
    *blocks, group = _plan(g.images * g.out_h * g.out_w, panels, panel_floats * 4, isinstance(w, PackedWeight))
    where, kind, scales = stored_address(w, first)
    weight = where, kind, scales, x.shape[-1] * taps, w.shape[1] * taps * stored_size(kind)
    update, offsets, buffers = (0, 0, 0), 0, 0
    if isinstance(w, PackedWeight):
        all_words = words_of(w.shape[1], precision)
        packed = address(w.panels) + first // GROUPS[precision] * STRIDE, all_words * taps * STRIDE
    else:
        packed = 0, 0
        buffers = address(scratch.take("weights", workers * group * panel_floats))
        if precision == "f32":
            update, offsets = update_address(w, first), address(pack_offsets(channels, taps))
    if precision == "f32":
        source, row_scales, launch, blank = address(x), 0, _multiply, zeros(channels)
    else:
        launch, blank = _LOW[precision], zero_words(channels, precision)
        source, row_scales = as_words(x, precision)
    launch(
        source, address(blank), g.height, g.width, channels, g.kh, g.kw, g.stride, g.top, g.left, g.enlarge,
        *weight, *packed, chunk, offsets, *update,
        address(out), g.images, g.out_h, g.out_w, c_out,
        *bias_address(bias), int(gated), 0 if gated or activation is None else FUNCTIONS[activation],
        write_mode(out, accumulate, relu),
        *blocks, panels, group, buffers, panel_floats * 4, row_scales, workers,
    )  # fmt: skip


_LOW = {"bf16": _multiply_pairs, "int8": _multiply_bytes}


def bias_address(bias: np.ndarray | None) -> tuple[int, int]:
    """Return a bias's address and the bytes from an image's to the next one's; zeros for none."""
    if bias is None:
        return 0, 0
    return address(bias), 0 if bias.ndim == 1 else bias.shape[1] * 4


@lru_cache(maxsize=8)
def zeros(floats: int) -> np.ndarray:
    """A row of zeros: the pixel that padding reads."""
    return np.zeros(floats, np.float32)
