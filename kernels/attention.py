"""Scaled dot-product attention that never holds the matrix of scores: self, cross and causal.

For a block of queries and one head, scores are made for a block of keys at a time, turned into weights with a running
maximum and a running sum, and multiplied with the values at once (Milakov and Gimelshein, "Online normalizer
calculation for softmax", arXiv:1805.02867; Dao et al., "FlashAttention", arXiv:2205.14135).

- Keys are packed per head like weights (`kernels.gemm`), values with their width rounded up to whole vectors.
- Queries are copied per block, multiplied by ``log2(e) / sqrt(d)``, so that the softmax works in base 2.
- Both products use the register tile of the matrix product, 6 rows at a time; rows are padded to a multiple of 6 in
  scratch memory, and columns to single vectors, so 77 keys cost 80 and heads of 40 cost 48.
"""

from __future__ import annotations

import math

import numpy as np
from numba import carray, prange

from kernels.arrays import address, check_array, output
from kernels.gemm import VECTORS, WIDTH, make_product, pack_columns, pack_offsets, scratch
from kernels.jit import inline, kernel, threads
from kernels.simd import (
    FLOAT32,
    LANES,
    exp2,
    float_pointer,
    highest,
    load,
    maximum,
    next_task,
    splat,
    store,
    total,
)

_QUERIES = 72  # rows of a block of queries, at most
_KEYS = 512  # columns of a block of keys, at most
_MASKED = np.float32(-np.inf)

_product_1 = make_product(6, 1)
_product_2 = make_product(6, min(2, VECTORS))
_product_3 = make_product(6, min(3, VECTORS))
_product_4 = make_product(6, min(4, VECTORS))


@inline
def _product(table, rows, b, b_stride, out, out_stride, depth, vectors, fresh):
    """Product of the rows in the table, in sixes, and 1 to ``VECTORS`` vectors of b."""
    for i in range(0, rows, 6):
        a, target = table + 8 * i, out + i * out_stride
        if vectors == 4:
            _product_4(a, 0, b, b_stride, target, out_stride, depth, fresh)
        elif vectors == 3:
            _product_3(a, 0, b, b_stride, target, out_stride, depth, fresh)
        elif vectors == 2:
            _product_2(a, 0, b, b_stride, target, out_stride, depth, fresh)
        else:
            _product_1(a, 0, b, b_stride, target, out_stride, depth, fresh)


@kernel(13)
def _pack_heads(k, v, n, tk, c, heads, offsets, keys, key_bytes, values, value_stride, value_bytes, workers):
    """Pack the keys of each head into panels and copy its values, padded with zeros to whole vectors."""
    d = c // heads
    panels = (tk + WIDTH - 1) // WIDTH
    counter = np.zeros(1, np.int64)
    for _ in prange(workers):
        task = next_task(counter.ctypes.data)
        while task < n * heads * panels:
            head, panel = task // panels, task % panels
            first = panel * WIDTH
            source = ((head // heads) * tk + first) * c * 4 + (head % heads) * d * 4
            for j in range(VECTORS):
                rows = max(0, min(LANES, tk - first - j * LANES))
                target = keys + head * key_bytes + panel * d * WIDTH * 4 + j * LANES * 4
                pack_columns(k + source + j * LANES * c * 4, c * 4, FLOAT32, rows, d, offsets, target)
            for i in range(min(WIDTH, tk - first)):
                a = carray(float_pointer(v + source + i * c * 4), d)
                b = carray(float_pointer(values + head * value_bytes + (first + i) * value_stride), value_stride // 4)
                for j in range(d):
                    b[j] = a[j]
                for j in range(d, value_stride // 4):
                    b[j] = 0
            task = next_task(counter.ctypes.data)


@inline
def _softmax_row(scores, columns, old):
    """Replace scores by 2**(score - maximum); return the new running maximum and the sum of the row."""
    step = LANES * 4
    top = splat(_MASKED)
    top1, top2, top3 = top, top, top
    whole = columns // (4 * LANES) * (4 * LANES)
    for j in range(0, whole, 4 * LANES):
        p = scores + 4 * j
        top = maximum(load(p), top)
        top1 = maximum(load(p + step), top1)
        top2 = maximum(load(p + 2 * step), top2)
        top3 = maximum(load(p + 3 * step), top3)
    for j in range(whole, columns, LANES):
        top = maximum(load(scores + 4 * j), top)
    peak = max(old, highest(maximum(maximum(top, top1), maximum(top2, top3))))
    shift = splat(peak)
    added = splat(np.float32(0))
    for j in range(0, columns, LANES):
        e = exp2(load(scores + 4 * j) - shift)
        store(scores + 4 * j, e)
        added = added + e
    return peak, total(added)


@inline
def _scale_row(row, factor, vectors):
    scale = splat(factor)
    for j in range(vectors):
        store(row + j * LANES * 4, load(row + j * LANES * 4) * scale)


@inline
def _power2(x):
    return highest(exp2(splat(x)))


@kernel(17)
def _attend(
    q, keys, key_bytes, values, value_stride, value_bytes, out, n, tq, tk, c, heads, causal, block, key_block,
    scratch_rows, workers,
):  # fmt: skip
    """Attention of blocks of `block` queries; scratch_rows is the block rounded up to a multiple of 6."""
    d = c // heads
    scale = np.float32(math.log2(math.e) / math.sqrt(d))
    blocks, vectors = (tq + block - 1) // block, value_stride // (4 * LANES)
    counter = np.zeros(1, np.int64)
    for _ in prange(workers):
        queries = np.zeros((scratch_rows, d), np.float32)
        scores = np.empty((scratch_rows, key_block), np.float32)
        sums = np.empty((scratch_rows, vectors * LANES), np.float32)
        peak = np.empty(scratch_rows, np.float32)
        norm = np.empty(scratch_rows, np.float32)
        tables = np.empty((2, scratch_rows), np.int64)
        score_stride = key_block * 4
        for i in range(scratch_rows):
            tables[0, i] = queries.ctypes.data + i * d * 4
            tables[1, i] = scores.ctypes.data + i * score_stride
        query_rows, score_rows = tables.ctypes.data, tables.ctypes.data + scratch_rows * 8
        task = next_task(counter.ctypes.data)
        while task < n * heads * blocks:
            head, query0 = task // blocks, (task % blocks) * block
            rows = min(block, tq - query0)
            padded = (rows + 5) // 6 * 6
            start = ((head // heads) * tq + query0) * c * 4 + (head % heads) * d * 4
            for i in range(rows):
                source = carray(float_pointer(q + start + i * c * 4), d)
                for j in range(d):
                    queries[i, j] = source[j] * scale
            peak[:] = _MASKED
            norm[:] = 0
            sums[:] = 0
            last = min(tk, query0 + rows) if causal else tk
            for key0 in range(0, last, key_block):
                count = min(key_block, tk - key0)
                columns = (count + LANES - 1) // LANES * LANES
                for j in range(0, columns, WIDTH):
                    panel = keys + head * key_bytes + (key0 + j) * d * 4
                    _product(
                        query_rows, padded, panel, WIDTH * 4, scores.ctypes.data + j * 4, score_stride, d,
                        min(VECTORS, (columns - j) // LANES), True,
                    )  # fmt: skip
                for i in range(rows):
                    seen = min(count, query0 + i + 1 - key0) if causal else count
                    for j in range(max(seen, 0), columns):
                        scores[i, j] = _MASKED
                    row = sums.ctypes.data + i * value_stride
                    old = peak[i]
                    peak[i], added = _softmax_row(scores.ctypes.data + i * score_stride, columns, old)
                    if peak[i] != old:
                        fade = _power2(old - peak[i])
                        norm[i] *= fade
                        _scale_row(row, fade, vectors)
                    norm[i] += added
                done = 0
                while done < vectors:
                    left = (vectors - done + VECTORS - 1) // VECTORS
                    width = (vectors - done + left - 1) // left  # 5 vectors as 3 + 2, not 4 + 1
                    part = done * LANES * 4
                    block_values = values + head * value_bytes + key0 * value_stride + part
                    _product(
                        score_rows, padded, block_values, value_stride, sums.ctypes.data + part, value_stride, count,
                        width, False,
                    )  # fmt: skip
                    done += width
            for i in range(rows):
                target = carray(float_pointer(out + start + i * c * 4), d)
                factor = np.float32(1) / norm[i]
                for j in range(d):
                    target[j] = sums[i, j] * factor
            task = next_task(counter.ctypes.data)


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    heads: int,
    causal: bool = False,
    *,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Multi-head attention ``softmax(q k^T / sqrt(c / heads)) v`` of each head.

    Parameters
    ----------
    q : ndarray
        Float32 ``(n, tq, c)``, C-contiguous; head i has the channels ``i*c/heads .. (i+1)*c/heads``.
    k, v : ndarray
        Float32 ``(n, tk, c)``.
    heads : int
        Number of heads; divides c.
    causal : bool
        Let query i see the keys 0..i only.
    out : ndarray, optional
        Float32 ``(n, tq, c)`` to write to.

    Returns
    -------
    ndarray
        Float32 ``(n, tq, c)``.

    Raises
    ------
    TypeError, ValueError
        If a dtype, shape or layout is not as above.
    """
    for name, array in (("q", q), ("k", k), ("v", v)):
        check_array(name, array, 3)
    (n, tq, c), tk = q.shape, k.shape[1]
    if k.shape != (n, tk, c) or v.shape != k.shape or not tk:
        raise ValueError(
            f"k, v: found shapes {k.shape} and {v.shape} for q {q.shape}, expected ({n}, keys, {c}) for both"
        )
    if not isinstance(heads, (int, np.integer)) or heads < 1 or c % heads or not c:
        raise ValueError(f"heads: found {heads!r} for {c} channels, expected a whole number that divides them")
    out = output(out, q.shape, q, k, v)
    if not out.size:
        return out
    d = c // heads
    value_width = math.ceil(d / LANES) * LANES
    key_floats = math.ceil(tk / WIDTH) * WIDTH * d
    keys = address(scratch.take("keys", n * heads * key_floats))
    values = address(scratch.take("values", n * heads * tk * value_width))
    layout = (keys, key_floats * 4, values, value_width * 4, tk * value_width * 4)
    offsets = pack_offsets(d, 1, d)
    _pack_heads(address(k), address(v), n, tk, c, heads, address(offsets), *layout, threads())
    block = math.ceil(tq / math.ceil(tq / _QUERIES))
    key_block = min(_KEYS, math.ceil(tk / WIDTH) * WIDTH)
    _attend(
        address(q), *layout, address(out), n, tq, tk, c, heads, int(causal), block, key_block,
        math.ceil(block / 6) * 6, threads(),
    )  # fmt: skip
    return out
