"""The micro-kernel that every matrix product is made of, and the loop that feeds it rows.

It multiplies a few rows of a, found through a table of addresses, and a *panel* of b: ``[depth][WIDTH]`` float32, of
which it uses 1 to ``VECTORS`` vectors. The sums stay in registers for the whole depth and then go to a *block*,
``[rows][WIDTH]`` in a buffer of the thread. So a needs no packing, whatever its strides: an activation, an image
through padding, a transposed matrix.

For less precise products, what takes the place of each float32 of a and of the panel is a word of two bfloat16 or of
four bytes. The sums of products of bytes are int32, which pass as float32.

The shape of the register tile follows Goto and van de Geijn, "Anatomy of high-performance matrix multiplication"
(2008), and Van Zee and van de Geijn, "BLIS" (2015): `isa` has the numbers.
"""

from __future__ import annotations

from ..machine import isa
from ..machine.jit import inline
from ..machine.simd import prefetch
from ..machine.tiles import (
    row_addresses,
    tile_add,
    tile_add_int,
    tile_dot_bf16,
    tile_dot_int8,
    tile_fma,
    tile_load,
    tile_store,
    tile_zero,
)

VECTORS = isa.tile().vectors
WIDTH = isa.tile().width
STRIDE = WIDTH * 4  # bytes from a row of a panel or a block to the next
SIX = 6  # rows of the register tile


def _make_product(rows: int, vectors: int, multiply=tile_fma, add=tile_add):
    """Make the micro-kernel ``block[rows, vectors] += a[rows, depth] @ panel[depth, vectors]``.

    Its arguments are the address of a table of row addresses of a, a byte offset to add to each of them, the bytes from
    an element of a row to the next, the addresses of panel and block, depth, whether to overwrite the block instead of
    adding to it, and what to bring into the cache meanwhile, a line each for two steps of depth: the memory from
    `ahead` on, every `ahead_step` bytes, and that `gap` bytes further on.
    """

    @inline
    def product(table, offset, step, panel, block, depth, fresh, ahead, ahead_step, gap):
        addresses = row_addresses(table, rows)
        acc = tile_zero(rows, vectors)
        for _ in range(depth // 2):
            if ahead_step:
                prefetch(ahead)
                if gap:
                    prefetch(ahead + gap)
                ahead += ahead_step
            acc = multiply(acc, addresses, offset, panel)
            acc = multiply(acc, addresses, offset + step, panel + STRIDE)
            offset += 2 * step
            panel += 2 * STRIDE
        if depth % 2:
            acc = multiply(acc, addresses, offset, panel)
        if not fresh:  # added last: a sum of the sums of chunks loses fewer digits than one long sum
            acc = add(acc, tile_load(block, STRIDE, rows, vectors))
        tile_store(acc, block, STRIDE)

    return product


def _make_product_rows(multiply=tile_fma, add=tile_add):
    """Make the function that adds the product of any number of rows and `vectors` vectors of a panel to a block.

    Full panels take the rows by sixes, then fours, then one by one. Narrow ones take sixes only, so table and block
    need room for the rows rounded up to a multiple of six; what the surplus addresses point at must be readable, and
    lands in the surplus rows of the block. It returns where the prefetching got to.
    """
    wide6, wide4, wide1 = (_make_product(rows, VECTORS, multiply, add) for rows in (SIX, 4, 1))
    narrow3, narrow2, narrow1 = (_make_product(SIX, min(n, VECTORS), multiply, add) for n in (3, 2, 1))

    @inline
    def product_rows(table, offset, step, panel, block, rows, depth, vectors, fresh, ahead, ahead_step, gap):
        i = 0
        lines = depth // 2 * ahead_step
        if vectors == VECTORS:
            while rows - i >= SIX and rows - i != 8:
                wide6(table + 8 * i, offset, step, panel, block + i * STRIDE, depth, fresh, ahead, ahead_step, gap)
                ahead += lines
                i += SIX
            while rows - i >= 4:
                wide4(table + 8 * i, offset, step, panel, block + i * STRIDE, depth, fresh, ahead, ahead_step, gap)
                ahead += lines
                i += 4
            while i < rows:
                wide1(table + 8 * i, offset, step, panel, block + i * STRIDE, depth, fresh, ahead, ahead_step, gap)
                ahead += lines
                i += 1
        while i < rows:
            if vectors == 1:
                narrow1(table + 8 * i, offset, step, panel, block + i * STRIDE, depth, fresh, ahead, ahead_step, gap)
            elif vectors == 2:
                narrow2(table + 8 * i, offset, step, panel, block + i * STRIDE, depth, fresh, ahead, ahead_step, gap)
            else:
                narrow3(table + 8 * i, offset, step, panel, block + i * STRIDE, depth, fresh, ahead, ahead_step, gap)
            ahead += lines
            i += SIX
        return ahead

    return product_rows


product6, narrow1 = _make_product(SIX, VECTORS), _make_product(SIX, 1)
product_rows = _make_product_rows()
product_pairs, product_bytes = _make_product_rows(tile_dot_bf16), _make_product_rows(tile_dot_int8, tile_add_int)
