"""Scaled dot-product attention that never holds the matrix of scores: self, cross and causal.

For a block of queries and one head, scores are made for a block of keys at a time, turned into weights with a running
maximum and a running sum, and multiplied with the values at once (Milakov and Gimelshein, "Online normalizer
calculation for softmax", arXiv:1805.02867; Dao et al., "FlashAttention", arXiv:2205.14135).

Everything is transposed: a panel of ``WIDTH`` queries lies along the vector lanes, so

    scores (keys, queries) = k (keys, d) @ q^T (d, queries)        out^T (d, queries) += v^T (d, keys) @ weights

are products of rows of k, and of columns of v, with panels (`products.microkernel`): keys and values are read where
they are, unpacked; the softmax runs down the panel without a sum across lanes; and no size but the last few queries is
padded, be it 77 keys or heads of 40 channels.

The peak that is subtracted from a query's scores need not be their maximum: any number not far below serves. So a block
after the first keeps the peaks that it finds and makes its weights out of scores that are still in registers; if one of
them grows too large, the block is done again, and that query's peak moves.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numba import carray, prange

from .checks import address, check_array, output
from .machine import isa
from .machine.emit import BFLOAT16, FLOAT32, LANES
from .machine.jit import inline, inline_exact, kernel, threads
from .machine.memory import scratch
from .machine.ops import op
from .machine.simd import choose, exp2, float_pointer, highest, load, maximum, next_task, pair, splat, store
from .machine.tiles import (
    load_transposed,
    row_addresses,
    tile_dot_bf16,
    tile_fma,
    tile_pair,
    tile_scatter,
    tile_store,
    tile_weights,
    tile_zero,
)
from .products.microkernel import SIX, STRIDE, VECTORS, WIDTH, product_pairs, product_rows
from .products.operands import as_pairs, as_transposed_pairs
from .products.packing import check_precision, pack_columns, pack_pairs

_HUGE = np.float32(2.0**24)  # the sum of a block's weights from which on the peak moves
_PANELS = 2  # panels of queries of a task, at most: they share the keys and values that they bring into the cache
_KEYS = 126  # keys of a block, at most; a multiple of six
_MASKED = np.float32(-np.inf)


@inline
def _fill(address, size, value):
    vector = splat(value)
    for i in range(0, size, LANES * 4):
        store(address + i, vector)


@inline
def _pack_queries(q, stride, count, d, offsets, panel):
    """Transpose up to ``WIDTH`` queries into a panel, times log2(e) / sqrt(d): the softmax works in base 2."""
    for j in range(VECTORS):
        rows = max(0, min(LANES, count - j * LANES))
        pack_columns(q + j * LANES * stride, stride, FLOAT32, 0, rows, d, offsets, panel + j * LANES * 4)
    scale = splat(np.float32(math.log2(math.e) / math.sqrt(d)))
    for k in range(0, d * STRIDE, LANES * 4):
        store(panel + k, load(panel + k) * scale)


@inline
def _mask(scores, key0, keys, query0):
    """Hide from each query the keys that come after it."""
    for i in range(max(0, query0 - key0), keys):
        row = carray(float_pointer(scores + i * STRIDE), WIDTH)
        for j in range(min(WIDTH, key0 + i - query0)):
            row[j] = _MASKED


def _make_weigh(multiply, pairs: bool):
    """Make the function that makes a panel's weights of a multiple of six keys, with known peaks.

    It adds up their sums. The queries are `depth` floats, or words; the weights become pairs if the products want them.
    """

    @inline_exact
    def weigh(key_rows, queries, scores, keys, depth, peaks, added):
        for i in range(0, keys, SIX):
            addresses = row_addresses(key_rows + 8 * i, SIX)
            acc = tile_zero(SIX, VECTORS)
            offset, panel = 0, queries
            for _ in range(depth // 2):
                acc = multiply(acc, addresses, offset, panel)
                acc = multiply(acc, addresses, offset + 4, panel + STRIDE)
                offset += 8
                panel += 2 * STRIDE
            if depth % 2:
                acc = multiply(acc, addresses, offset, panel)
            weights = tile_weights(acc, peaks, added)
            if pairs:
                tile_store(tile_pair(weights), scores + i // 2 * STRIDE, STRIDE)
            else:
                tile_store(weights, scores + i * STRIDE, STRIDE)

    return weigh


@inline
def _pair_weights(scores, keys, vectors):
    """Put the weights of each two keys together, in place."""
    zero = splat(np.float32(0))
    for i in range(0, keys, 2):
        for j in range(0, vectors * LANES * 4, LANES * 4):
            second = load(scores + (i + 1) * STRIDE + j) if i + 1 < keys else zero
            store(scores + i // 2 * STRIDE + j, pair(load(scores + i * STRIDE + j), second))


@inline
def _settle(added, norm):
    """Add a block's sums of weights to the norms and return True; or False if one is too large, or NaN."""
    one, zero = splat(np.float32(1)), splat(np.float32(0))
    bad = zero
    for j in range(0, STRIDE, LANES * 4):
        bad = maximum(bad, choose(load(added + j), splat(_HUGE), zero, one))
    if highest(bad) > 0:
        return False
    for j in range(0, STRIDE, LANES * 4):
        store(norm + j, load(norm + j) + load(added + j))
    return True


@inline_exact
def _softmax(scores, keys, peak, norm, sums, d, kept):
    """Turn one vector's scores into 2**(score - peak); update the running peak and norm, and rescale the sums.

    Where the vector at the address `kept` is not huge, or NaN, the peak stays.
    """
    old = load(peak)
    top, top1, top2, top3 = old, old, old, old
    i = 0
    while i + 4 <= keys:
        row = scores + i * STRIDE
        top = maximum(load(row), top)
        top1 = maximum(load(row + STRIDE), top1)
        top2 = maximum(load(row + 2 * STRIDE), top2)
        top3 = maximum(load(row + 3 * STRIDE), top3)
        i += 4
    while i < keys:
        top = maximum(load(scores + i * STRIDE), top)
        i += 1
    new = choose(load(kept), splat(_HUGE), old, maximum(maximum(top, top1), maximum(top2, top3)))
    store(peak, new)
    zero = splat(np.float32(0))
    added = zero
    for k in range(0, keys * STRIDE, STRIDE):
        weight = exp2(load(scores + k) - new)
        store(scores + k, weight)
        added = added + weight
    if highest(maximum(new - old, zero)) > 0:  # infinite lanes, whose difference is NaN, must not hide the others
        fade = exp2(old - new)
        store(norm, load(norm) * fade + added)
        for k in range(0, d * STRIDE, STRIDE):
            store(sums + k, load(sums + k) * fade)
    else:
        store(norm, load(norm) + added)


@inline
def _write(sums, norm, d, out, stride, count, table, spill):
    """Divide the sums by the norm, transpose them and write them to up to ``WIDTH`` rows of the output."""
    for j in range(0, count, LANES):
        share = splat(np.float32(1)) / load(norm + j * 4)
        for k in range(0, d * STRIDE, STRIDE):
            store(sums + k + j * 4, load(sums + k + j * 4) * share)
        valid = min(LANES, count - j)
        for k in range(0, d, LANES):
            channels = min(LANES, d - k)
            for i in range(LANES):
                table[i] = spill + i * LANES * 4
                if i < valid and channels == LANES:
                    table[i] = out + (j + i) * stride + k * 4
            tile_scatter(load_transposed(sums + k * STRIDE + j * 4, STRIDE, FLOAT32), table.ctypes.data, 0)
            if channels < LANES:
                for i in range(valid):
                    source = carray(float_pointer(spill + i * LANES * 4), channels)
                    target = carray(float_pointer(out + (j + i) * stride + k * 4), channels)
                    for m in range(channels):
                        target[m] = source[m]


def _make_work(multiply, product_rows, pairs: bool):
    """Make what a worker does, see `_attend`: tasks until there are none left."""
    weigh = _make_weigh(multiply, pairs)

    @inline
    def work(
        q, k, v, out, n, tq, tk, c, heads, causal, group, groups, key_block, offsets, value_words, buffer, counter
    ):
        d, stride = c // heads, c * 4
        depth, size = ((d + 1) // 2, 2) if pairs else (d, 4)  # of a head of keys, and bytes of each channel
        step = 4 if pairs else stride  # from a word or float of a channel's values to the next
        sum_rows = (d + LANES - 1) // LANES * LANES + SIX
        queries = buffer
        scores = queries + group * depth * STRIDE
        sums = scores + (key_block + SIX) * STRIDE
        peaks = sums + group * sum_rows * STRIDE
        norms = peaks + group * STRIDE
        added = norms + group * STRIDE
        key_rows = np.empty(key_block + SIX, np.int64)
        value_rows = np.empty(d + SIX, np.int64)
        table = np.empty(LANES, np.int64)
        spill = np.empty(LANES * LANES, np.float32)
        task = next_task(counter)
        while task < n * heads * groups:
            image, head = task // groups // heads, task // groups % heads
            query0 = task % groups * group * WIDTH
            rows = min(group * WIDTH, tq - query0)
            panels = (rows + WIDTH - 1) // WIDTH
            start = image * tq + query0
            for p in range(panels):
                count, panel = min(WIDTH, rows - p * WIDTH), queries + p * depth * STRIDE
                source = q + ((start + p * WIDTH) * c + head * d) * size
                if pairs:
                    pack_pairs(source, BFLOAT16, count, d, c * 2, 0, 0, panel)
                else:
                    _pack_queries(source, stride, count, d, offsets, panel)
            _fill(peaks, group * STRIDE, _MASKED)
            _fill(norms, group * STRIDE, np.float32(0))
            _fill(sums, group * sum_rows * STRIDE, np.float32(0))
            last = min(tk, query0 + rows) if causal else tk
            for key0 in range(0, last, key_block):
                count = min(key_block, last - key0)
                first = (image * tk + key0) * c + head * d
                for i in range(count + SIX):
                    key_rows[i] = k + (first + min(i, count - 1) * c) * size
                for i in range(d + SIX):
                    channel = min(i, d - 1)
                    value_rows[i] = v + (first + channel) * 4
                    if pairs:
                        value_rows[i] = v + ((image * c + head * d + channel) * value_words + key0 // 2) * 4
                for p in range(panels):
                    query = query0 + p * WIDTH
                    vectors = (min(WIDTH, tq - query) + LANES - 1) // LANES
                    keys = min(count, query + WIDTH - key0) if causal else count
                    if keys <= 0:
                        continue
                    panel, total = queries + p * depth * STRIDE, sums + p * sum_rows * STRIDE
                    peak, norm = peaks + p * STRIDE, norms + p * STRIDE
                    settled = False
                    _fill(added, STRIDE, _HUGE)
                    if key0 and not causal and keys % SIX == 0 and vectors == VECTORS:
                        _fill(added, STRIDE, np.float32(0))
                        weigh(key_rows.ctypes.data, panel, scores, keys, depth, peak, added)
                        settled = _settle(added, norm)
                    if not settled:
                        product_rows(
                            key_rows.ctypes.data, 0, 4, panel, scores, keys, depth, vectors, True, scores, 0, 0
                        )
                        if causal:
                            _mask(scores, key0, keys, query)
                        for j in range(0, vectors * LANES * 4, LANES * 4):
                            _softmax(scores + j, keys, peak + j, norm + j, total + j, d, added + j)
                        if pairs:
                            _pair_weights(scores, keys, vectors)
                    if pairs:
                        keys = (keys + 1) // 2
                    product_rows(value_rows.ctypes.data, 0, step, scores, total, d, keys, vectors, False, scores, 0, 0)
            for p in range(panels):
                _write(
                    sums + p * sum_rows * STRIDE, norms + p * STRIDE, d, out + ((start + p * WIDTH) * c + head * d) * 4,
                    stride, min(WIDTH, rows - p * WIDTH), table, spill.ctypes.data,
                )  # fmt: skip
            task = next_task(counter)

    return work


_work, _work_pairs = _make_work(tile_fma, product_rows, False), _make_work(tile_dot_bf16, product_pairs, True)


@kernel(18)
def _attend(
    q, k, v, out, n, tq, tk, c, heads, causal, group, groups, key_block, offsets, value_words,
    buffers, buffer_bytes, workers,
):  # fmt: skip
    """Attention of groups of `group` panels of queries.

    A worker's buffer holds panels of queries (d rows each), scores (key_block rows), sums (d rows a panel), the running
    peaks and norms (a row a panel each), and a row for a block's sums of weights; scores and sums have some rows more,
    as `product_rows` and `_write` demand.
    """
    counter = np.zeros(1, np.int64)
    for worker in prange(workers):
        _work(
            q, k, v, out, n, tq, tk, c, heads, causal, group, groups, key_block, offsets, value_words,
            buffers + worker * buffer_bytes, counter.ctypes.data,
        )  # fmt: skip


@kernel(18, precision="bf16")
def _attend_pairs(
    q, k, v, out, n, tq, tk, c, heads, causal, group, groups, key_block, offsets, value_words,
    buffers, buffer_bytes, workers,
):  # fmt: skip
    """Do what `_attend` does with words: q, which is scaled, and k have words of two channels, v^T of two keys."""
    counter = np.zeros(1, np.int64)
    for worker in prange(workers):
        _work_pairs(
            q, k, v, out, n, tq, tk, c, heads, causal, group, groups, key_block, offsets, value_words,
            buffers + worker * buffer_bytes, counter.ctypes.data,
        )  # fmt: skip


def _count(_: np.ndarray, q: np.ndarray, k: np.ndarray, *__: Any, **___: Any) -> tuple[str, float]:
    kind = "self-attention" if q.shape[1] == k.shape[1] else "cross-attention"
    return kind, 4 * q.size * k.shape[1]


@op(_count)
def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    heads: int,
    causal: bool = False,
    *,
    out: np.ndarray | None = None,
    precision: str = "f32",
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
    precision : {"f32", "bf16", "int8"}
        Precision of the products, one of `precisions`; the softmax is always float32. ``bf16`` needs heads of an
        even number of channels, others take float32; ``int8`` is the same as ``bf16`` if the CPU has it, else as
        ``f32``.

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
    check_precision(precision)
    in_pairs = precision != "f32" and "bf16" in isa.tile().precisions and c // heads % 2 == 0
    out = output(out, q.shape, q, k, v)
    if not out.size:
        return out
    d, workers = c // heads, threads()
    group = min(_PANELS, math.ceil(tq / WIDTH))
    key_block = math.ceil(tk / math.ceil(tk / _KEYS))
    if key_block < tk:
        key_block += -key_block % SIX
    sum_rows = math.ceil(d / LANES) * LANES + SIX
    buffer_floats = (group * (d + sum_rows + 2) + key_block + SIX + 1) * WIDTH
    launch, value_words = _attend, 0
    if in_pairs:
        launch = _attend_pairs
        q, k = as_pairs(q, "queries", math.log2(math.e) / math.sqrt(d)), as_pairs(k, "keys")
        v, value_words = as_transposed_pairs(v, "values")
    launch(
        address(q), address(k), address(v), address(out), n, tq, tk, c, heads, int(causal),
        group, math.ceil(tq / (group * WIDTH)), key_block, address(_channel_offsets(d)), value_words,
        address(scratch.take("attention", buffer_floats * workers)), buffer_floats * 4, workers,
    )  # fmt: skip
    return out


@lru_cache(maxsize=32)
def _channel_offsets(d: int) -> np.ndarray:
    """Where in a panel each channel's row begins, in bytes."""
    return np.arange(d) * STRIDE
