"""Winograd's first step, see `kernels.winograd`: transformed inputs, ``[block][chunk][part][tile][channel]``.

Those of less precise products are bfloat16, or bytes with a scale for each part of each tile, over all its channels.
"""

from __future__ import annotations

import numpy as np
from numba import carray, prange

from ..machine.emit import LANES
from ..machine.jit import inline, kernel
from ..machine.simd import float_pointer, largest, load, next_task, prefetch, splat, store_bytes
from ..products.operands import scale_of
from .transforms import transform_input, transform_input_largest, transform_input_pairs

BLOCK = 864  # tiles of a block times their parts, whose sums, 64 channels each, are then 216 KB
SMALL_CHUNK = 48  # and if not: 36 * 48 * 64 floats are 432 KB
NARROW_TILES = 12  # tiles of a block if all filters fit the L2 cache


@inline
def tile_rows(
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
def whole(channels):
    """Round a number of channels up to whole vectors."""
    return (channels + LANES - 1) // LANES * LANES


@inline
def input_start(channels, chunk, first, c, count, parts):
    """Where in the transformed inputs, in floats, the chunk at channel c begins of the block of tiles from first on."""
    chunks = (channels + chunk - 1) // chunk
    pads = first // (BLOCK // parts) * chunks + c // chunk  # each chunk before has a vector of padding in each part
    return parts * (first * whole(channels) + c * count + pads * LANES)


@inline
def copy_channels(table, offset, channels, copies, count):
    """Copy the last few channels of each pixel of a tile to vectors of `copies`, and put those into its last column."""
    for i in range(count):
        source = carray(float_pointer(table[i] + offset), channels)
        for j in range(channels):
            copies[i, j] = source[j]


def _make_transform_tile(pairs: bool):
    """Make the function that transforms the channels first .. last of the tile whose pixels are in the table.

    The next tile starts `next_tile` bytes further on. The result is float32, or bfloat16 with `pairs`.
    """

    @inline
    def transform_tile(table, copies, copy_table, first, last, target, stride, step, taps, next_tile):
        size = step + taps - 1
        for c in range(first, last, LANES):
            source, offset = table.ctypes.data, c * 4
            if last - c < LANES:
                copy_channels(table, c * 4, last - c, copies, size * size)
                source, offset = copy_table.ctypes.data, 0
            else:
                for i in range(0, size * size, size):  # fetch the columns that the next tile does not share
                    for j in range(taps - 1, size):
                        prefetch(table[i + j] + c * 4 + next_tile)
            if pairs:
                transform_input_pairs(source, offset, target, stride)
                target += LANES * 2
            else:
                transform_input(source, offset, target, stride, step, taps)
                target += LANES * 4

    return transform_tile


transform_tile = _make_transform_tile(False)


def _make_input_work(pairs: bool):
    """Make what a worker does, see `transform_inputs`: tiles until there are none left."""
    size_of, transform_tile = 2 if pairs else 4, _make_transform_tile(pairs)

    @inline
    def work(
        x, blank, height, width, channels, top, left, enlarge, tiles_h, tiles_w, tile0, tiles, step, taps, v, chunk,
        counter,
    ):  # fmt: skip
        size = step + taps - 1
        parts = size * size
        block = BLOCK // parts
        next_tile = (step >> enlarge) * channels * 4
        table = np.empty(36, np.int64)
        copies = np.zeros((36, LANES), np.float32)
        copy_table = np.empty(36, np.int64)
        for i in range(36):
            copy_table[i] = copies.ctypes.data + i * LANES * 4
        t = next_task(counter)
        while t < tiles:
            tile_rows(
                table, x, blank, height, width, channels * 4, tile0 + t,
                tiles_h, tiles_w, size, step, top, left, enlarge, 1,
            )  # fmt: skip
            first = t // block * block
            count = min(block, tiles - first)
            for c in range(0, channels, chunk):
                depth = whole(min(chunk, channels - c))
                start = input_start(channels, chunk, first, c, count, parts) + (t - first) * depth
                transform_tile(
                    table, copies, copy_table, c, min(c + chunk, channels), v + start * size_of,
                    (count * depth + LANES) * size_of, step, taps, next_tile,
                )  # fmt: skip
            t = next_task(counter)

    return work


_input_work, _input_work_pairs = _make_input_work(False), _make_input_work(True)


@kernel(17)
def transform_inputs(
    x, blank, height, width, channels, top, left, enlarge, tiles_h, tiles_w, tile0, tiles, step, taps, v, chunk, workers
):
    """Transform the input tiles tile0 .. tile0 + tiles."""
    counter = np.zeros(1, np.int64)
    for _ in prange(workers):
        _input_work(
            x, blank, height, width, channels, top, left, enlarge, tiles_h, tiles_w, tile0, tiles, step, taps, v, chunk,
            counter.ctypes.data,
        )  # fmt: skip


@kernel(17, precision="bf16")
def transform_inputs_pairs(
    x, blank, height, width, channels, top, left, enlarge, tiles_h, tiles_w, tile0, tiles, step, taps, v, chunk, workers
):
    """Transform them to bfloat16."""
    counter = np.zeros(1, np.int64)
    for _ in prange(workers):
        _input_work_pairs(
            x, blank, height, width, channels, top, left, enlarge, tiles_h, tiles_w, tile0, tiles, step, taps, v, chunk,
            counter.ctypes.data,
        )  # fmt: skip


@kernel(18, precision="int8")
def transform_inputs_bytes(
    x, blank, height, width, channels, top, left, enlarge, tiles_h, tiles_w, tile0, tiles, step, taps, v, chunk,
    workers, scales,
):  # fmt: skip
    """Transform them to bytes, with a scale for each part of each tile."""
    parts, block = 16, BLOCK // 16
    row_bytes = (whole(channels) + LANES) * 4
    counter = np.zeros(1, np.int64)
    for _ in prange(workers):
        table = np.empty(16, np.int64)
        copies = np.zeros((16, LANES), np.float32)
        copy_table = np.empty(16, np.int64)
        for i in range(16):
            copy_table[i] = copies.ctypes.data + i * LANES * 4
        wide = np.empty((parts, whole(channels) + LANES), np.float32)
        tops = np.empty((parts, LANES), np.float32)
        t = next_task(counter.ctypes.data)
        while t < tiles:
            tile_rows(
                table, x, blank, height, width, channels * 4, tile0 + t, tiles_h, tiles_w, 4, 2, top, left, enlarge, 1
            )
            tops[:] = 0
            for c in range(0, channels, LANES):
                source, offset = table.ctypes.data, c * 4
                if channels - c < LANES:
                    copy_channels(table, c * 4, channels - c, copies, 16)
                    source, offset = copy_table.ctypes.data, 0
                transform_input_largest(source, offset, wide.ctypes.data + c * 4, row_bytes, tops.ctypes.data)
            first = t // block * block
            count = min(block, tiles - first)
            for part in range(parts):
                top_of_part = largest(load(tops.ctypes.data + part * LANES * 4))
                factor = splat(scale_of(top_of_part, scales + (t * parts + part) * 4))
                for c in range(0, channels, chunk):
                    depth = whole(min(chunk, channels - c))
                    start = input_start(channels, chunk, first, c, count, parts) + (t - first) * depth
                    target = v + start + part * (count * depth + LANES)
                    source = wide.ctypes.data + part * row_bytes + c * 4
                    for i in range(0, depth, LANES):
                        store_bytes(target + i, load(source + 4 * i) * factor)
            t = next_task(counter.ctypes.data)
