"""Winograd's second step, see `kernels.winograd`: transformed filters, products, outputs.

Filters of bf16 products are words of two bfloat16. Filters of int8 products are words of four bytes, with a scale for
each part and output channel.
"""

from __future__ import annotations

import numpy as np
from numba import carray, prange

from ..checks import ADD
from ..machine.emit import INT8, LANES
from ..machine.jit import inline, kernel, task_kernel
from ..machine.simd import fence, float_pointer, next_task, prefetch, splat, store
from ..products.microkernel import SIX, STRIDE, VECTORS, WIDTH, product_bytes, product_pairs, product_rows
from ..products.operands import scale_of
from ..products.packing import pack_columns, stored_size, update_columns
from .inputs import BLOCK, NARROW_TILES, SMALL_CHUNK, copy_channels, input_start, tile_rows, transform_tile, whole
from .transforms import (
    finish_vector,
    finish_vector_bytes,
    transform_filter,
    transform_filter_bytes,
    transform_filter_largest,
    transform_filter_pairs,
)


@kernel(7, precision="int8")
def measure_filters(w, scales, c_out, channels, offsets, stride, out):
    """Write the scales of transformed filters of bytes, and their inverses, as `multiply_tiles_bytes` takes them."""
    for vector in prange((c_out + LANES - 1) // LANES):
        o = vector * LANES
        packed = np.empty((SMALL_CHUNK * 9, LANES), np.float32)
        spill, tops = np.empty((16, LANES), np.float32), np.zeros((16, LANES), np.float32)
        for c0 in range(0, channels, SMALL_CHUNK):
            some = min(SMALL_CHUNK, channels - c0)
            pack_columns(
                w + (o * channels + c0) * 9, channels * 9, INT8, scales + o * 4, min(LANES, c_out - o), some * 9,
                offsets, packed.ctypes.data,
            )  # fmt: skip
            for c in range(some):
                transform_filter_largest(
                    packed.ctypes.data + c * 9 * LANES * 4, 3 * LANES * 4, spill.ctypes.data, LANES * 4,
                    tops.ctypes.data,
                )  # fmt: skip
        for part in range(16):
            inverse = carray(float_pointer(out + (16 + part) * stride + o * 4), LANES)
            for i in range(LANES):
                inverse[i] = scale_of(tops[part, i], out + part * stride + (o + i) * 4)


def _make_transform_filters(group: int):
    """Make the function that transforms the filters of a panel and the channels first .. first + depth.

    They become ``[part][depth][WIDTH]``. With a `group` of 2 or 4, they become words of that many channels, and the
    depth shrinks as much. Bytes are multiplied by `factors` first; the factors of a part are `factor_stride` bytes from
    those of the next. The filters' share of the inputs' zero point is added to `zeros`, [part][WIDTH]. `packed` has
    room for three channels more than it gets.
    """

    @inline
    def transform_filters(
        w, kind, scales, c_out, channels, down, rank, up, first, depth, offsets, panel, table, spare, packed, filters,
        step, taps, below, right, factors, factor_stride, zeros,
    ):  # fmt: skip
        size = stored_size(kind)
        filter_bytes = 9 * LANES * 4
        stride = ((depth + group - 1) // group + 1) * STRIDE
        for j in range(VECTORS):
            o = panel * WIDTH + j * LANES
            rows = max(0, min(LANES, c_out - o))
            for c0 in range(0, depth, SMALL_CHUNK):  # what is packed stays in the L1 cache
                some = min(SMALL_CHUNK, depth - c0)
                source = w + (o * channels + first + c0) * 9 * size
                pack_columns(source, channels * 9 * size, kind, scales + o * 4, rows, some * 9, offsets, packed)
                if rank and rows:
                    up_vector = up + (panel * rank * WIDTH + j * LANES) * 4
                    update_columns(down + (first + c0) * 9 * rank * 4, rank, up_vector, some * 9, table, spare, packed)
                for i in range(-some % group * 9):
                    store(packed + some * filter_bytes + i * LANES * 4, splat(np.float32(0)))
                for c in range(0, some, group):
                    target, source = filters + (c0 + c) // group * STRIDE + j * LANES * 4, packed + c * filter_bytes
                    if group == 4:
                        transform_filter_bytes(
                            source,
                            filter_bytes,
                            factors + o * 4,
                            factor_stride,
                            target,
                            stride,
                            zeros + j * LANES * 4,
                            STRIDE,
                        )
                    elif group == 2:
                        transform_filter_pairs(source, source + filter_bytes, 3 * LANES * 4, target, stride)
                    else:
                        transform_filter(source, 3 * LANES * 4, target, stride, step, taps, below, right)

    return transform_filters


_transform_filters = _make_transform_filters(1)


@inline
def _fetch_filters(w, size, c_out, channels, first, depth, panel, part, parts):
    """Bring the part-th of `parts` shares of a panel's stored filters, for `depth` channels, into the cache."""
    o = panel * WIDTH
    rows = min(WIDTH, c_out - o)
    for row in range(rows * part // parts, rows * (part + 1) // parts):
        start = w + ((o + row) * channels + first) * 9 * size
        for line in range(0, depth * 9 * size, 64):
            prefetch(start + line)


def _make_finish_tile(group: int):
    """Make the function that transforms back the sums of one tile, adds a bias and writes.

    Channels fewer than a vector go by way of copies. Sums of products of bytes, a `group` of 4, have zeros, scales and
    factors as `transforms.finish_vector_bytes` takes them.
    """

    @inline
    def finish(where, stride, zeros, scales, scale_stride, factors, table, offset, shift, step, taps, how):
        if group == 4:
            finish_vector_bytes(where, stride, zeros, scales, scale_stride, factors, table, offset, shift, how)
        else:
            finish_vector(where, stride, table, offset, shift, step, taps, how)

    @inline
    def finish_tile(
        sums, stride, zeros, scales, scale_stride, factors, table, copies, copy_table, bias, shift, column, c_out,
        step, taps, spread, how,
    ):  # fmt: skip
        for c in range(column, min(column + WIDTH, c_out), LANES):
            valid = min(LANES, c_out - c)
            if how & ADD:
                for i in range(step * step):
                    prefetch(table[i] + (step * spread * c_out + c) * 4)  # the pixels of the next tile
            if bias:
                source = carray(float_pointer(bias + c * 4), valid)
                for i in range(valid):
                    shift[i] = source[i]
            where, zero, scale = sums + (c - column) * 4, zeros + (c - column) * 4, scales + c * 4
            pixels, offset = table.ctypes.data, c * 4
            if valid < LANES:
                pixels, offset = copy_table.ctypes.data, 0
                if how & ADD:
                    copy_channels(table, c * 4, valid, copies, step * step)
            finish(
                where, stride, zero, scale, scale_stride, factors, pixels, offset, shift.ctypes.data, step, taps, how
            )
            if valid < LANES:
                for i in range(step * step):
                    target = carray(float_pointer(table[i] + c * 4), valid)
                    for j in range(valid):
                        target[j] = copies[i, j]

    return finish_tile


_finish_tile = _make_finish_tile(1)


def _make_tile_work(product_rows, group: int):
    """Make what a worker of `multiply_tiles` does: tasks until there are none left."""
    size_of = 4 // group  # bytes of a channel of the transformed inputs
    finish_tile, transform_filters = _make_finish_tile(group), _make_transform_filters(group)

    @inline
    def work(parameters, worker, counter):
        (
            v, channels, chunk, tile0, tiles, step, taps, w, kind, scales, offsets, down, rank, up, below, right,
            out, out_h, out_w, c_out, bias, bias_stride, how, tiles_h, tiles_w, spread, phase_y, phase_x,
            panels, splits, spill, filters_bytes, sums_bytes, buffers, buffer_bytes,
            filter_scales, scale_stride, tile_scales, workers,
        ) = parameters  # fmt: skip
        parts = (step + taps - 1) * (step + taps - 1)
        block_tiles = BLOCK // parts
        block_rows = (min(block_tiles, tiles) + SIX - 1) // SIX * SIX + 1
        blocks = (tiles + block_tiles - 1) // block_tiles
        weight_size = stored_size(kind)
        filters = buffers + worker * buffer_bytes
        all_sums = filters + filters_bytes
        packed = all_sums + sums_bytes
        rows = np.empty(block_tiles + SIX, np.int64)
        spare = np.empty(SIX * WIDTH, np.float32)
        table = np.empty(16, np.int64)
        shift = np.zeros(LANES, np.float32)
        copies = np.zeros((16, LANES), np.float32)
        copy_table = np.empty(16, np.int64)
        for i in range(16):
            copy_table[i] = copies.ctypes.data + i * LANES * 4
        zeros = np.zeros((16 if group == 4 else 0, WIDTH), np.float32)
        task = next_task(counter)
        while task < panels * splits:
            following = task + workers  # probably
            panel, split = task % panels, task // panels
            first_block, last_block = blocks * split // splits, blocks * (split + 1) // splits
            column = panel * WIDTH
            vectors = (min(WIDTH, c_out - column) + LANES - 1) // LANES
            zeros[:] = 0
            for c in range(0, channels, chunk):
                depth = min(chunk, channels - c)
                row_floats, words = whole(depth), (depth + group - 1) // group
                transform_filters(
                    w, kind, scales, c_out, channels, down, rank, up, c, depth, offsets, panel, rows, spare.ctypes.data,
                    packed, filters, step, taps, below, right,
                    filter_scales + 16 * scale_stride, scale_stride, zeros.ctypes.data,
                )  # fmt: skip
                next_panel, next_c = panel, c + chunk
                if next_c >= channels:
                    next_panel, next_c = following % panels, 0
                fetch = next_c > 0 or following < panels * splits
                for block in range(first_block, last_block):
                    first = block * block_tiles
                    count = min(block_tiles, tiles - first)
                    start = input_start(channels, chunk, first, c, count, parts)
                    for t in range(count + SIX):
                        rows[t] = v + (start + min(t, count - 1) * row_floats) * size_of
                    part_stride = (count * row_floats + LANES) * size_of
                    sums = all_sums
                    if chunk < channels:
                        sums += (block - first_block) * parts * block_rows * STRIDE
                    for part in range(parts):
                        if fetch and block == first_block:
                            _fetch_filters(
                                w, weight_size, c_out, channels, next_c, min(chunk, channels - next_c), next_panel,
                                part, parts,
                            )  # fmt: skip
                        part_rows, part_filters = part * part_stride, filters + part * (words + 1) * STRIDE
                        ahead = part_filters + (words + 1) * STRIDE
                        product_rows(
                            rows.ctypes.data, part_rows, 4, part_filters, sums + part * block_rows * STRIDE,
                            count, words, vectors, c == 0, ahead, 64, rows[0] + part_rows + part_stride - ahead,
                        )  # fmt: skip
                    if c + chunk >= channels:
                        for t in range(count):
                            tile = tile0 + first + t
                            tile_rows(
                                table, out, spill, out_h, out_w, c_out * 4, tile, tiles_h, tiles_w,
                                step, step, -phase_y, -phase_x, 0, spread,
                            )  # fmt: skip
                            image_bias = bias + tile // (tiles_h * tiles_w) * bias_stride if bias else 0
                            finish_tile(
                                sums + t * STRIDE, block_rows * STRIDE, zeros.ctypes.data, filter_scales, scale_stride,
                                tile_scales + (first + t) * parts * 4, table, copies, copy_table,
                                image_bias, shift, column, c_out, step, taps, spread, how,
                            )  # fmt: skip
            task = next_task(counter)
        fence()

    return work


_tile_work, _tile_work_pairs = _make_tile_work(product_rows, 1), _make_tile_work(product_pairs, 2)
_tile_work_bytes = _make_tile_work(product_bytes, 4)


# Each kernel multiplies transformed inputs by transformed filters, transforms the sums back, and stores them. A task
# is a panel and one of `splits` ranges of blocks. The filters of one chunk of channels are transformed at a time; if
# there are several chunks, a task keeps the sums of all its blocks until the last chunk is added. The outputs are
# every `spread`-th row and column from (phase_y, phase_x) on. In int8, each part of a tile has a scale, [tile][part],
# and so has each part of a filter: [part][c_out], then their inverses in the same layout, the parts `scale_stride`
# bytes apart.
multiply_tiles = task_kernel("multiply_tiles", 39, _tile_work)
multiply_tiles_pairs = task_kernel("multiply_tiles_pairs", 39, _tile_work_pairs, "bf16")
multiply_tiles_bytes = task_kernel("multiply_tiles_bytes", 39, _tile_work_bytes, "int8")


@kernel(40)
def convolve_tiles(
    x, blank, height, width, channels, top, left, enlarge, tiles_h, tiles_w, tiles, step, taps,
    w, kind, scales, offsets, down, rank, up, below, right,
    out, out_h, out_w, c_out, bias, bias_stride, how, spread, phase_y, phase_x,
    panels, spill, filters_bytes, inputs_bytes, sums_bytes, buffers, buffer_bytes, workers,
):  # fmt: skip
    """Do all the steps for a block of tiles at a time; the arguments are those of the two kernels above."""
    parts = (step + taps - 1) * (step + taps - 1)
    block_rows = (NARROW_TILES + SIX - 1) // SIX * SIX + 1
    depth = whole(channels)
    part_filters = (channels + 1) * STRIDE
    counter = np.zeros(1, np.int64)
    for worker in prange(workers):
        filters = buffers + worker * buffer_bytes
        inputs = filters + filters_bytes
        sums = inputs + inputs_bytes
        packed = sums + sums_bytes
        table = np.empty(36, np.int64)
        rows = np.empty(NARROW_TILES + SIX, np.int64)
        spare = np.empty(SIX * WIDTH, np.float32)
        shift = np.zeros(LANES, np.float32)
        copies = np.zeros((36, LANES), np.float32)
        copy_table = np.empty(36, np.int64)
        for i in range(36):
            copy_table[i] = copies.ctypes.data + i * LANES * 4
        for panel in range(panels):
            _transform_filters(
                w, kind, scales, c_out, channels, down, rank, up, 0, channels, offsets, panel, rows, spare.ctypes.data,
                packed, filters + panel * parts * part_filters, step, taps, below, right, 0, 0, 0,
            )  # fmt: skip
        first = next_task(counter.ctypes.data) * NARROW_TILES
        while first < tiles:
            count = min(NARROW_TILES, tiles - first)
            part_stride = (count * depth + LANES) * 4
            for t in range(count):
                tile_rows(
                    table, x, blank, height, width, channels * 4, first + t,
                    tiles_h, tiles_w, step + taps - 1, step, top, left, enlarge, 1,
                )  # fmt: skip
                transform_tile(
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
                    tile_rows(
                        table, out, spill, out_h, out_w, c_out * 4, first + t, tiles_h, tiles_w,
                        step, step, -phase_y, -phase_x, 0, spread,
                    )  # fmt: skip
                    image_bias = bias + (first + t) // (tiles_h * tiles_w) * bias_stride if bias else 0
                    _finish_tile(
                        sums + t * STRIDE, block_rows * STRIDE, 0, 0, 0, 0, table, copies, copy_table,
                        image_bias, shift, column, c_out, step, taps, spread, how,
                    )  # fmt: skip
            first = next_task(counter.ctypes.data) * NARROW_TILES
        fence()
