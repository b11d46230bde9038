"""Convolution with 3x3 filters and stride 1 by minimal filtering.

A tile of 6x6 inputs and a 3x3 filter, both transformed, are multiplied element by element and summed over the
channels; transforming back gives 4x4 outputs, with 36 products instead of 144 (Winograd 1980; Lavin and Gray,
arXiv:1509.09308). Tiles of 4x4 inputs give 2x2 outputs with 16 products instead of 36. If the image is enlarged 2x by
nearest neighbour first, 100 products give 8x8 outputs, instead of 576: `kernels.transforms` tells how. The sums over
channels are matrix products, one for each *part* of the transforms, done by the micro-kernel of `kernels.product`.

1. Inputs: for a batch of tiles, as many as fit the shared cache, all threads write the transformed tiles as
   ``[block][chunk][part][tile][channel]``. Padding and enlargement are addresses, as in the direct convolution.
2. A task is a panel of output channels and a range of blocks of tiles. Its thread transforms filters into a buffer of
   its own, multiplies, transforms the sums back, adds the bias and stores. Large images have tiles enough to pay for
   the filters of all channels; for small ones the filters of one chunk of channels are transformed and used at a time,
   in the L2 cache, while the stored filters of the next chunk are fetched.

Transformed filters are up to eleven times as large as stored ones: making them again for each batch is cheaper than to
keep them. The parts of each buffer lie a little more than a multiple of 4 KB apart: at multiples they would compete for
the same lines of the cache.

Convolutions between few channels have it easier: transformed filters of all of them fit the L2 cache, beside the inputs
and sums of a small block of tiles, so each thread does all the steps for a block at a time.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import numpy as np
from numba import carray, prange

from kernels import isa
from kernels.arrays import ADD, address, check_weight, manner
from kernels.gemm import Geometry, bias_address, zeros
from kernels.jit import inline, kernel, threads
from kernels.memory import scratch
from kernels.packing import AdaptedWeight, pack_columns, stored_size, update_address, update_columns, without_update
from kernels.product import SIX, STRIDE, VECTORS, WIDTH, product_rows
from kernels.simd import (
    LANES,
    fence,
    float_pointer,
    next_task,
    prefetch,
)
from kernels.transforms import finish_vector, transform_filter, transform_input

_TILES = 24  # tiles of a block: the sums of its 36 parts, 64 channels each, are 216 KB
_CHUNK = 320  # channels of a chunk, at most, if all filters of a panel are transformed at once
_SMALL_CHUNK = 48  # and if not: 36 * 48 * 64 floats are 432 KB
_NARROW_TILES = 12  # tiles of a block if all filters fit the L2 cache
_NARROW = 640 << 10  # bytes of them up to which they do, of 1 MB
_FEW = 36  # tiles of an image up to which that is so
_BATCH = min(28 << 20, isa.shared_cache() * 7 // 8)  # bytes of transformed inputs at a time
# Algorithm -> outputs of a tile a side, taps a side, and the cost of transforming a vector of filters.
FORMS = {"winograd2": (2, 3, 90), "winograd4": (4, 3, 170), "winograd_up": (4, 2, 140)}


@inline
def _tile_rows(
    table, x, skip, height, width, pixel_bytes, tile, tiles_h, tiles_w, size, step, top, left, enlarge, spread
):
    """Fill the table with the addresses of the `size x size` pixels of a tile; `skip` for those outside.

    Tiles begin every `step` pixels of the image enlarged by 2**enlarge, of which only every `spread`-th row and column
    counts.
    """
    image, rest = tile // (tiles_h * tiles_w), tile % (tiles_h * tiles_w)
    y0, x0 = rest // tiles_w * step * spread - top, rest % tiles_w * step * spread - left
    for i in range(size):
        for j in range(size):
            y, c = y0 + i * spread, x0 + j * spread
            if 0 <= y < (height << enlarge) and 0 <= c < (width << enlarge):
                row = (image * height + (y >> enlarge)) * width + (c >> enlarge)
                table[i * size + j] = x + row * pixel_bytes
            else:
                table[i * size + j] = skip


@inline
def _whole(channels):
    """Round a number of channels up to whole vectors."""
    return (channels + LANES - 1) // LANES * LANES


@inline
def _input_start(channels, chunk, first, c, count, parts):
    """Where in the transformed inputs, in floats, the chunk at channel c begins of the block of tiles from first on."""
    chunks = (channels + chunk - 1) // chunk
    pads = first // _TILES * chunks + c // chunk  # each chunk before has a vector of padding in each part
    return parts * (first * _whole(channels) + c * count + pads * LANES)


@inline
def _copy_channels(table, offset, channels, copies, count):
    """Copy the last few channels of each pixel of a tile to vectors of `copies`, and put those into its last column."""
    for i in range(count):
        source = carray(float_pointer(table[i] + offset), channels)
        for j in range(channels):
            copies[i, j] = source[j]


@inline
def _transform_tile(table, copies, copy_table, first, last, target, stride, step, taps, next_tile):
    """Transform the channels first .. last of the tile whose pixels are in the table; the next is so many bytes on."""
    size = step + taps - 1
    for c in range(first, last, LANES):
        if last - c < LANES:
            _copy_channels(table, c * 4, last - c, copies, size * size)
            transform_input(copy_table.ctypes.data, 0, target, stride, step, taps)
        else:
            for i in range(0, size * size, size):  # fetch the columns that the next tile does not share
                for j in range(taps - 1, size):
                    prefetch(table[i + j] + c * 4 + next_tile)
            transform_input(table.ctypes.data, c * 4, target, stride, step, taps)
        target += LANES * 4


@kernel(17)
def _transform_inputs(
    x, blank, height, width, channels, top, left, enlarge, tiles_h, tiles_w, tile0, tiles, step, taps, v, chunk, workers
):
    """Transform the input tiles tile0 .. tile0 + tiles."""
    size = step + taps - 1
    parts = size * size
    next_tile = (step >> enlarge) * channels * 4
    counter = np.zeros(1, np.int64)
    for _ in prange(workers):
        table = np.empty(36, np.int64)
        copies = np.zeros((36, LANES), np.float32)
        copy_table = np.empty(36, np.int64)
        for i in range(36):
            copy_table[i] = copies.ctypes.data + i * LANES * 4
        t = next_task(counter.ctypes.data)
        while t < tiles:
            _tile_rows(
                table, x, blank, height, width, channels * 4, tile0 + t,
                tiles_h, tiles_w, size, step, top, left, enlarge, 1,
            )  # fmt: skip
            first = t // _TILES * _TILES
            count = min(_TILES, tiles - first)
            for c in range(0, channels, chunk):
                depth = _whole(min(chunk, channels - c))
                start = _input_start(channels, chunk, first, c, count, parts) + (t - first) * depth
                _transform_tile(
                    table, copies, copy_table, c, min(c + chunk, channels), v + start * 4, (count * depth + LANES) * 4,
                    step, taps, next_tile,
                )  # fmt: skip
            t = next_task(counter.ctypes.data)


@inline
def _transform_filters(
    w, kind, c_out, channels, down, rank, up, first, depth, offsets, panel, table, spare, packed, filters,
    step, taps, below, right,
):  # fmt: skip
    """Transform the filters of a panel and the channels first .. first + depth, as [part][depth][WIDTH]."""
    size = stored_size(kind)
    stride = (depth + 1) * STRIDE
    for j in range(VECTORS):
        o = panel * WIDTH + j * LANES
        rows = max(0, min(LANES, c_out - o))
        for c0 in range(0, depth, _SMALL_CHUNK):  # what is packed stays in the L1 cache
            some = min(_SMALL_CHUNK, depth - c0)
            source = w + (o * channels + first + c0) * 9 * size
            pack_columns(source, channels * 9 * size, kind, rows, some * 9, offsets, packed)
            if rank and rows:
                up_vector = up + (panel * rank * WIDTH + j * LANES) * 4
                update_columns(down + (first + c0) * 9 * rank * 4, rank, up_vector, some * 9, table, spare, packed)
            for c in range(some):
                target = filters + (c0 + c) * STRIDE + j * LANES * 4
                transform_filter(packed + c * 9 * LANES * 4, 3 * LANES * 4, target, stride, step, taps, below, right)


@inline
def _fetch_filters(w, size, c_out, channels, first, depth, panel, part, parts):
    """Bring the part-th of `parts` shares of a panel's stored filters, for `depth` channels, into the cache."""
    o = panel * WIDTH
    rows = min(WIDTH, c_out - o)
    for row in range(rows * part // parts, rows * (part + 1) // parts):
        start = w + ((o + row) * channels + first) * 9 * size
        for line in range(0, depth * 9 * size, 64):
            prefetch(start + line)


@inline
def _finish_tile(sums, stride, table, copies, copy_table, bias, shift, column, c_out, step, taps, spread, how):
    """Transform back the sums of one tile, add a bias and write; channels fewer than a vector by way of copies."""
    for c in range(column, min(column + WIDTH, c_out), LANES):
        valid = min(LANES, c_out - c)
        if how & ADD:
            for i in range(step * step):
                prefetch(table[i] + (step * spread * c_out + c) * 4)  # the pixels of the next tile
        if bias:
            source = carray(float_pointer(bias + c * 4), valid)
            for i in range(valid):
                shift[i] = source[i]
        where = sums + (c - column) * 4
        if valid == LANES:
            finish_vector(where, stride, table.ctypes.data, c * 4, shift.ctypes.data, step, taps, how)
        else:
            if how & ADD:
                _copy_channels(table, c * 4, valid, copies, step * step)
            finish_vector(where, stride, copy_table.ctypes.data, 0, shift.ctypes.data, step, taps, how)
            for i in range(step * step):
                target = carray(float_pointer(table[i] + c * 4), valid)
                for j in range(valid):
                    target[j] = copies[i, j]


@kernel(35)
def _multiply_tiles(
    v, channels, chunk, tile0, tiles, step, taps, w, kind, offsets, down, rank, up, below, right,
    out, out_h, out_w, c_out, bias, bias_stride, how, tiles_h, tiles_w, spread, phase_y, phase_x,
    panels, splits, spill, filters_bytes, sums_bytes, buffers, buffer_bytes, workers,
):  # fmt: skip
    """Multiply transformed inputs and filters, transform back, store.

    A task is a panel and one of `splits` ranges of blocks. Filters of a chunk of channels are transformed at a time;
    unless that is all of them, the sums of all blocks of the task are kept until the last ones have been added. The
    outputs are every `spread`-th row and column from (phase_y, phase_x) on.
    """
    parts = (step + taps - 1) * (step + taps - 1)
    block_rows = (min(_TILES, tiles) + SIX - 1) // SIX * SIX + 1
    blocks = (tiles + _TILES - 1) // _TILES
    weight_size = stored_size(kind)
    counter = np.zeros(1, np.int64)
    for worker in prange(workers):
        filters = buffers + worker * buffer_bytes
        all_sums = filters + filters_bytes
        packed = all_sums + sums_bytes
        rows = np.empty(_TILES + SIX, np.int64)
        spare = np.empty(SIX * WIDTH, np.float32)
        table = np.empty(16, np.int64)
        shift = np.zeros(LANES, np.float32)
        copies = np.zeros((16, LANES), np.float32)
        copy_table = np.empty(16, np.int64)
        for i in range(16):
            copy_table[i] = copies.ctypes.data + i * LANES * 4
        task = next_task(counter.ctypes.data)
        while task < panels * splits:
            following = task + workers  # probably
            panel, split = task % panels, task // panels
            first_block, last_block = blocks * split // splits, blocks * (split + 1) // splits
            column = panel * WIDTH
            vectors = (min(WIDTH, c_out - column) + LANES - 1) // LANES
            for c in range(0, channels, chunk):
                depth = min(chunk, channels - c)
                row_floats = _whole(depth)
                _transform_filters(
                    w, kind, c_out, channels, down, rank, up, c, depth, offsets, panel, rows, spare.ctypes.data,
                    packed, filters, step, taps, below, right,
                )  # fmt: skip
                next_panel, next_c = panel, c + chunk
                if next_c >= channels:
                    next_panel, next_c = following % panels, 0
                fetch = next_c > 0 or following < panels * splits
                for block in range(first_block, last_block):
                    first = block * _TILES
                    count = min(_TILES, tiles - first)
                    start = _input_start(channels, chunk, first, c, count, parts)
                    for t in range(count + SIX):
                        rows[t] = v + (start + min(t, count - 1) * row_floats) * 4
                    part_stride = (count * row_floats + LANES) * 4
                    sums = all_sums
                    if chunk < channels:
                        sums += (block - first_block) * parts * block_rows * STRIDE
                    for part in range(parts):
                        if fetch and block == first_block:
                            _fetch_filters(
                                w, weight_size, c_out, channels, next_c, min(chunk, channels - next_c), next_panel,
                                part, parts,
                            )  # fmt: skip
                        part_rows, part_filters = part * part_stride, filters + part * (depth + 1) * STRIDE
                        ahead = part_filters + (depth + 1) * STRIDE
                        product_rows(
                            rows.ctypes.data, part_rows, 4, part_filters, sums + part * block_rows * STRIDE,
                            count, depth, vectors, c == 0, ahead, 64, rows[0] + part_rows + part_stride - ahead,
                        )  # fmt: skip
                    if c + chunk >= channels:
                        for t in range(count):
                            tile = tile0 + first + t
                            _tile_rows(
                                table, out, spill, out_h, out_w, c_out * 4, tile, tiles_h, tiles_w,
                                step, step, -phase_y, -phase_x, 0, spread,
                            )  # fmt: skip
                            image_bias = bias + tile // (tiles_h * tiles_w) * bias_stride if bias else 0
                            _finish_tile(
                                sums + t * STRIDE, block_rows * STRIDE, table, copies, copy_table,
                                image_bias, shift, column, c_out, step, taps, spread, how,
                            )  # fmt: skip
            task = next_task(counter.ctypes.data)
        fence()


@kernel(39)
def _convolve_tiles(
    x, blank, height, width, channels, top, left, enlarge, tiles_h, tiles_w, tiles, step, taps,
    w, kind, offsets, down, rank, up, below, right,
    out, out_h, out_w, c_out, bias, bias_stride, how, spread, phase_y, phase_x,
    panels, spill, filters_bytes, inputs_bytes, sums_bytes, buffers, buffer_bytes, workers,
):  # fmt: skip
    """Do all the steps for a block of tiles at a time; arguments as those of the two kernels above."""
    parts = (step + taps - 1) * (step + taps - 1)
    block_rows = (_NARROW_TILES + SIX - 1) // SIX * SIX + 1
    depth = _whole(channels)
    part_filters = (channels + 1) * STRIDE
    counter = np.zeros(1, np.int64)
    for worker in prange(workers):
        filters = buffers + worker * buffer_bytes
        inputs = filters + filters_bytes
        sums = inputs + inputs_bytes
        packed = sums + sums_bytes
        table = np.empty(36, np.int64)
        rows = np.empty(_NARROW_TILES + SIX, np.int64)
        spare = np.empty(SIX * WIDTH, np.float32)
        shift = np.zeros(LANES, np.float32)
        copies = np.zeros((36, LANES), np.float32)
        copy_table = np.empty(36, np.int64)
        for i in range(36):
            copy_table[i] = copies.ctypes.data + i * LANES * 4
        for panel in range(panels):
            _transform_filters(
                w, kind, c_out, channels, down, rank, up, 0, channels, offsets, panel, rows, spare.ctypes.data,
                packed, filters + panel * parts * part_filters, step, taps, below, right,
            )  # fmt: skip
        first = next_task(counter.ctypes.data) * _NARROW_TILES
        while first < tiles:
            count = min(_NARROW_TILES, tiles - first)
            part_stride = (count * depth + LANES) * 4
            for t in range(count):
                _tile_rows(
                    table, x, blank, height, width, channels * 4, first + t,
                    tiles_h, tiles_w, step + taps - 1, step, top, left, enlarge, 1,
                )  # fmt: skip
                _transform_tile(
                    table, copies, copy_table, 0, channels, inputs + t * depth * 4, part_stride, step, taps,
                    (step >> enlarge) * channels * 4,
                )  # fmt: skip
            for t in range(count + SIX):
                rows[t] = inputs + min(t, count - 1) * depth * 4
            for panel in range(panels):
                column = panel * WIDTH
                vectors = (min(WIDTH, c_out - column) + LANES - 1) // LANES
                for part in range(parts):
                    product_rows(
                        rows.ctypes.data, part * part_stride, 4, filters + (panel * parts + part) * part_filters,
                        sums + part * block_rows * STRIDE, count, channels, vectors, True, 0, 0, 0,
                    )  # fmt: skip
                for t in range(count):
                    _tile_rows(
                        table, out, spill, out_h, out_w, c_out * 4, first + t, tiles_h, tiles_w,
                        step, step, -phase_y, -phase_x, 0, spread,
                    )  # fmt: skip
                    image_bias = bias + (first + t) // (tiles_h * tiles_w) * bias_stride if bias else 0
                    _finish_tile(
                        sums + t * STRIDE, block_rows * STRIDE, table, copies, copy_table,
                        image_bias, shift, column, c_out, step, taps, spread, how,
                    )  # fmt: skip
            first = next_task(counter.ctypes.data) * _NARROW_TILES
        fence()


def costs(channels: int, c_out: int, geometry: Geometry) -> dict[str, float]:
    """Estimate the cost of each algorithm that can do a convolution, by its name in `kernels.conv2d`.

    The unit is a multiplication of one vector, for each vector of filters. An image is looked at by itself, so that its
    result does not depend on how many come with it.
    """
    g = geometry
    estimates = {"direct": 1.05 * g.kh * g.kw * g.out_h * g.out_w + 15}
    if (g.kh, g.kw, g.stride) != (3, 3, 1):
        return estimates
    for name, (step, taps, filters) in FORMS.items():
        if taps == 2 and not g.enlarge:
            continue
        parts, spread = (step + taps - 1) ** 2, _spread(taps)
        tiles = math.ceil(g.out_h / spread / step) * math.ceil(g.out_w / spread / step)
        transforms = parts * (3 * LANES / min(c_out, 16 * LANES) + 2.5 * LANES / min(channels, 16 * LANES))
        estimates[name] = spread**2 * (filters + tiles * (1.15 * parts + transforms))
    return estimates


def _spread(taps: int) -> int:
    """Return how far apart the rows of a phase are: a form with two taps needs phases."""
    return 2 if taps == 2 else 1


def winograd(
    x: np.ndarray, w: np.ndarray | AdaptedWeight, bias: np.ndarray | None, out: np.ndarray, geometry: Geometry,
    accumulate: bool, relu: bool, algorithm: str,
) -> None:  # fmt: skip
    """Convolve x with 3x3 filters w as stored; arguments as those of `kernels.gemm.multiply`, all checked.

    `algorithm` is a key of `FORMS` that can do it.
    """
    spread = _spread(FORMS[algorithm][1])
    for phase in itertools.product(range(min(spread, geometry.out_h)), range(min(spread, geometry.out_w))):
        _convolve(x, w, bias, out, geometry, accumulate, relu, algorithm, phase)


def _convolve(
    x: np.ndarray, w: np.ndarray | AdaptedWeight, bias: np.ndarray | None, out: np.ndarray, geometry: Geometry,
    accumulate: bool, relu: bool, algorithm: str, phase: tuple[int, int],
) -> None:  # fmt: skip
    """Compute one phase of the outputs, or all of them if there are no phases."""
    g, channels, c_out, (step, taps, _) = geometry, x.shape[-1], out.shape[-1], FORMS[algorithm]
    parts, spread = (step + taps - 1) ** 2, _spread(taps)
    tiles_h, tiles_w = (
        math.ceil((side - first) / spread / step) for side, first in zip((g.out_h, g.out_w), phase, strict=True)
    )
    top, left, enlarge, merged = g.top, g.left, g.enlarge, (0, 0)
    if taps == 2:  # of the small image
        offsets = phase[0] - top, phase[1] - left  # of the first output's first tap, in the enlarged image
        top, left, enlarge, merged = -(offsets[0] // 2), -(offsets[1] // 2), 0, (offsets[0] % 2, offsets[1] % 2)
    tiles, panels, workers = g.images * tiles_h * tiles_w, math.ceil(c_out / WIDTH), threads()
    spill = address(scratch.take("spill", panels * WIDTH))
    blank, how = zeros(channels), manner(out, accumulate, relu)
    source = address(x), address(blank), g.height, g.width, channels, top, left, enlarge, tiles_h, tiles_w
    plain = without_update(w)
    weight = address(plain), check_weight("w", plain, 4), address(_tap_offsets()), *update_address(w), *merged
    target = address(out), g.out_h, g.out_w, c_out, *bias_address(bias), how
    few = tiles_h * tiles_w <= _FEW
    chunk = _chunk_size(channels, _SMALL_CHUNK if few else _CHUNK)
    padded = math.ceil(channels / LANES) * LANES
    packed_floats = _SMALL_CHUNK * 9 * LANES + WIDTH
    if chunk >= channels and panels * parts * (channels + 1) * STRIDE <= _NARROW:
        sizes = (
            (panels * parts * (channels + 1) + 1) * WIDTH,
            parts * (_NARROW_TILES * padded + LANES),
            (parts * (math.ceil(_NARROW_TILES / SIX) * SIX + 1) + SIX) * WIDTH,
        )
        buffer_floats = sum(sizes) + packed_floats
        buffers = address(scratch.take("filters", buffer_floats * workers))
        _convolve_tiles(
            *source, tiles, step, taps, *weight, *target, spread, *phase,
            panels, spill, *(4 * size for size in sizes), buffers, buffer_floats * 4, workers,
        )  # fmt: skip
        return
    batch = max(1, _BATCH // (parts * 4 * channels * _TILES)) * _TILES
    blocks = math.ceil(min(batch, tiles) / _TILES)
    splits = _splits(panels, blocks, workers)
    v = address(scratch.take("tiles", parts * blocks * (_TILES * padded + math.ceil(channels / chunk) * LANES)))
    block_rows = math.ceil(min(_TILES, tiles) / SIX) * SIX + 1
    filters_floats = (parts * (chunk + 1) + 1) * WIDTH
    sums_floats = (math.ceil(blocks / splits) if chunk < channels else 1) * (parts * block_rows + SIX) * WIDTH
    buffer_floats = filters_floats + sums_floats + packed_floats
    buffers = address(scratch.take("filters", buffer_floats * workers))
    for tile0 in range(0, tiles, batch):
        count = min(batch, tiles - tile0)
        _transform_inputs(*source, tile0, count, step, taps, v, chunk, workers)
        _multiply_tiles(
            v, channels, chunk, tile0, count, step, taps,
            *weight, *target, tiles_h, tiles_w, spread, *phase,
            panels, min(splits, math.ceil(count / _TILES)), spill,
            filters_floats * 4, sums_floats * 4, buffers, buffer_floats * 4, workers,
        )  # fmt: skip


@lru_cache(maxsize=1)
def _tap_offsets() -> np.ndarray:
    """Where the taps of some filters go for their transform, in bytes: [channel][tap][LANES]."""
    return np.arange(_SMALL_CHUNK * 9) * (LANES * 4)


def _chunk_size(channels: int, most: int) -> int:
    """Return how many channels a chunk has: whole vectors, as equal as possible."""
    vectors = math.ceil(channels / LANES)
    return math.ceil(vectors / math.ceil(vectors / (most // LANES))) * LANES


def _splits(panels: int, blocks: int, workers: int) -> int:
    """Return into how many ranges to split the blocks: idle threads cost time, and so do filters transformed again."""

    def cost(splits: int) -> float:
        rounds = math.ceil(panels * splits / workers)
        return rounds / splits * (1 + 0.1 * splits / blocks)

    return min(range(1, min(blocks, 2 * workers) + 1), key=cost)
