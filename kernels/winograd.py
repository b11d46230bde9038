"""Convolution with 3x3 filters and stride 1 by minimal filtering: F(4x4, 3x3) and F(2x2, 3x3).

A tile of 6x6 inputs and a 3x3 filter, both transformed, are multiplied element by element and summed over the
channels; transforming back gives 4x4 outputs, with 36 products instead of 144 (Winograd 1980; Lavin and Gray,
arXiv:1509.09308). Tiles of 4x4 inputs give 2x2 outputs with 16 products instead of 36. The sums over channels are 36
(or 16) matrix products, one for each *part* of the transforms, done by the micro-kernel of `kernels.product`.

The interpolation points are 0, 3/4, -3/4, 3/2, -3/2 and infinity: the error is a quarter of that of the usual
0, 1, -1, 2, -2 and infinity (compare Barabasz et al., arXiv:1803.10986, who search for such points). The small tiles
have 0, 1, -1 and infinity.

1. Inputs: for a batch of tiles, as many as fit the shared cache, all threads write the transformed tiles as
   ``[block][chunk][part][tile][channel]``. Padding and enlargement are addresses, as in the direct convolution.
2. A task is a panel of output channels and a range of blocks of tiles. Its thread transforms filters into a buffer of
   its own, multiplies, transforms the sums back, adds the bias and stores. Large images have tiles enough to pay for
   the filters of all channels; for small ones the filters of one chunk of channels are transformed and used at a time,
   in the L2 cache, while the stored filters of the next chunk are fetched.

Transformed filters are four times as large as stored ones: making them again for each batch is cheaper than to keep
them. The parts of each buffer lie a little more than a multiple of 4 KB apart: at multiples they would compete for the
same lines of the cache.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numba import carray, prange

from kernels.arrays import address, check_weight
from kernels.gemm import Geometry, bias_address, zeros
from kernels.jit import inline, kernel, threads
from kernels.memory import scratch
from kernels.packing import pack_columns
from kernels.product import SIX, STRIDE, VECTORS, WIDTH, product_rows
from kernels.simd import (
    FLOAT32,
    LANES,
    fence,
    float_pointer,
    load,
    make_transform,
    next_task,
    prefetch,
    tile_add,
    tile_collect,
    tile_gather,
    tile_load,
    tile_scatter,
    tile_spread,
    tile_stream,
)

_TILES = 24  # tiles of a block: the sums of its 36 parts, 64 channels each, are 216 KB
_CHUNK = 320  # channels of a chunk, at most, if all filters of a panel are transformed at once
_SMALL_CHUNK = 48  # and if not: 36 * 48 * 64 floats are 432 KB
_FEW = 36  # tiles of an image up to which that is so
_BATCH = 14 << 20  # bytes of transformed inputs at a time
_STREAM = 16 << 20  # bytes of outputs from which they go past the caches: nobody will find them there
_WRITE, _ADD, _PAST_CACHES = 0, 1, 2  # what to do with results


def _matrices(*points: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the transforms of inputs, filters and outputs for 0, +-a (and +-b) and infinity, for filters of 3."""
    finite = [0.0, *(sign * x for x in points for sign in (1, -1))]
    size = len(finite) + 1
    whole = np.poly(finite)[::-1]  # of the polynomial with these roots, lowest power first
    inputs, filters = np.zeros((size, size)), np.zeros((size, 3))
    for i, x in enumerate(finite):
        others = [y for y in finite if y != x]
        sign = -1 if not x and len(points) % 2 else 1  # makes the first row of both transforms positive
        inputs[i, :-1] = sign * np.poly(others)[::-1]
        filters[i] = sign * x ** np.arange(3) / np.prod([x - y for y in others])
    inputs[-1], filters[-1, -1] = whole, 1
    outputs = np.array([[x**i for x in finite] + [float(i == size - 3)] for i in range(size - 2)])
    return inputs, filters, outputs


_inputs4, _filters4, _outputs4 = map(make_transform, _matrices(0.75, 1.5))
_inputs2, _filters2, _outputs2 = map(make_transform, _matrices(1.0))


@inline
def _tile_rows(table, x, skip, height, width, pixel_bytes, tile, tiles_h, tiles_w, size, step, top, left, enlarge):
    """Fill the table with the addresses of the `size x size` pixels of a tile; `skip` for those outside."""
    image, rest = tile // (tiles_h * tiles_w), tile % (tiles_h * tiles_w)
    y0, x0 = rest // tiles_w * step - top, rest % tiles_w * step - left
    for i in range(size):
        for j in range(size):
            y, c = y0 + i, x0 + j
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
def _transform_input(table, offset, target, stride, step):
    if step == 4:
        tile_spread(_inputs4(tile_gather(table, offset, 6, 6)), target, stride)
    else:
        tile_spread(_inputs2(tile_gather(table, offset, 4, 4)), target, stride)


@inline
def _copy_channels(table, offset, channels, copies, count):
    """Copy the last few channels of each pixel of a tile to vectors of `copies`, and put those into its last column."""
    for i in range(count):
        source = carray(float_pointer(table[i] + offset), channels)
        for j in range(channels):
            copies[i, j] = source[j]


@kernel(16)
def _transform_inputs(
    x, blank, height, width, channels, top, left, enlarge, tiles_h, tiles_w, tile0, tiles, step, v, chunk, workers
):
    """Transform the input tiles tile0 .. tile0 + tiles."""
    size = step + 2
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
                tiles_h, tiles_w, size, step, top, left, enlarge,
            )  # fmt: skip
            first = t // _TILES * _TILES
            count = min(_TILES, tiles - first)
            for c in range(0, channels, LANES):
                begin = c // chunk * chunk
                depth = _whole(min(chunk, channels - begin))
                start = _input_start(channels, chunk, first, begin, count, parts) + (t - first) * depth + c - begin
                if channels - c < LANES:
                    _copy_channels(table, c * 4, channels - c, copies, parts)
                    _transform_input(copy_table.ctypes.data, 0, v + start * 4, (count * depth + LANES) * 4, step)
                else:
                    for i in range(0, parts, size):  # fetch the columns that the next tile does not share
                        for j in range(2, size):
                            prefetch(table[i + j] + c * 4 + next_tile)
                    _transform_input(table.ctypes.data, c * 4, v + start * 4, (count * depth + LANES) * 4, step)
            t = next_task(counter.ctypes.data)


@inline
def _transform_filters(w, kind, c_out, channels, first, depth, offsets, panel, taps, filters, step):
    """Transform the filters of a panel and the channels first .. first + depth, as [part][depth][WIDTH]."""
    size = 4 if kind == FLOAT32 else 2
    stride = (depth + 1) * STRIDE
    for j in range(VECTORS):
        o = panel * WIDTH + j * LANES
        rows = max(0, min(LANES, c_out - o))
        for c0 in range(0, depth, _SMALL_CHUNK):  # taps stay in the L1 cache
            some = min(_SMALL_CHUNK, depth - c0)
            source = w + (o * channels + first + c0) * 9 * size
            pack_columns(source, channels * 9 * size, kind, rows, some * 9, offsets, taps)
            for c in range(some):
                tile = tile_load(taps + c * 9 * LANES * 4, 3 * LANES * 4, 3, 3)
                target = filters + (c0 + c) * STRIDE + j * LANES * 4
                if step == 4:
                    tile_spread(_filters4(tile), target, stride)
                else:
                    tile_spread(_filters2(tile), target, stride)


@inline
def _fetch_filters(w, size, c_out, channels, first, depth, panel, part, parts):
    """Bring the part-th of `parts` shares of a panel's stored filters, for `depth` channels, into the cache."""
    o = panel * WIDTH
    rows = min(WIDTH, c_out - o)
    for row in range(rows * part // parts, rows * (part + 1) // parts):
        start = w + ((o + row) * channels + first) * 9 * size
        for line in range(0, depth * 9 * size, 64):
            prefetch(start + line)


def _make_finish(transform, size: int):
    """Make a function for tiles of `size x size` outputs."""
    spread = size + 2

    @inline
    def finish(sums, stride, table, offset, bias, how):
        """Transform back the sums of one tile and vector of channels, add a vector of bias, write to the pixels."""
        result = tile_add(transform(tile_collect(sums, stride, spread, spread)), load(bias))
        if how == _ADD:
            tile_scatter(tile_add(result, tile_gather(table, offset, size, size)), table, offset)
        elif how == _PAST_CACHES:
            tile_stream(result, table, offset)
        else:
            tile_scatter(result, table, offset)

    return finish


_finish4, _finish2 = _make_finish(_outputs4, 4), _make_finish(_outputs2, 2)


@inline
def _finish_vector(sums, stride, table, offset, bias, step, how):
    if step == 4:
        _finish4(sums, stride, table, offset, bias, how)
    else:
        _finish2(sums, stride, table, offset, bias, how)


@inline
def _finish_tile(sums, stride, table, copies, copy_table, bias, shift, column, c_out, step, how):
    """Do so for all channels of a panel; the last few, fewer than a vector, by way of copies."""
    for c in range(column, min(column + WIDTH, c_out), LANES):
        valid = min(LANES, c_out - c)
        if how == _ADD:
            for i in range(step * step):
                prefetch(table[i] + (step * c_out + c) * 4)  # the pixels of the next tile
        if bias:
            source = carray(float_pointer(bias + c * 4), valid)
            for i in range(valid):
                shift[i] = source[i]
        where = sums + (c - column) * 4
        if valid == LANES:
            _finish_vector(where, stride, table.ctypes.data, c * 4, shift.ctypes.data, step, how)
        else:
            if how == _ADD:
                _copy_channels(table, c * 4, valid, copies, step * step)
            _finish_vector(where, stride, copy_table.ctypes.data, 0, shift.ctypes.data, step, how)
            for i in range(step * step):
                target = carray(float_pointer(table[i] + c * 4), valid)
                for j in range(valid):
                    target[j] = copies[i, j]


@kernel(26)
def _multiply_tiles(
    v, channels, chunk, tile0, tiles, step, w, kind, offsets,
    out, out_h, out_w, c_out, bias, bias_stride, how, tiles_h, tiles_w,
    panels, splits, spill, filters_bytes, sums_bytes, buffers, buffer_bytes, workers,
):  # fmt: skip
    """Multiply transformed inputs and filters, transform back, store.

    A task is a panel and one of `splits` ranges of blocks. Filters of a chunk of channels are transformed at a time;
    unless that is all of them, the sums of all blocks of the task are kept until the last ones have been added.
    """
    size = step + 2
    parts = size * size
    block_rows = (min(_TILES, tiles) + SIX - 1) // SIX * SIX + 1
    blocks = (tiles + _TILES - 1) // _TILES
    weight_size = 4 if kind == FLOAT32 else 2
    counter = np.zeros(1, np.int64)
    for worker in prange(workers):
        filters = buffers + worker * buffer_bytes
        all_sums = filters + filters_bytes
        taps = all_sums + sums_bytes
        rows = np.empty(_TILES + SIX, np.int64)
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
                _transform_filters(w, kind, c_out, channels, c, depth, offsets, panel, taps, filters, step)
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
                                table, out, spill, out_h, out_w, c_out * 4, tile, tiles_h, tiles_w, step, step, 0, 0, 0
                            )
                            image_bias = bias + tile // (tiles_h * tiles_w) * bias_stride if bias else 0
                            _finish_tile(
                                sums + t * STRIDE, block_rows * STRIDE, table, copies, copy_table,
                                image_bias, shift, column, c_out, step, how,
                            )  # fmt: skip
            task = next_task(counter.ctypes.data)
        fence()


def possible(geometry: Geometry) -> bool:
    """Return whether these algorithms can do a convolution."""
    return (geometry.kh, geometry.kw, geometry.stride) == (3, 3, 1)


def costs(channels: int, c_out: int, geometry: Geometry) -> dict[str, float]:
    """Estimate the cost of each algorithm that can do a convolution, by its name in `kernels.conv2d`.

    The unit is a multiplication of one vector, for each vector of filters. An image is looked at by itself, so that its
    result does not depend on how many come with it.
    """
    g = geometry
    direct = 1.05 * g.kh * g.kw * g.out_h * g.out_w + 15
    if not possible(g):
        return {"direct": direct}
    estimates = {"direct": direct}
    for name, step, filters in (("winograd2", 2, 90), ("winograd4", 4, 170)):
        tiles, parts = math.ceil(g.out_h / step) * math.ceil(g.out_w / step), (step + 2) ** 2
        transforms = parts * (3 * LANES / min(c_out, 16 * LANES) + 2.5 * LANES / min(channels, 16 * LANES))
        estimates[name] = filters + tiles * (1.15 * parts + transforms)
    return estimates


def winograd(
    x: np.ndarray, w: np.ndarray, bias: np.ndarray | None, out: np.ndarray, geometry: Geometry, accumulate: bool,
    step: int,
) -> None:  # fmt: skip
    """Convolve x with 3x3 filters w as stored; arguments as those of `kernels.gemm.multiply`, all checked.

    `step` is 4 for F(4x4, 3x3) and 2 for F(2x2, 3x3).
    """
    g, channels, c_out, parts = geometry, x.shape[-1], out.shape[-1], (step + 2) ** 2
    tiles_h, tiles_w = math.ceil(g.out_h / step), math.ceil(g.out_w / step)
    tiles, panels, workers = g.images * tiles_h * tiles_w, math.ceil(c_out / WIDTH), threads()
    few = tiles_h * tiles_w <= _FEW
    chunk = _chunk_size(channels, _SMALL_CHUNK if few else _CHUNK)
    batch = max(1, _BATCH // (parts * 4 * channels * _TILES)) * _TILES
    blocks = math.ceil(min(batch, tiles) / _TILES)
    splits = _splits(panels, blocks, workers)
    padded = math.ceil(channels / LANES) * LANES
    v = address(scratch.take("tiles", parts * blocks * (_TILES * padded + math.ceil(channels / chunk) * LANES)))
    block_rows = math.ceil(min(_TILES, tiles) / SIX) * SIX + 1
    filters_floats = (parts * (chunk + 1) + 1) * WIDTH
    sums_floats = (math.ceil(blocks / splits) if chunk < channels else 1) * (parts * block_rows + SIX) * WIDTH
    taps_floats = _SMALL_CHUNK * 9 * LANES + WIDTH
    buffer_floats = filters_floats + sums_floats + taps_floats
    buffers = address(scratch.take("filters", buffer_floats * workers))
    spill = address(scratch.take("spill", math.ceil(c_out / WIDTH) * WIDTH))
    blank = zeros(channels)
    aligned = c_out % LANES == 0 and address(out) % (LANES * 4) == 0
    how = _ADD if accumulate else _PAST_CACHES if aligned and out.nbytes >= _STREAM else _WRITE
    for tile0 in range(0, tiles, batch):
        count = min(batch, tiles - tile0)
        _transform_inputs(
            address(x), address(blank), g.height, g.width, channels, g.top, g.left, g.enlarge, tiles_h, tiles_w,
            tile0, count, step, v, chunk, workers,
        )  # fmt: skip
        _multiply_tiles(
            v, channels, chunk, tile0, count, step, address(w), check_weight("w", w, 4), address(_tap_offsets()),
            address(out), g.out_h, g.out_w, c_out, *bias_address(bias), how, tiles_h, tiles_w,
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
