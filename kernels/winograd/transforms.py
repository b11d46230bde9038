"""Winograd's transforms of tiles of inputs, filters and outputs, a vector of channels at a time.

A *form* is F(step x step, taps x taps): tiles of ``step + taps - 1`` inputs a side make ``step`` outputs a side.

- F(4, 3) has the points 0, 3/4, -3/4, 3/2, -3/2 and infinity: a quarter of the error of the usual 0, 1, -1, 2, -2 and
  infinity (compare Barabasz et al., arXiv:1803.10986, who search for such points).
- F(2, 3) has 0, 1, -1 and infinity.
- F(4, 2) has 3/5, -3/5, 6/5, -6/5 and infinity, and serves images enlarged by nearest neighbour: outputs in rows of one
  parity see only two different rows of inputs, and so two of their taps have become one, the sum. The parity of rows
  and that of columns give four *phases*, each a convolution of the small image with its own 2x2 filters.
"""

from __future__ import annotations

import numpy as np

from ..checks import ADD, PAST_CACHES, RELU
from ..machine.emit import LANES
from ..machine.jit import inline
from ..machine.simd import load
from ..machine.tiles import (
    make_transform,
    tile_add,
    tile_collect,
    tile_collect_sums,
    tile_gather,
    tile_interleave,
    tile_load,
    tile_relu,
    tile_scatter,
    tile_spread,
    tile_spread_bytes,
    tile_spread_largest,
    tile_spread_narrow,
    tile_stream,
)


def _matrices(finite: list[float], taps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the transforms of inputs, filters and outputs for these points and infinity."""
    size = len(finite) + 1
    inputs, filters = np.zeros((size, size)), np.zeros((size, taps))
    for i, x in enumerate(finite):
        others = [y for y in finite if y != x]
        sign = -1 if not x and size == 4 else 1  # makes the first row of both transforms positive
        inputs[i, :-1] = sign * np.poly(others)[::-1]
        filters[i] = sign * x ** np.arange(taps) / np.prod([x - y for y in others])
    inputs[-1], filters[-1, -1] = np.poly(finite)[::-1], 1  # the polynomial with these roots, lowest power first
    outputs = np.array([[x**i for x in finite] + [float(i == size - taps)] for i in range(size - taps + 1)])
    return inputs, filters, outputs


_inputs43, _filters43, _outputs43 = map(make_transform, _matrices([0, 0.75, -0.75, 1.5, -1.5], 3))
_inputs23, _filters23, _outputs23 = map(make_transform, _matrices([0, 1, -1], 3))

_inputs, _filters, _outputs = _matrices([0.6, -0.6, 1.2, -1.2], 2)
_inputs42, _outputs42 = make_transform(_inputs), make_transform(_outputs)
_first, _last = (_filters @ np.array(merged) for merged in ([[1, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 1, 1]]))
_filters42 = make_transform(_first, _first)
_filters42_right = make_transform(_first, _last)
_filters42_down = make_transform(_last, _first)
_filters42_down_right = make_transform(_last, _last)


@inline
def transform_input(table, offset, target, stride, step, taps):
    """Transform a vector of each pixel of a tile, at ``table[pixel] + offset``; part i goes to target + i * stride."""
    if taps == 2:
        tile_spread(_inputs42(tile_gather(table, offset, 5, 5)), target, stride)
    elif step == 4:
        tile_spread(_inputs43(tile_gather(table, offset, 6, 6)), target, stride)
    else:
        tile_spread(_inputs23(tile_gather(table, offset, 4, 4)), target, stride)


@inline
def transform_input_pairs(table, offset, target, stride):
    """Transform a vector of each pixel of a tile for F(2, 3), as bfloat16."""
    tile_spread_narrow(_inputs23(tile_gather(table, offset, 4, 4)), target, stride)


@inline
def transform_filter_pairs(first, second, source_stride, target, stride):
    """Transform a vector of the filters of two channels for F(2, 3), as words of two bfloat16."""
    tiles = tile_load(first, source_stride, 3, 3), tile_load(second, source_stride, 3, 3)
    tile_spread(tile_interleave(_filters23(tiles[0]), _filters23(tiles[1])), target, stride)


@inline
def transform_input_largest(table, offset, target, stride, tops):
    """Transform a vector of each pixel of a tile for F(2, 3), and note the largest magnitudes of each part."""
    tile_spread_largest(_inputs23(tile_gather(table, offset, 4, 4)), target, stride, tops)


@inline
def transform_filter_largest(source, source_stride, target, stride, tops):
    """Transform a vector of filters for F(2, 3), and note the largest magnitudes of each part."""
    tile_spread_largest(_filters23(tile_load(source, source_stride, 3, 3)), target, stride, tops)


@inline
def transform_filter_bytes(source, next_filter, factors, factor_stride, target, stride, sums, sums_stride):
    """Transform a vector of the filters of four channels for F(2, 3), as words of four bytes.

    The filters lie `next_filter` bytes apart, the other arguments are those of `tile_spread_bytes`.
    """
    row = 3 * LANES * 4
    tile_spread_bytes(
        _filters23(tile_load(source, row, 3, 3)),
        _filters23(tile_load(source + next_filter, row, 3, 3)),
        _filters23(tile_load(source + 2 * next_filter, row, 3, 3)),
        _filters23(tile_load(source + 3 * next_filter, row, 3, 3)),
        factors, factor_stride, target, stride, sums, sums_stride,
    )  # fmt: skip


@inline
def transform_filter(source, source_stride, target, stride, step, taps, down, right):
    """Transform a vector of filters, whose 3x3 taps lie at source.

    For F(4, 2), `down` and `right` tell whether the last two taps are to be merged, or else the first two.
    """
    tile = tile_load(source, source_stride, 3, 3)
    if taps == 2:
        if down and right:
            tile_spread(_filters42_down_right(tile), target, stride)
        elif down:
            tile_spread(_filters42_down(tile), target, stride)
        elif right:
            tile_spread(_filters42_right(tile), target, stride)
        else:
            tile_spread(_filters42(tile), target, stride)
    elif step == 4:
        tile_spread(_filters43(tile), target, stride)
    else:
        tile_spread(_filters23(tile), target, stride)


def _make_finish(transform, step: int, taps: int):
    """Make the end of a form."""
    size = step + taps - 1

    @inline
    def write(tile, table, offset, bias, how):
        result = tile_add(transform(tile), load(bias))
        if how & ADD:
            result = tile_add(result, tile_gather(table, offset, step, step))
        if how & RELU:
            result = tile_relu(result)
        if how & PAST_CACHES:
            tile_stream(result, table, offset)
        else:
            tile_scatter(result, table, offset)

    @inline
    def finish(sums, stride, table, offset, bias, how):
        write(tile_collect(sums, stride, size, size), table, offset, bias, how)

    @inline
    def finish_bytes(sums, stride, zeros, scales, scale_stride, factors, table, offset, bias, how):
        tile = tile_collect_sums(sums, stride, zeros, scales, scale_stride, factors, size, size)
        write(tile, table, offset, bias, how)

    return finish, finish_bytes


(_finish43, _), (_finish23, finish_vector_bytes), (_finish42, _) = (
    _make_finish(_outputs43, 4, 3),
    _make_finish(_outputs23, 2, 3),
    _make_finish(_outputs42, 4, 2),
)


@inline
def finish_vector(sums, stride, table, offset, bias, step, taps, how):
    """Transform back the sums of one tile and vector of channels, add a vector of bias, write to the pixels."""
    if taps == 2:
        _finish42(sums, stride, table, offset, bias, how)
    elif step == 4:
        _finish43(sums, stride, table, offset, bias, how)
    else:
        _finish23(sums, stride, table, offset, bias, how)
