"""Weights in panels: what the micro-kernel of `kernels.product` reads.

A panel holds ``WIDTH`` output channels: ``[chunk][tap][channel][WIDTH]``, float32. A chunk is a few hundred channels,
so that a panel's chunk and a block of inputs stay in the L2 cache. Checkpoints store weights the other way round,
``(c_out, c_in, kh, kw)``; packing transposes ``LANES x LANES`` blocks in registers and widens half precision.

A *gated* panel holds ``WIDTH / 2`` channels of the first half of the outputs and the same of the second half, so that
a gated activation finds both halves in one block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numba import carray, prange

from kernels.arrays import address, check_weight
from kernels.jit import inline, kernel
from kernels.memory import aligned, scratch
from kernels.product import STRIDE, VECTORS, WIDTH
from kernels.simd import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    LANES,
    byte_pointer,
    float_pointer,
    int_pointer,
    load_transposed,
    tile_scatter,
)

_CHUNK = 384  # channels of a chunk, at most
_CHUNK_COLUMNS = 3072  # channels times taps of a chunk, at most


@inline
def _pack_block(source, stride, kind, table, target):
    if kind == FLOAT32:
        tile_scatter(load_transposed(source, stride, FLOAT32), table, target)
    elif kind == FLOAT16:
        tile_scatter(load_transposed(source, stride, FLOAT16), table, target)
    else:
        tile_scatter(load_transposed(source, stride, BFLOAT16), table, target)


@inline
def _pack_partial_block(source, stride, kind, rows, columns, offsets, target):
    """Pack a block of fewer than ``LANES`` rows or columns, through a zeroed copy."""
    size = 4 if kind == FLOAT32 else 2
    block = np.zeros(LANES * LANES, np.float32)
    spill = np.empty(LANES * LANES, np.float32)
    table = np.empty(LANES, np.int64)
    for i in range(rows):
        row = carray(byte_pointer(source + i * stride), columns * size)
        copy = carray(byte_pointer(block.ctypes.data + i * LANES * size), columns * size)
        for j in range(columns * size):
            copy[j] = row[j]
    where = carray(int_pointer(offsets), columns)
    for i in range(LANES):
        table[i] = where[i] if i < columns else spill.ctypes.data - target + i * LANES * 4
    _pack_block(block.ctypes.data, LANES * size, kind, table.ctypes.data, target)


@inline
def pack_columns(source, stride, kind, rows, columns, offsets, target):
    """Transpose up to ``LANES`` rows of stored weights; column k goes to the address ``target + offsets[k]``."""
    size = 4 if kind == FLOAT32 else 2
    k = 0
    if rows == LANES:
        while k + LANES <= columns:
            _pack_block(source + k * size, stride, kind, offsets + 8 * k, target)
            k += LANES
    while k < columns:
        valid = min(LANES, columns - k)
        _pack_partial_block(source + k * size, stride, kind, rows, valid, offsets + 8 * k, target)
        k += LANES


@inline
def first_row(panel, j, c_out, gated):
    """Return which output channel is the first of vector j of a panel, and how many channels the vector has."""
    if gated:
        part, within = j // (VECTORS // 2), j % (VECTORS // 2)
        o = panel * (WIDTH // 2) + within * LANES
        return part * (c_out // 2) + o, max(0, min(LANES, c_out // 2 - o))
    o = panel * WIDTH + j * LANES
    return o, max(0, min(LANES, c_out - o))


@inline
def pack_panel(w, kind, c_out, columns, row_bytes, gated, offsets, panel, target):
    """Pack one panel of w (c_out, columns), whose rows lie `row_bytes` apart; column k goes to target + offsets[k]."""
    for j in range(VECTORS):
        first, rows = first_row(panel, j, c_out, gated)
        pack_columns(w + first * row_bytes, row_bytes, kind, rows, columns, offsets, target + j * LANES * 4)


@kernel(8)
def _pack(w, kind, c_out, columns, gated, offsets, panels, panel_count):
    """Pack all of w (c_out, columns)."""
    row_bytes = columns * (4 if kind == FLOAT32 else 2)
    for panel in prange(panel_count):
        pack_panel(w, kind, c_out, columns, row_bytes, gated, offsets, panel, panels + panel * columns * STRIDE)


@kernel(6)
def _pack_transposed(b, depth, columns, stride, panels, panel_count):
    """Pack b (depth, columns), whose rows are `stride` bytes apart, as a weight that is stored the other way round."""
    for panel in prange(panel_count):
        valid = min(WIDTH, columns - panel * WIDTH)
        for k in range(depth):
            source = carray(float_pointer(b + k * stride + panel * STRIDE), valid)
            target = carray(float_pointer(panels + (panel * depth + k) * STRIDE), WIDTH)
            for j in range(valid):
                target[j] = source[j]
            for j in range(valid, WIDTH):
                target[j] = 0


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight in panels of ``WIDTH`` output channels, accepted wherever a kernel takes a weight.

    Attributes
    ----------
    panels : ndarray
        Float32, 64-byte aligned.
    stored : ndarray
        The weight that was packed, ``(c_out, c_in, kh, kw)`` or ``(n, k)``.
    gated : bool
        Whether it serves a gated activation (`geglu`) and nothing else.
    """

    panels: np.ndarray
    stored: np.ndarray
    gated: bool = False

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


@lru_cache(maxsize=256)
def pack_offsets(channels: int, taps: int) -> np.ndarray:
    """Byte offsets in a panel to which `channels * taps` stored columns go (int64)."""
    chunk = chunk_size(channels, taps)
    c, tap = np.divmod(np.arange(channels * taps), taps)
    start = c // chunk * chunk
    depth = np.minimum(chunk, channels - start)
    return (start * taps + tap * depth + c - start) * STRIDE


def panel_count(c_out: int, gated: bool = False) -> int:
    """Return how many panels a weight has."""
    return math.ceil(c_out / 2 / (WIDTH // 2)) if gated else math.ceil(c_out / WIDTH)


def pack(w: np.ndarray, gated: bool = False) -> PackedWeight:
    """Pack a whole stored weight, (n, k) or (c_out, c_in, kh, kw)."""
    (c_out, channels), taps = w.shape[:2], math.prod(w.shape[2:])
    count = panel_count(c_out, gated)
    panels = aligned(count * WIDTH * channels * taps)
    offsets = pack_offsets(channels, taps)
    _pack(
        address(w), check_weight("w", w, w.ndim), c_out, channels * taps, int(gated), address(offsets),
        address(panels), count,
    )  # fmt: skip
    return PackedWeight(panels, w, gated)


def pack_transposed(b: np.ndarray) -> PackedWeight:
    """Pack b (depth, columns) into memory that the next call uses again."""
    (depth, columns), count = b.shape, panel_count(b.shape[1])
    panels = scratch.take("matmul", count * depth * WIDTH)
    _pack_transposed(address(b), depth, columns, columns * 4, address(panels), count)
    return PackedWeight(panels, b.T)
