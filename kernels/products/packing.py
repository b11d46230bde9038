"""Weights in panels: what the micro-kernel of `products.microkernel` reads.

A panel holds ``WIDTH`` output channels: ``[chunk][tap][channel][WIDTH]``, float32. A chunk is a few hundred channels,
so that a panel's chunk and a block of inputs stay in the L2 cache. Checkpoints store weights the other way round,
``(c_out, c_in, kh, kw)``; packing transposes ``LANES x LANES`` blocks in registers and widens smaller dtypes.

A *gated* panel holds ``WIDTH / 2`` channels of the first half of the outputs and the same of the second half, so that
a gated activation finds both halves in one block.

Panels for less precise products consist of *words* of 32 bits, each of as many neighbouring channels as fit: two
bfloat16, or four bytes. A panel is then ``[word][WIDTH]``, and words take the place of channels.

A *low-rank update* of a weight, ``up @ down``, is added to what was packed: column k of the stored weight is row k of
``down.T``, so it is a product of the same micro-kernel, of as many steps as the rank is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numba import carray, prange

from ..checks import address, check_weight
from ..dtypes import float8_e4m3, kind_of
from ..machine import isa
from ..machine.emit import BFLOAT16, E4M3, E5M2, FLOAT16, FLOAT32, INT8, LANES
from ..machine.jit import inline, kernel
from ..machine.memory import aligned, scratch
from ..machine.simd import byte_pointer, float_pointer, int_pointer, load, store
from ..machine.tiles import load_transposed, load_words, tile_scale, tile_scatter, tile_spread
from ..quantize import QuantizedWeight
from .microkernel import SIX, STRIDE, VECTORS, WIDTH, narrow1, product6

GROUPS = {"f32": 1, "bf16": 2, "int8": 4}  # precision of products -> channels in a word
_CHUNK = 384  # channels of a chunk, at most
_CHUNK_COLUMNS = 3072  # channels times taps of a chunk, at most


@inline
def stored_size(kind):
    """Return the bytes of a value that is stored so."""
    if kind == FLOAT32:
        return 4
    return 2 if kind in (FLOAT16, BFLOAT16) else 1


@inline
def _pack_block(source, stride, kind, scales, table, target):
    if kind == INT8:
        tile_scatter(tile_scale(load_transposed(source, stride, INT8), load(scales)), table, target)
    elif kind == FLOAT32:
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
def _copy_rows(source, stride, rows, row_bytes, target, target_stride):
    for i in range(rows):
        row = carray(byte_pointer(source + i * stride), row_bytes)
        copy = carray(byte_pointer(target + i * target_stride), row_bytes)
        for j in range(row_bytes):
            copy[j] = row[j]


@inline
def _pack_partial_block(source, stride, kind, scales, rows, columns, offsets, target):
    """Pack a block of fewer than ``LANES`` rows or columns, through a zeroed copy."""
    size = stored_size(kind)
    block = np.zeros(2 * LANES * LANES, np.float32)  # and room for what lies beyond the last column: see `machine.jit`
    table = np.empty(LANES, np.int64)
    _copy_rows(source, stride, rows, columns * size, block.ctypes.data, LANES * size)
    where, spill = carray(int_pointer(offsets), columns), block.ctypes.data + LANES * LANES * 4 - target
    for i in range(LANES):
        table[i] = where[i] if i < columns else spill + i * LANES * 4
    _pack_block(block.ctypes.data, LANES * size, kind, scales, table.ctypes.data, target)


@inline
def pack_columns(source, stride, kind, scales, rows, columns, offsets, target):
    """Transpose up to ``LANES`` rows of stored weights; column k goes to the address ``target + offsets[k]``.

    Rows of the kind `INT8` are multiplied by their scales, of which there must be ``LANES``.
    """
    size = stored_size(kind)
    k = 0
    if rows == LANES:
        while k + LANES <= columns:
            _pack_block(source + k * size, stride, kind, scales, offsets + 8 * k, target)
            k += LANES
    while k < columns:
        valid = min(LANES, columns - k)
        _pack_partial_block(source + k * size, stride, kind, scales, rows, valid, offsets + 8 * k, target)
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


def _make_pack_words(group: int):
    """Make the function that transposes up to ``LANES`` rows of stored weights, in words of `group` of them.

    Word k goes to ``target + k * STRIDE``; beyond the last column there are zeros. Values of the kind `INT8` stay
    whole numbers.
    """

    @inline
    def pack_block(source, stride, kind, target, target_stride):
        if kind == INT8:
            tile_spread(load_words(source, stride, INT8, group), target, target_stride)
        elif kind == FLOAT32:
            tile_spread(load_words(source, stride, FLOAT32, 2), target, target_stride)
        elif kind == FLOAT16:
            tile_spread(load_words(source, stride, FLOAT16, 2), target, target_stride)
        elif kind == BFLOAT16:
            tile_spread(load_words(source, stride, BFLOAT16, 2), target, target_stride)
        elif kind == E4M3:
            tile_spread(load_words(source, stride, E4M3, 2), target, target_stride)
        else:
            tile_spread(load_words(source, stride, E5M2, 2), target, target_stride)

    @inline
    def pack_words(source, stride, kind, rows, columns, target):
        size = stored_size(kind)
        step = LANES * group
        for k in range(0, columns, step):
            if rows == LANES and k + step <= columns:
                pack_block(source + k * size, stride, kind, target + k // group * STRIDE, STRIDE)
                continue
            valid = min(step, columns - k)
            block = np.zeros(LANES * step, np.float32)
            spill = np.empty(LANES * LANES, np.float32)
            _copy_rows(source + k * size, stride, rows, valid * size, block.ctypes.data, step * size)
            pack_block(block.ctypes.data, step * size, kind, spill.ctypes.data, LANES * 4)
            for i in range((valid + group - 1) // group):
                store(target + (k // group + i) * STRIDE, load(spill.ctypes.data + i * LANES * 4))

    @inline
    def pack_panel_of_words(w, kind, c_out, columns, row_bytes, gated, panel, target):
        for j in range(VECTORS):
            first, rows = first_row(panel, j, c_out, gated)
            pack_words(w + first * row_bytes, row_bytes, kind, rows, columns, target + j * LANES * 4)

    return pack_panel_of_words


@inline
def pack_panel(w, kind, scales, c_out, columns, row_bytes, gated, offsets, panel, target):
    """Pack one panel of w (c_out, columns), whose rows lie `row_bytes` apart; column k goes to target + offsets[k]."""
    for j in range(VECTORS):
        first, rows = first_row(panel, j, c_out, gated)
        pack_columns(
            w + first * row_bytes, row_bytes, kind, scales + first * 4, rows, columns, offsets, target + j * LANES * 4
        )


# The same for words; column k goes to word k // group.
pack_pairs, pack_bytes = _make_pack_words(2), _make_pack_words(4)


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


@kernel(14)
def _pack(w, kind, scales, c_out, channels, taps, chunk, gated, offsets, down, rank, up, panels, panel_count):
    """Pack all of w (c_out, channels, taps), with a low-rank update if there is one."""
    columns = channels * taps
    row_bytes = columns * stored_size(kind)
    for panel in prange(panel_count):
        target = panels + panel * columns * STRIDE
        pack_panel(w, kind, scales, c_out, columns, row_bytes, gated, offsets, panel, target)
        if rank:
            table, spare = np.empty(SIX, np.int64), np.empty(SIX * WIDTH, np.float32)
            update_panel(
                down, rank, up + panel * rank * STRIDE, channels, taps, chunk, table, spare.ctypes.data, target
            )  # fmt: skip


@kernel(7, precision="bf16")
def _pack_pairs(w, kind, c_out, columns, gated, panels, panel_count):
    """Pack all of w (c_out, columns) in words of two."""
    words, row_bytes = (columns + 1) // 2, columns * stored_size(kind)
    for panel in prange(panel_count):
        pack_pairs(w, kind, c_out, columns, row_bytes, gated, panel, panels + panel * words * STRIDE)


@kernel(6, precision="int8")
def _pack_bytes(w, c_out, columns, gated, panels, panel_count):
    """Pack all of w (c_out, columns) in words of four."""
    words = (columns + 3) // 4
    for panel in prange(panel_count):
        pack_bytes(w, INT8, c_out, columns, columns, gated, panel, panels + panel * words * STRIDE)


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
    stored : ndarray or QuantizedWeight
        The weight, ``(c_out, c_in, kh, kw)`` or ``(n, k)``.
    down : ndarray
        Float32 ``(c_in * kh * kw, rank)`` or ``(k, rank)``.
    up : PackedWeight
        Of ``(n, rank)``.
    """

    stored: np.ndarray | QuantizedWeight
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
        Float32, or words that pass as such, 64-byte aligned.
    stored : ndarray, QuantizedWeight or AdaptedWeight
        The weight that was packed, ``(c_out, c_in, kh, kw)`` or ``(n, k)``.
    gated : bool
        Whether it serves a gated activation (`geglu`) and nothing else.
    precision : str
        Which products it serves, and no others.
    """

    panels: np.ndarray
    stored: np.ndarray | QuantizedWeight | AdaptedWeight
    gated: bool = False
    precision: str = "f32"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that was packed."""
        return self.stored.shape

    @property
    def nbytes(self) -> int:
        """Bytes of memory it holds."""
        return self.panels.nbytes


StoredWeight = np.ndarray | QuantizedWeight | AdaptedWeight  # as checkpoints have them, perhaps with an update
Weight = StoredWeight | PackedWeight


def check_precision(precision: str) -> None:
    """Raise unless this CPU can do such products."""
    if precision not in GROUPS:
        raise ValueError(f"precision: found {precision!r}, expected one of {', '.join(GROUPS)}")
    able = isa.tile().precisions
    if precision not in able:
        raise ValueError(f"precision: found {precision!r}, expected one of those of this CPU: {', '.join(able)}")


def check_stored(w: StoredWeight, ndim: int) -> None:
    """Raise unless w is a weight that is not packed, of `ndim` dimensions."""
    plain = without_update(w)
    if isinstance(plain, QuantizedWeight):
        plain = plain.values.view(float8_e4m3)  # for the check of its shape: values have been checked
    check_weight("w", plain, ndim)


def without_update(w: StoredWeight) -> np.ndarray | QuantizedWeight:
    """Return the stored weight."""
    return w.stored if isinstance(w, AdaptedWeight) else w


def array_of(w: Weight) -> np.ndarray:
    """Return the array that holds a weight's values."""
    if isinstance(w, PackedWeight):
        return w.panels
    plain = without_update(w)
    return plain.values if isinstance(plain, QuantizedWeight) else plain


def stored_address(w: Weight, first: int = 0) -> tuple[int, int, int]:
    """Return the address of a weight's values from element `first` on, their kind, and the address of the scales.

    For a packed weight, only the address of the scales; they multiply its products.
    """
    if isinstance(w, PackedWeight):
        if isinstance(w.stored, QuantizedWeight) and w.precision != "f32":
            return 0, 0, address(w.stored.scales)
        return 0, 0, 0
    plain = without_update(w)
    if isinstance(plain, QuantizedWeight):
        return address(plain.values) + first, INT8, address(plain.scales)
    return address(plain) + first * plain.itemsize, kind_of("w", plain), 0


def update_address(w: StoredWeight, first: int = 0) -> tuple[int, int, int]:
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


def pack(w: StoredWeight, gated: bool = False, precision: str = "f32") -> PackedWeight:
    """Pack a whole weight, (n, k) or (c_out, c_in, kh, kw); one tap and no update unless in f32."""
    (c_out, channels), taps = w.shape[:2], math.prod(w.shape[2:])
    count, (where, kind, scales) = panel_count(c_out, gated), stored_address(w)
    panels = aligned(count * WIDTH * words_of(channels, precision) * taps)
    if precision == "bf16":
        _pack_pairs(where, kind, c_out, channels, int(gated), address(panels), count)
    elif precision == "int8":
        _pack_bytes(where, c_out, channels, int(gated), address(panels), count)
    else:
        offsets = pack_offsets(channels, taps)
        _pack(
            where, kind, scales, c_out, channels, taps, chunk_size(channels, taps),
            int(gated), address(offsets), *update_address(w), address(panels), count,
        )  # fmt: skip
    return PackedWeight(panels, w, gated, precision)


def words_of(channels: int, precision: str) -> int:
    """Return how many words of 32 bits hold the channels of a pixel."""
    return math.ceil(channels / GROUPS[precision])


def pack_transposed(b: np.ndarray) -> PackedWeight:
    """Pack b (depth, columns) into memory that the next call uses again."""
    (depth, columns), count = b.shape, panel_count(b.shape[1])
    panels = scratch.take("matmul", count * depth * WIDTH)
    _pack_transposed(address(b), depth, columns, columns * 4, address(panels), count)
    return PackedWeight(panels, b.T)
