"""Convolution with 3x3 filters and stride 1 by minimal filtering: F(4x4, 3x3), 36 products for 16 outputs, not 144.

A tile of 6x6 inputs and a 3x3 filter, both transformed, are multiplied element by element and summed over the
channels; transforming back gives 4x4 outputs (Winograd 1980; Lavin and Gray, arXiv:1509.09308). The sums over channels
are 36 matrix products, done by the micro-kernel of `kernels.gemm`.

The interpolation points are 0, 3/4, -3/4, 3/2, -3/2 and infinity: the error is a quarter of that of the usual
0, 1, -1, 2, -2 and infinity (compare Barabasz et al., arXiv:1803.10986, who search for such points).

1. Inputs: for a batch of tiles, as many as fit the shared cache, all threads write the transformed tiles as
   ``[block][chunk][36][tile][channel]``. Padding and enlargement are addresses, as in the direct convolution.
2. A task is a panel of output channels and a block of tiles. Its thread transforms the filters of a chunk of channels
   into a buffer of its own, multiplies, and after the last chunk transforms the sums back, adds the bias and stores.
   Filters are transformed again for each block of tiles: that is cheaper than to read them, four times as large,
   from memory.

The 36 parts of each buffer lie a little more than a multiple of 4 KB apart: at multiples they would compete for the
same lines of the cache.
"""

from __future__ import annotations

import math

import numpy as np
from numba import carray, prange

from kernels.arrays import address, check_weight
from kernels.gemm import VECTORS, WIDTH, Geometry, bias_address, pack_columns, product_rows, scratch, zeros
from kernels.jit import inline, kernel, threads
from kernels.simd import (
    FLOAT32,
    LANES,
    float_pointer,
    load,
    make_transform,
    next_task,
    splat,
    tile_add,
    tile_collect,
    tile_gather,
    tile_load,
    tile_scatter,
    tile_spread,
)

_POINTS = (0.75, 1.5)
_CHUNK = 32  # channels whose filters are transformed at a time: 36 * 32 * 64 floats are 288 KB
_TILES = 48  # tiles of a block: its sums, 36 * 48 * 64 floats, are 432 KB
_BATCH = 10 << 20  # bytes of transformed inputs at a time
_TAP_OFFSETS = np.arange(_CHUNK * 9) * (LANES * 4)  # where a chunk's taps go for the transform: [channel][tap][LANES]


def _matrices(a: float, b: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the transforms of inputs (6, 6), filters (6, 3) and outputs (4, 6) for 0, +-a, +-b and infinity."""
    p, q = a * a, b * b
    inputs = [
        [p * q, 0, -(p + q), 0, 1, 0],
        [0, -a * q, -q, a, 1, 0],
        [0, a * q, -q, -a, 1, 0],
        [0, -p * b, -p, b, 1, 0],
        [0, p * b, -p, -b, 1, 0],
        [0, p * q, 0, -(p + q), 0, 1],
    ]
    u, v = 2 * p * (p - q), 2 * q * (q - p)
    filters = [
        [1 / (p * q), 0, 0],
        [1 / u, a / u, p / u],
        [1 / u, -a / u, p / u],
        [1 / v, b / v, q / v],
        [1 / v, -b / v, q / v],
        [0, 0, 1],
    ]
    outputs = [[x**i for x in (0, a, -a, b, -b)] + [float(i == 3)] for i in range(4)]
    return np.array(inputs), np.array(filters), np.array(outputs)


_input_transform, _filter_transform, _output_transform = map(make_transform, _matrices(*_POINTS))


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
def _input_start(channels, first, chunk, count):
    """Where in the transformed inputs, in floats, the chunk of channels begins of the block of tiles from first on."""
    chunks = (channels + _CHUNK - 1) // _CHUNK
    parts = first // _TILES * chunks + chunk // _CHUNK  # each has 36 times LANES floats of padding
    return 36 * (first * channels + chunk * count + parts * LANES)


@kernel(14)
def _transform_inputs(
    x, blank, height, width, channels, top, left, enlarge, tiles_h, tiles_w, tile0, tiles, v, workers
):
    """Transform the input tiles tile0 .. tile0 + tiles."""
    counter = np.zeros(1, np.int64)
    for _ in prange(workers):
        table = np.empty(36, np.int64)
        t = next_task(counter.ctypes.data)
        while t < tiles:
            _tile_rows(
                table, x, blank, height, width, channels * 4, tile0 + t, tiles_h, tiles_w, 6, 4, top, left, enlarge
            )
            first = t // _TILES * _TILES
            count = min(_TILES, tiles - first)
            for c in range(0, channels, LANES):
                chunk = c // _CHUNK * _CHUNK
                depth = min(_CHUNK, channels - chunk)
                start = _input_start(channels, first, chunk, count) + (t - first) * depth + c - chunk
                tile = tile_gather(table.ctypes.data, c * 4, 6, 6)
                tile_spread(_input_transform(tile), v + start * 4, (count * depth + LANES) * 4)
            t = next_task(counter.ctypes.data)


@inline
def _transform_filters(w, kind, c_out, channels, first, depth, offsets, panel, taps, filters):
    """Transform the filters of a panel and the channels first .. first + depth, as [36][depth][WIDTH]."""
    size = 4 if kind == FLOAT32 else 2
    for j in range(VECTORS):
        o = panel * WIDTH + j * LANES
        rows = max(0, min(LANES, c_out - o))
        source = w + (o * channels + first) * 9 * size
        pack_columns(source, channels * 9 * size, kind, rows, depth * 9, offsets, taps)
        for c in range(depth):
            tile = tile_load(taps + c * 9 * LANES * 4, 3 * LANES * 4, 3, 3)
            tile_spread(_filter_transform(tile), filters + (c * WIDTH + j * LANES) * 4, (depth + 1) * WIDTH * 4)


@kernel(21)
def _multiply_tiles(
    v, channels, tile0, tiles, w, kind, offsets,
    out, out_h, out_w, c_out, bias, bias_stride, add, tiles_h, tiles_w, panels, blocks,
    buffers, buffer_bytes, workers,
):  # fmt: skip
    """Multiply transformed inputs and filters, transform back, store; c_out is a multiple of LANES."""
    counter = np.zeros(1, np.int64)
    for worker in prange(workers):
        filters = buffers + worker * buffer_bytes
        sums = filters + 36 * (_CHUNK + 1) * WIDTH * 4
        taps = sums + 36 * (_TILES + 1) * WIDTH * 4
        spill = taps + _CHUNK * 9 * LANES * 4
        rows = np.empty(_TILES, np.int64)
        table = np.empty(16, np.int64)
        zero = carray(float_pointer(sums), 36 * (_TILES + 1) * WIDTH)
        task = next_task(counter.ctypes.data)
        while task < panels * blocks:
            panel, block = task % panels, task // panels
            first = block * _TILES
            count = min(_TILES, tiles - first)
            zero[: 36 * (count + 1) * WIDTH] = 0
            for c in range(0, channels, _CHUNK):
                depth = min(_CHUNK, channels - c)
                _transform_filters(w, kind, c_out, channels, c, depth, offsets, panel, taps, filters)
                start = v + _input_start(channels, first, c, count) * 4
                for t in range(count):
                    rows[t] = start + t * depth * 4
                for xi in range(36):
                    product_rows(
                        rows.ctypes.data, xi * (count * depth + LANES) * 4, filters + xi * (depth + 1) * WIDTH * 4,
                        sums + xi * (count + 1) * WIDTH * 4, WIDTH * 4, count, depth,
                    )  # fmt: skip
            column = panel * WIDTH
            for t in range(count):
                tile = tile0 + first + t
                _tile_rows(
                    table, out + column * 4, spill, out_h, out_w, c_out * 4, tile, tiles_h, tiles_w, 4, 4, 0, 0, 0
                )
                image = tile // (tiles_h * tiles_w)
                for j in range(0, min(WIDTH, c_out - column), LANES):
                    shift = splat(np.float32(0))
                    if bias:
                        shift = load(bias + image * bias_stride + (column + j) * 4)
                    summed = tile_collect(sums + (t * WIDTH + j) * 4, (count + 1) * WIDTH * 4, 6, 6)
                    result = tile_add(_output_transform(summed), shift)
                    if add:
                        result = tile_add(result, tile_gather(table.ctypes.data, j * 4, 4, 4))
                    tile_scatter(result, table.ctypes.data, j * 4)
            task = next_task(counter.ctypes.data)


def possible(channels: int, c_out: int, geometry: Geometry) -> bool:
    """Return whether this algorithm can do a convolution."""
    return (geometry.kh, geometry.kw, geometry.stride) == (3, 3, 1) and not channels % LANES and not c_out % LANES


def suits(channels: int, c_out: int, geometry: Geometry) -> bool:
    """Return whether this algorithm can do a convolution and is likely to be the faster one.

    The decision looks at one image only, so that an image's result does not depend on how many come with it.
    """
    g = geometry
    if not possible(channels, c_out, g):
        return False
    tiles = math.ceil(g.out_h / 4) * math.ceil(g.out_w / 4)
    # Cycles for one vector of filters: transforming it, and multiplying; the direct algorithm only multiplies.
    return 1.25 * (110 + 36 * tiles) < 9 * g.out_h * g.out_w + 30


def winograd(
    x: np.ndarray, w: np.ndarray, bias: np.ndarray | None, out: np.ndarray, geometry: Geometry, accumulate: bool
) -> None:
    """Convolve x with 3x3 filters w as stored; arguments as those of `kernels.gemm.multiply`, all checked."""
    g, channels, c_out = geometry, x.shape[-1], out.shape[-1]
    tiles_h, tiles_w = math.ceil(g.out_h / 4), math.ceil(g.out_w / 4)
    tiles, panels = g.images * tiles_h * tiles_w, math.ceil(c_out / WIDTH)
    batch = max(1, _BATCH // (36 * 4 * channels * _TILES)) * _TILES
    blocks = math.ceil(min(batch, tiles) / _TILES)
    v = address(scratch.take("tiles", 36 * blocks * (_TILES * channels + math.ceil(channels / _CHUNK) * LANES)))
    buffer_floats = 36 * (_CHUNK + _TILES + 2) * WIDTH + _CHUNK * 9 * LANES + WIDTH
    workers = threads()  # once: another thread may change it, and there must be a buffer for each
    buffers = address(scratch.take("filters", buffer_floats * workers))
    blank = zeros(channels)
    for tile0 in range(0, tiles, batch):
        count = min(batch, tiles - tile0)
        _transform_inputs(
            address(x), address(blank), g.height, g.width, channels, g.top, g.left, g.enlarge, tiles_h, tiles_w,
            tile0, count, v, workers,
        )  # fmt: skip
        _multiply_tiles(
            v, channels, tile0, count, address(w), check_weight("w", w, 4), address(_TAP_OFFSETS),
            address(out), g.out_h, g.out_w, c_out,
            *bias_address(bias), int(accumulate),
            tiles_h, tiles_w, panels, math.ceil(count / _TILES), buffers, buffer_floats * 4, workers,
        )  # fmt: skip
