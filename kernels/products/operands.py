"""Inputs of less precise products: rows of float32 as words of two bfloat16, or of four bytes.

Bytes are symmetric about 0, with a scale for each row, so that the largest value of the row is 127: "dynamic
quantization per token". With float32 sums of whole numbers, or of products of bfloat16, the results of a row depend on
nothing but that row and the weight.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numba import carray, prange

from ..checks import address
from ..machine import isa
from ..machine.emit import LANES
from ..machine.jit import inline, kernel
from ..machine.memory import scratch
from ..machine.simd import float_pointer, larger, largest, load, splat, store_bytes, store_pairs
from ..machine.tiles import load_pairs_transposed, tile_spread
from .packing import words_of

_ROWS = 32  # of a task
_LEAST = np.float32(4e-37)  # what is less in a whole row counts as zeros: 127 divided by it could overflow


@inline
def _copy_tail(source, count, tail):
    """Copy fewer than a few vectors to a buffer of them that is zero."""
    row = carray(float_pointer(source), count)
    for j in range(count):
        tail[j] = row[j]


@inline
def scale_of(top, scale):
    """Write the scale that makes 127 the largest of values that go up to `top`, and return its inverse."""
    carray(float_pointer(scale), 1)[0] = top / np.float32(127)
    return np.float32(127) / top if top > _LEAST else np.float32(0)


@kernel(6, precision="bf16")
def _to_pairs(x, scale, rows, columns, words, out):
    """Write rows of bfloat16, an even number of them each, multiplied by the number at an address before."""
    factor = splat(carray(float_pointer(scale), 1)[0])
    step = 2 * LANES
    whole = columns // step * step
    for task in prange((rows + _ROWS - 1) // _ROWS):
        tail, narrow = np.zeros(step, np.float32), np.zeros(LANES, np.float32)
        for row in range(task * _ROWS, min((task + 1) * _ROWS, rows)):
            source, target = x + row * columns * 4, out + row * words * 4
            for j in range(0, whole, step):
                store_pairs(target + 2 * j, load(source + 4 * j) * factor, load(source + 4 * j + 4 * LANES) * factor)
            if whole < columns:
                _copy_tail(source + 4 * whole, columns - whole, tail)
                low, high = load(tail.ctypes.data), load(tail.ctypes.data + 4 * LANES)
                store_pairs(narrow.ctypes.data, low * factor, high * factor)
                rest = carray(float_pointer(target + 2 * whole), words - whole // 2)
                for j in range(words - whole // 2):
                    rest[j] = narrow[j]


@kernel(6, precision="bf16")
def _pair_rows(x, images, rows, columns, words, out):
    """Write each image, (rows, columns), transposed: `words` words for each column, of each two of its rows."""
    step = 2 * LANES
    row_blocks, column_blocks = (rows + step - 1) // step, (columns + LANES - 1) // LANES
    for task in prange(images * row_blocks):
        image, row = task // row_blocks, task % row_blocks * step
        copies = np.zeros((step, LANES), np.float32)
        spill = np.empty((LANES, LANES), np.float32)
        for block in range(column_blocks):
            column = block * LANES
            source = x + ((image * rows + row) * columns + column) * 4
            target = out + ((image * columns + column) * words + row // 2) * 4
            count, wide = min(step, rows - row), min(LANES, columns - column)
            if count == step and wide == LANES:
                tile_spread(load_pairs_transposed(source, columns * 4), target, words * 4)
                continue
            for i in range(step):
                copies[i, :] = 0
                if i < count:
                    _copy_tail(source + i * columns * 4, wide, copies[i])
            tile_spread(load_pairs_transposed(copies.ctypes.data, LANES * 4), spill.ctypes.data, LANES * 4)
            for i in range(wide):
                rest = carray(float_pointer(target + i * words * 4), (count + 1) // 2)
                for j in range((count + 1) // 2):
                    rest[j] = spill[i, j]


@kernel(6, precision="int8")
def _to_bytes(x, rows, columns, words, out, scales):
    """Write rows of bytes, a multiple of four each, and a scale for each row; NaN and infinity make it NaN."""
    whole = columns // LANES * LANES
    for task in prange((rows + _ROWS - 1) // _ROWS):
        tail, narrow = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
        for row in range(task * _ROWS, min((task + 1) * _ROWS, rows)):
            source, target = x + row * columns * 4, out + row * words * 4
            top = splat(np.float32(0))
            for j in range(0, whole, LANES):
                top = larger(top, load(source + 4 * j))
            if whole < columns:
                _copy_tail(source + 4 * whole, columns - whole, tail)
                top = larger(top, load(tail.ctypes.data))
            factor = splat(scale_of(largest(top), scales + row * 4))
            for j in range(0, whole, LANES):
                store_bytes(target + j, load(source + 4 * j) * factor)
            if whole < columns:
                store_bytes(narrow.ctypes.data, load(tail.ctypes.data) * factor)
                rest = carray(float_pointer(target + whole), words - whole // 4)
                for j in range(words - whole // 4):
                    rest[j] = narrow[j]


def as_words(x: np.ndarray, precision: str) -> tuple[int, int]:
    """Write x (..., k) as words to memory that the next call reuses; return the addresses of words and scales."""
    columns = x.shape[-1]
    rows, words = x.size // columns, words_of(columns, precision)
    if precision == "bf16":
        return address(as_pairs(x, "words")), 0
    out, scales = address(scratch.take("words", rows * words + LANES)), address(scratch.take("scales", rows))
    _to_bytes(address(x), rows, columns, words, out, scales)
    return out, scales


def as_pairs(x: np.ndarray, use: str, scale: float = 1.0) -> np.ndarray:
    """Write x (..., k), times a scale, as words of two bfloat16 to memory for a use; return it."""
    columns = x.shape[-1]
    rows, words = x.size // columns, words_of(columns, "bf16")
    out, factor = scratch.take(use, rows * words + LANES), np.array([scale], np.float32)
    _to_pairs(address(x), address(factor), rows, columns, words, address(out))
    return out


def as_transposed_pairs(x: np.ndarray, use: str) -> tuple[np.ndarray, int]:
    """Write x (n, rows, columns) as (n, columns, words), a word for each two rows; return it and the words of each."""
    n, rows, columns = x.shape
    words = words_of(rows, "bf16")
    words += -words % LANES + LANES  # not a multiple of 4 KB: their columns would compete for the cache
    out = scratch.take(use, n * columns * words)
    _pair_rows(address(x), n, rows, columns, words, address(out))
    return out, words


@lru_cache(maxsize=8)
def zero_words(words: int, precision: str) -> np.ndarray:
    """Words of zeros."""
    code = isa.tile().zero_point if precision == "int8" else 0
    return np.full(4 * words, code, np.uint8)
