"""Weights in panels: what the micro-kernel of `kernels.product` reads.

A panel holds ``WIDTH`` output channels: ``[chunk][tap][channel][WIDTH]``, float32. A chunk is a few hundred channels,
so that a panel's chunk and a block of inputs stay in the L2 cache. Checkpoints store weights the other way round,
``(c_out, c_in, kh, kw)``; packing transposes ``LANES x LANES`` blocks in registers and widens smaller dtypes.

A *gated* panel holds ``WIDTH / 2`` channels of the first half of the outputs and the same of the second half, so that
a gated activation finds both halves in one block.

A *low-rank update* of a weight, ``up @ down``, is added to what was packed: column k of the stored weight is row k of
``down.T``, so it is a product of the same micro-kernel, of as many steps as the rank is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numba import carray, prange

from kernels.arrays import address, check_weight
from kernels.jit import inline, kernel
from kernels.memory import aligned, scratch
from kernels.product import SIX, STRIDE, VECTORS, WIDTH, narrow1, product6
from kernels.simd import (
    BFLOAT16,
    E4M3,
    E5M2,
    FLOAT16,
    FLOAT32,
    LANES,
    byte_pointer,
    float_pointer,
    int_pointer,
    load,
    load_transposed,
    store,
    tile_scatter,
)

_CHUNK = 384  # channels of a chunk, at most
_CHUNK_COLUMNS = 3072  # channels times taps of a chunk, at most


@inline
def stored_size(kind):
    """Return the bytes of a value that is stored so."""
    if kind == FLOAT32:
        return 4
    return 2 if kind in (FLOAT16, BFLOAT16) else 1


@inline
def _pack_block(source, stride, kind, table, target):
    if kind == FLOAT32:
        tile_scatter(load_transposed(source, stride, FLOAT32), table, target)
    elif kind == FLOAT16:
        tile_scatter(load_transposed(source, stride, FLOAT16), table, target)
    elif kind == BFLOAT16:
        tile_scatter(load_transposed(source, stride, BFLOAT16), table, target)
    elif kind == E4M3:
        tile_scatter(load_transposed(source, stride, E4M3), table, target)
    else:
        tile_scatter(load_transposed(source, stride, E5M2), table, target)


@inline
def _pack_partial_block(source, stride, kind, rows, columns, offsets, target):
    """Pack a block of fewer than ``LANES`` rows or columns, through a zeroed copy."""
    size = stored_size(kind)
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
    size = stored_size(kind)
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


@inline
def update_panel(down, rank, up, channels, taps, chunk, table, spare, target):
    """Add a low-rank update to a packed panel.

    Row k of `down`, (channels * taps, rank), is for stored column k; `up` is a panel, [rank][WIDTH]. `table` is room
    for six addresses, `spare` for six rows of a panel.
    """
    for c in range(0, channels, chunk):
        depth = min(chunk, channels - c)
        for tap in range(taps):
            for first in range(0, depth, SIX):
                rows = min(SIX, depth - first)
                for i in range(SIX):
                    table[i] = down + ((c + first + min(i, rows - 1)) * taps + tap) * rank * 4
                product6(table.ctypes.data, 0, 4, up, spare, rank, True, 0, 0, 0)
                block = target + (c * taps + tap * depth + first) * STRIDE
                for j in range(0, rows * STRIDE, LANES * 4):
                    store(block + j, load(block + j) + load(spare + j))


@inline
def update_columns(down, rank, up, columns, table, spare, target):
    """Add a low-rank update to packed columns of one vector of outputs, [columns][LANES]; arguments as above."""
    for first in range(0, columns, SIX):
        rows = min(SIX, columns - first)
        for i in range(SIX):
            table[i] = down + (first + min(i, rows - 1)) * rank * 4
        narrow1(table.ctypes.data, 0, 4, up, spare, rank, True, 0, 0, 0)
        for i in range(rows):
            where = target + (first + i) * LANES * 4
            store(where, load(where) + load(spare + i * STRIDE))


@kernel(13)
def _pack(w, kind, c_out, channels, taps, chunk, gated, offsets, down, rank, up, panels, panel_count):
    """Pack all of w (c_out, channels, taps), with a low-rank update if there is one."""
    columns = channels * taps
    row_bytes = columns * stored_size(kind)
    for panel in prange(panel_count):
        target = panels + panel * columns * STRIDE
        pack_panel(w, kind, c_out, columns, row_bytes, gated, offsets, panel, target)
        if rank:
            table, spare = np.empty(SIX, np.int64), np.empty(SIX * WIDTH, np.float32)
            update_panel(
                down, rank, up + panel * rank * STRIDE, channels, taps, chunk, table, spare.ctypes.data, target
            )  # fmt: skip


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
class AdaptedWeight:
    """A stored weight with a low-rank update, accepted wherever a kernel takes a weight; see `add_low_rank`.

    Attributes
    ----------
    stored : ndarray
        The weight, ``(c_out, c_in, kh, kw)`` or ``(n, k)``.
    down : ndarray
        Float32 ``(c_in * kh * kw, rank)`` or ``(k, rank)``.
    up : PackedWeight
        Of ``(n, rank)``.
    """

    stored: np.ndarray
    down: np.ndarray
    up: PackedWeight

    @property
    def gated(self) -> bool:
        """Whether it serves a gated activation (`geglu`) and nothing else."""
        return self.up.gated

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.stored.shape

    @cached_property
    def filters(self) -> np.ndarray:
        """``down`` as checkpoints store it, ``(rank, c_in, kh, kw)`` or ``(rank, k)``."""
        return np.ascontiguousarray(self.down.T).reshape(-1, *self.shape[1:])

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it holds beside the stored weight."""
        return self.down.nbytes + self.up.nbytes


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight in panels of ``WIDTH`` output channels, accepted wherever a kernel takes a weight.

    Attributes
    ----------
    panels : ndarray
        Float32, 64-byte aligned.
    stored : ndarray or AdaptedWeight
        The weight that was packed, ``(c_out, c_in, kh, kw)`` or ``(n, k)``.
    gated : bool
        Whether it serves a gated activation (`geglu`) and nothing else.
    """

    panels: np.ndarray
    stored: np.ndarray | AdaptedWeight
    gated: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that was packed."""
        return self.stored.shape

    @property
    def nbytes(self) -> int:
        """Bytes of memory it holds."""
        return self.panels.nbytes


Weight = np.ndarray | AdaptedWeight | PackedWeight


def without_update(w: np.ndarray | AdaptedWeight) -> np.ndarray:
    """Return the stored weight."""
    return w.stored if isinstance(w, AdaptedWeight) else w


def update_address(w: np.ndarray | AdaptedWeight, first: int = 0) -> tuple[int, int, int]:
    """Return the address of an update's `down` from row `first` on, its rank and the address of `up`; zeros if none."""
    if not isinstance(w, AdaptedWeight):
        return 0, 0, 0
    rank = w.down.shape[1]
    return address(w.down) + first * rank * 4, rank, address(w.up.panels)


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


def pack(w: np.ndarray | AdaptedWeight, gated: bool = False) -> PackedWeight:
    """Pack a whole weight, (n, k) or (c_out, c_in, kh, kw)."""
    stored = without_update(w)
    (c_out, channels), taps = w.shape[:2], math.prod(w.shape[2:])
    count = panel_count(c_out, gated)
    panels = aligned(count * WIDTH * channels * taps)
    offsets = pack_offsets(channels, taps)
    _pack(
        address(stored), check_weight("w", stored, stored.ndim), c_out, channels, taps, chunk_size(channels, taps),
        int(gated), address(offsets), *update_address(w), address(panels), count,
    )  # fmt: skip
    return PackedWeight(panels, w, gated)


def pack_transposed(b: np.ndarray) -> PackedWeight:
    """Pack b (depth, columns) into memory that the next call uses again."""
    (depth, columns), count = b.shape, panel_count(b.shape[1])
    panels = scratch.take("matmul", count * depth * WIDTH)
    _pack_transposed(address(b), depth, columns, columns * 4, address(panels), count)
    return PackedWeight(panels, b.T)
