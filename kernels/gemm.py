"""Matrix products: packed weight panels, a register micro-kernel, and the driver that convolution shares.

One driver serves linear layers and direct convolutions, because a linear layer is a 1x1 convolution:

    out[pixel, o] = sum over taps and channels of x[pixel moved by tap, channel] * w[o, channel, tap]

- *Weights* are packed into panels of ``WIDTH`` output channels: ``[panel][chunk][tap][channel][WIDTH]``, float32.
  A chunk is a few hundred channels, so that a panel's chunk and a block of inputs stay in the L2 cache.
  Weights that are not packed beforehand (as stored: ``(c_out, c_in, kh, kw)`` in float32, float16 or bfloat16) are
  packed by the thread that is about to use them, chunk by chunk into a buffer of its own, by transposing
  ``LANES x LANES`` blocks in registers; that costs little if the chunk then meets a few hundred rows of input.
- *Inputs* are never packed: the micro-kernel takes a table of row addresses. Padding is a row of zeros, strides and
  nearest-neighbour enlargement are other addresses, so they cost nothing.
- *The micro-kernel* adds the product of 6 (then 4, then 1) input rows and a panel to the output, which holds the bias
  or whatever the result is to be added to. Each output is summed in one order, whatever the blocking and the threads.

The blocking follows Goto and van de Geijn, "Anatomy of high-performance matrix multiplication" (2008).
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numba import carray, prange

from kernels import isa
from kernels.arrays import address, check_array, check_shape, check_weight, output
from kernels.jit import inline, kernel, threads
from kernels.simd import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    LANES,
    byte_pointer,
    float_pointer,
    int_pointer,
    load_transposed,
    next_task,
    row_addresses,
    tile_add,
    tile_fma,
    tile_load,
    tile_scatter,
    tile_store,
    tile_zero,
)

VECTORS = isa.tile().vectors
WIDTH = isa.tile().width
_CHUNK = 384  # channels of a chunk, at most
_CHUNK_COLUMNS = 3072  # channels times taps of a chunk, at most: 768 KB of weights for 64 outputs
_GROUP = max(1, 64 // WIDTH)  # panels of a task
_ROWS = 96  # output pixels whose inputs are used for all taps and panels of a task while they are in cache
_PACK_ROWS = 2048  # output pixels for which a task packs weights


# --- micro-kernels ----------------------------------------------------------------------------------------------------


def make_product(rows: int, vectors: int):
    """Make the micro-kernel ``out[rows, vectors * LANES] += a[rows, depth] @ b[depth, vectors * LANES]``.

    Its arguments are the address of a table of row addresses of a, a byte offset to add to each of them, the address
    of b and the byte stride of its rows, the address of out and the byte stride of its rows, depth, and whether to
    overwrite out instead of adding to it.
    """

    @inline
    def product(table, offset, b, b_stride, out, out_stride, depth, fresh):
        addresses = row_addresses(table, rows)
        acc = tile_zero(rows, vectors)
        for _ in range(depth // 2):
            acc = tile_fma(acc, addresses, offset, b)
            acc = tile_fma(acc, addresses, offset + 4, b + b_stride)
            offset += 8
            b += 2 * b_stride
        if depth % 2:
            acc = tile_fma(acc, addresses, offset, b)
        if not fresh:  # added last: a sum of the sums of chunks loses fewer digits than one long sum
            acc = tile_add(acc, tile_load(out, out_stride, rows, vectors))
        tile_store(acc, out, out_stride)

    return product


_product6 = make_product(6, VECTORS)
_product4 = make_product(4, VECTORS)
_product1 = make_product(1, VECTORS)


@inline
def product_rows(table, offset, panel, out, out_stride, rows, depth):
    """Add the product of any number of rows and one panel: sixes, then fours, then single rows."""
    i = 0
    while rows - i >= 6 and rows - i != 8:
        _product6(table + 8 * i, offset, panel, WIDTH * 4, out + i * out_stride, out_stride, depth, False)
        i += 6
    while rows - i >= 4:
        _product4(table + 8 * i, offset, panel, WIDTH * 4, out + i * out_stride, out_stride, depth, False)
        i += 4
    while i < rows:
        _product1(table + 8 * i, offset, panel, WIDTH * 4, out + i * out_stride, out_stride, depth, False)
        i += 1


# --- packing ----------------------------------------------------------------------------------------------------------


@inline
def _copy_block(source, stride, rows, row_bytes, block, block_stride):
    """Copy a partial block, byte by byte, into a zeroed one."""
    for i in range(rows):
        row = carray(byte_pointer(source + i * stride), row_bytes)
        copy = carray(byte_pointer(block + i * block_stride), row_bytes)
        for j in range(row_bytes):
            copy[j] = row[j]


@inline
def _pack_block(source, stride, kind, table, target):
    if kind == FLOAT32:
        tile_scatter(load_transposed(source, stride, FLOAT32), table, target)
    elif kind == FLOAT16:
        tile_scatter(load_transposed(source, stride, FLOAT16), table, target)
    else:
        tile_scatter(load_transposed(source, stride, BFLOAT16), table, target)


@inline
def pack_columns(source, stride, kind, rows, columns, offsets, target):
    """Transpose up to ``LANES`` rows of stored weights; column k goes to the address ``target + offsets[k]``."""
    size = 4 if kind == FLOAT32 else 2
    block = np.empty(LANES * LANES, np.float32)
    spill = np.empty(LANES * LANES, np.float32)
    table = np.empty(LANES, np.int64)
    for k in range(0, columns, LANES):
        valid = min(LANES, columns - k)
        if rows == LANES and valid == LANES:
            _pack_block(source + k * size, stride, kind, offsets + 8 * k, target)
        else:
            block[:] = 0
            _copy_block(source + k * size, stride, rows, valid * size, block.ctypes.data, LANES * size)
            where = carray(int_pointer(offsets + 8 * k), valid)
            for i in range(valid):
                table[i] = where[i]
            for i in range(valid, LANES):
                table[i] = spill.ctypes.data - target + i * LANES * 4
            _pack_block(block.ctypes.data, LANES * size, kind, table.ctypes.data, target)


@inline
def _pack_panel(w, kind, c_out, columns, first, count, offsets, panel, target):
    """Pack `count` of the columns of w (c_out, columns), from the first on, of one panel."""
    size = 4 if kind == FLOAT32 else 2
    for j in range(VECTORS):
        o = panel * WIDTH + j * LANES
        source = w + (o * columns + first) * size
        rows = max(0, min(LANES, c_out - o))
        pack_columns(source, columns * size, kind, rows, count, offsets, target + j * LANES * 4)


@kernel(8)
def _pack(w, kind, c_out, columns, offsets, panels, panel_bytes, panel_count):
    """Pack all of w (c_out, columns); ``offsets[k]`` is column k's place in a panel."""
    for panel in prange(panel_count):
        _pack_panel(w, kind, c_out, columns, 0, columns, offsets, panel, panels + panel * panel_bytes)


@kernel(6)
def _pack_transposed(b, depth, columns, stride, panels, panel_count):
    """Pack b (depth, columns), whose rows are `stride` bytes apart, as a weight that is stored the other way round."""
    for panel in prange(panel_count):
        valid = min(WIDTH, columns - panel * WIDTH)
        for k in range(depth):
            source = carray(float_pointer(b + k * stride + panel * WIDTH * 4), valid)
            target = carray(float_pointer(panels + (panel * depth + k) * WIDTH * 4), WIDTH)
            for j in range(valid):
                target[j] = source[j]
            for j in range(valid, WIDTH):
                target[j] = 0


# --- the driver -------------------------------------------------------------------------------------------------------


@inline
def _prepare(out, stride, rows, columns, bias, bias_stride, row0, image_rows, add):
    """Set (or, with `add`, raise) a block of outputs to the bias of its image."""
    for i in range(rows):
        target = carray(float_pointer(out + i * stride), columns)
        if bias:
            source = carray(float_pointer(bias + (row0 + i) // image_rows * bias_stride), columns)
            if add:
                for j in range(columns):
                    target[j] += source[j]
            else:
                for j in range(columns):
                    target[j] = source[j]
        elif not add:
            for j in range(columns):
                target[j] = 0


@inline
def _copy_rows(source, source_stride, target, target_stride, rows, columns):
    for i in range(rows):
        a = carray(float_pointer(source + i * source_stride), columns)
        b = carray(float_pointer(target + i * target_stride), columns)
        for j in range(columns):
            b[j] = a[j]


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


@kernel(31)
def _multiply(
    x, zeros, height, width, channels, kh, kw, stride, top, left, enlarge,
    w, kind, panels, chunk, offsets, last_offsets,
    out, images, out_h, out_w, c_out, bias, bias_stride, add,
    row_block, row_blocks, group, groups, buffers, workers,
):  # fmt: skip
    """Convolve x with a weight: with `panels` if that is an address, else with w, packed into `buffers` as needed.

    A task is a block of rows (output pixels) and a group of panels.
    """
    taps, pixels, out_stride = kh * kw, images * out_h * out_w, c_out * 4
    counter = np.zeros(1, np.int64)
    for worker in prange(workers):
        buffer = buffers + worker * group * taps * chunk * WIDTH * 4
        table = np.empty(_ROWS + 1, np.int64)
        edge = np.empty((row_block if c_out % WIDTH else 1, WIDTH), np.float32)
        task = next_task(counter.ctypes.data)
        while task < row_blocks * groups:
            row0 = task // groups * row_block
            rows = min(row_block, pixels - row0)
            p0 = task % groups * group
            p1 = min(p0 + group, (c_out + WIDTH - 1) // WIDTH)
            target = out + row0 * out_stride
            columns = min(p1 * WIDTH, c_out) - p0 * WIDTH
            where = bias + p0 * WIDTH * 4 if bias else 0
            _prepare(target + p0 * WIDTH * 4, out_stride, rows, columns, where, bias_stride, row0, out_h * out_w, add)
            cut = c_out % WIDTH if p1 * WIDTH > c_out else 0  # columns of a last panel that is computed aside
            aside = target + (p1 - 1) * WIDTH * 4
            _copy_rows(aside, out_stride, edge.ctypes.data, WIDTH * 4, rows if cut else 0, cut)
            blocks = (rows + _ROWS - 1) // _ROWS
            block = (rows + blocks - 1) // blocks
            block += block % 2  # any even number of rows from 4 on is made of sixes and fours
            for c in range(0, channels, chunk):
                depth = min(chunk, channels - c)
                if panels:
                    panel_bytes = channels * taps * WIDTH * 4
                    source = panels + p0 * panel_bytes + c * taps * WIDTH * 4
                else:
                    panel_bytes = depth * taps * WIDTH * 4
                    source = buffer
                    places = offsets if depth == chunk else last_offsets
                    for p in range(p0, p1):
                        _pack_panel(
                            w, kind, c_out, channels * taps, c * taps, depth * taps, places, p,
                            buffer + (p - p0) * panel_bytes,
                        )  # fmt: skip
                for row in range(0, rows, block):
                    count = min(block, rows - row)
                    for tap in range(taps):
                        _address_rows(
                            table, x, zeros, height, width, channels * 4, row0 + row, count, out_h, out_w, stride,
                            tap // kw - top, tap % kw - left, enlarge,
                        )  # fmt: skip
                        for p in range(p0, p1):
                            result, result_stride = target + row * out_stride + p * WIDTH * 4, out_stride
                            if cut and p == p1 - 1:
                                result, result_stride = edge.ctypes.data + row * WIDTH * 4, WIDTH * 4
                            weights = source + (p - p0) * panel_bytes + tap * depth * WIDTH * 4
                            product_rows(table.ctypes.data, c * 4, weights, result, result_stride, count, depth)
            _copy_rows(edge.ctypes.data, WIDTH * 4, aside, out_stride, rows if cut else 0, cut)
            task = next_task(counter.ctypes.data)


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


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight in panels of ``WIDTH`` output channels, accepted wherever a kernel takes a weight.

    Attributes
    ----------
    panels : ndarray
        Float32, 64-byte aligned.
    stored : ndarray
        The weight that was packed, ``(c_out, c_in, kh, kw)`` or ``(n, k)``.
    """

    panels: np.ndarray
    stored: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that was packed."""
        return self.stored.shape

    @property
    def nbytes(self) -> int:
        """Bytes of memory it holds."""
        return self.panels.nbytes


def chunk_size(channels: int, taps: int) -> int:
    """Return how many input channels a chunk has: as equal as possible, small enough for the cache."""
    most = max(1, min(_CHUNK, _CHUNK_COLUMNS // taps))
    return math.ceil(channels / math.ceil(channels / most))


class _Scratch(threading.local):
    """Buffers of a thread, by use, that grow to what was asked for and are used again."""

    def __init__(self) -> None:
        self._buffers: dict[str, np.ndarray] = {}

    def take(self, use: str, floats: int) -> np.ndarray:
        """Return a float32 vector of at least `floats`, whose contents are what the last user left."""
        buffer = self._buffers.get(use)
        if buffer is None or buffer.size < floats:
            buffer = self._buffers[use] = aligned(floats)
        return buffer


scratch = _Scratch()


def aligned(floats: int) -> np.ndarray:
    """Return an uninitialised float32 vector that starts on a cache line."""
    raw = np.empty(floats * 4 + 64, np.uint8)
    start = -address(raw) % 64
    return raw[start : start + floats * 4].view(np.float32)


@lru_cache(maxsize=256)
def pack_offsets(channels: int, taps: int, chunk: int) -> np.ndarray:
    """Byte offsets in a panel to which `channels * taps` stored columns go (int64)."""
    c, tap = np.divmod(np.arange(channels * taps), taps)
    start = c // chunk * chunk
    depth = np.minimum(chunk, channels - start)
    return (start * taps + tap * depth + c - start) * (WIDTH * 4)


def pack(w: np.ndarray) -> PackedWeight:
    """Pack a whole stored weight, (n, k) or (c_out, c_in, kh, kw)."""
    (c_out, channels), taps = w.shape[:2], math.prod(w.shape[2:])
    count = math.ceil(c_out / WIDTH)
    panels = aligned(count * WIDTH * channels * taps)
    offsets = pack_offsets(channels, taps, chunk_size(channels, taps))
    _pack(
        address(w), check_weight("w", w, w.ndim), c_out, channels * taps, address(offsets),
        address(panels), channels * taps * WIDTH * 4, count,
    )  # fmt: skip
    return PackedWeight(panels, w)


def _split(pixels: int, groups: int, packed: bool) -> tuple[int, int]:
    """Return (row_block, row_blocks): enough tasks for the threads, and rows enough to make packing worth while."""
    least = math.ceil(4 * threads() / groups)
    row_blocks = max(math.ceil(pixels / (_ROWS if packed else _PACK_ROWS)), min(least, math.ceil(pixels / _ROWS)))
    row_block = math.ceil(pixels / row_blocks)
    row_block += row_block % 2
    return row_block, math.ceil(pixels / row_block)


def multiply(
    x: np.ndarray,
    w: np.ndarray | PackedWeight,
    bias: np.ndarray | None,
    out: np.ndarray,
    geometry: Geometry,
    accumulate: bool,
) -> None:
    """Convolve x (..., c_in) with w into out (..., c_out); every argument has been checked by the caller.

    Parameters
    ----------
    x, out : ndarray
        Float32, C-contiguous, channels last.
    w : ndarray or PackedWeight
        ``(c_out, c_in, kh, kw)`` or ``(n, k)`` as stored, or packed.
    bias : ndarray or None
        Float32 ``(c_out,)``, or ``(images, c_out)`` for one row an image.
    geometry : Geometry
        Which input pixels make which output pixel.
    accumulate : bool
        Add to what out holds instead of overwriting it.
    """
    g, channels, c_out = geometry, x.shape[-1], out.shape[-1]
    taps, workers = g.kh * g.kw, threads()
    chunk = chunk_size(channels, taps)
    groups = math.ceil(c_out / (WIDTH * _GROUP))
    buffers = 0
    if isinstance(w, PackedWeight):
        weight = 0, 0, address(w.panels), chunk, 0, 0
    else:
        offsets, last_offsets = pack_offsets(chunk, taps, chunk), pack_offsets(channels % chunk or chunk, taps, chunk)
        weight = address(w), check_weight("w", w, w.ndim), 0, chunk, address(offsets), address(last_offsets)
        buffers = address(scratch.take("weights", workers * _GROUP * taps * chunk * WIDTH))
    blank = zeros(channels)
    _multiply(
        address(x), address(blank), g.height, g.width, channels, g.kh, g.kw, g.stride, g.top, g.left, g.enlarge,
        *weight,
        address(out), g.images, g.out_h, g.out_w, c_out,
        *bias_address(bias), int(accumulate),
        *_split(g.images * g.out_h * g.out_w, groups, isinstance(w, PackedWeight)), _GROUP, groups, buffers, workers,
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


def pack_linear(w: np.ndarray) -> PackedWeight:
    """Pack the weight of a linear layer once, for many calls of `linear`.

    Parameters
    ----------
    w : ndarray
        ``(n, k)``, float32, float16, or uint16 that holds bfloat16 bits.

    Returns
    -------
    PackedWeight
        Float32 panels, about ``4 * n * k`` bytes.

    Raises
    ------
    TypeError, ValueError
        If w is not such an array.
    """
    check_weight("w", w, 2)
    return pack(w)


def linear(
    x: np.ndarray,
    w: np.ndarray | PackedWeight,
    b: np.ndarray | None = None,
    *,
    out: np.ndarray | None = None,
    accumulate: bool = False,
) -> np.ndarray:
    """Linear layer: ``x @ w.T + b``.

    Parameters
    ----------
    x : ndarray
        Float32 ``(..., k)``, C-contiguous.
    w : ndarray or PackedWeight
        ``(n, k)`` as checkpoints store it: float32, float16, or uint16 that holds bfloat16 bits.
    b : ndarray, optional
        Float32 ``(n,)``.
    out : ndarray, optional
        Float32 ``(..., n)`` to write to.
    accumulate : bool
        Add to what `out` holds (a residual) instead of overwriting it.

    Returns
    -------
    ndarray
        Float32 ``(..., n)``.

    Raises
    ------
    TypeError, ValueError
        If a dtype, shape or layout is not as above.
    """
    check_array("x", x)
    if not isinstance(w, PackedWeight):
        check_weight("w", w, 2)
    if len(w.shape) != 2 or w.shape[1] != x.shape[-1]:
        raise ValueError(f"w: found shape {w.shape} for x {x.shape}, expected (n, {x.shape[-1]})")
    n = w.shape[0]
    if b is not None:
        check_shape("b", b, (n,))
    out = result(out, (*x.shape[:-1], n), accumulate, x, w, b)
    rows = math.prod(x.shape[:-1])
    if out.size:
        multiply(x, w, b, out, Geometry(1, rows, 1, rows, 1), accumulate)
    return out


def result(
    out: np.ndarray | None,
    shape: tuple[int, ...],
    accumulate: bool,
    x: np.ndarray,
    w: np.ndarray | PackedWeight,
    b: np.ndarray | None,
) -> np.ndarray:
    """Return the array to write to: `out`, checked, or a new one."""
    if accumulate and out is None:
        raise ValueError("out: found None, expected the array to add to, because accumulate is true")
    return output(out, shape, x, w.panels if isinstance(w, PackedWeight) else w, b)


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
    (depth, columns), count = b.shape, math.ceil(b.shape[1] / WIDTH)
    out = output(out, (a.shape[0], columns), a, b)
    if not depth:
        out[...] = 0
    elif out.size:
        panels = scratch.take("matmul", count * depth * WIDTH)
        _pack_transposed(address(b), depth, columns, columns * 4, address(panels), count)
        packed = PackedWeight(panels, b.T)
        multiply(a, packed, None, out, Geometry(1, a.shape[0], 1, a.shape[0], 1), False)
    return out
