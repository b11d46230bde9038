"""Register tiles as Numba values: ``rows x vectors`` vectors, meant to live in registers for the whole of a loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, register_model

from . import emit, isa
from .emit import BFLOAT16, FLOAT16, FLOAT32, LANES
from .simd import vector


class TileType(types.Type):
    """Numba type of ``rows x vectors`` vectors."""

    def __init__(self, rows: int, vectors: int) -> None:
        self.rows, self.vectors = rows, vectors
        super().__init__(name=f"tile{rows}x{vectors * LANES}")


@register_model(TileType)
class _TileModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, ir.ArrayType(emit.vec, fe_type.rows * fe_type.vectors))


def _members(builder: ir.IRBuilder, tile: ir.Value) -> list[ir.Value]:
    return [builder.extract_value(tile, i) for i in range(tile.type.count)]


def _assemble(builder: ir.IRBuilder, members: Sequence[ir.Value]) -> ir.Value:
    tile = ir.Constant(ir.ArrayType(emit.vec, len(members)), ir.Undefined)
    for i, member in enumerate(members):
        tile = builder.insert_value(tile, member, i)
    return tile


@intrinsic(prefer_literal=True)
def row_addresses(typingctx, table, rows):
    """``row_addresses(table, rows)``: the first `rows` int64 of the table at that address, as a tuple."""
    n = rows.literal_value

    def codegen(context, builder, sig, args):
        values = [builder.load(emit.pointer(builder, args[0], 8 * i), align=8, typ=emit.i64) for i in range(n)]
        return context.make_tuple(builder, sig.return_type, values)

    return types.UniTuple(types.intp, n)(types.intp, rows), codegen


@intrinsic(prefer_literal=True)
def tile_zero(typingctx, rows, vectors):
    """``tile_zero(rows, vectors)``: a tile of zeros."""
    kind = TileType(rows.literal_value, vectors.literal_value)

    def codegen(context, builder, sig, args):
        return ir.Constant(ir.ArrayType(emit.vec, kind.rows * kind.vectors), None)

    return kind(rows, vectors), codegen


@intrinsic(prefer_literal=True)
def tile_load(typingctx, address, stride, rows, vectors):
    """``tile_load(address, stride, rows, vectors)``: rows lie `stride` bytes apart."""
    kind = TileType(rows.literal_value, vectors.literal_value)

    def codegen(context, builder, sig, args):
        pointer, members = emit.pointer(builder, args[0]), []
        for _ in range(kind.rows):
            for j in range(kind.vectors):
                offset = ir.Constant(emit.i64, 4 * LANES * j)
                members.append(
                    emit.load_as(builder, builder.gep(pointer, [offset], source_etype=ir.IntType(8)), emit.vec)
                )
            pointer = builder.gep(pointer, [args[1]], source_etype=ir.IntType(8))
        return _assemble(builder, members)

    return kind(types.intp, types.intp, rows, vectors), codegen


@intrinsic
def tile_store(typingctx, tile, address, stride):
    """``tile_store(tile, address, stride)``: rows go `stride` bytes apart."""

    def codegen(context, builder, sig, args):
        members, pointer = _members(builder, args[0]), emit.pointer(builder, args[1])
        for i in range(tile.rows):
            for j in range(tile.vectors):
                offset = ir.Constant(emit.i64, 4 * LANES * j)
                target = builder.gep(pointer, [offset], source_etype=ir.IntType(8))
                builder.store(members[i * tile.vectors + j], target, align=4)
            pointer = builder.gep(pointer, [args[2]], source_etype=ir.IntType(8))
        return context.get_dummy_value()

    return types.void(tile, types.intp, types.intp), codegen


def _make_step(add_product: Callable[[ir.IRBuilder, ir.Value, ir.Value, ir.Value], ir.Value]):
    """Make a step of the inner dimension, an outer product, from what adds a product of two vectors to sums."""

    @intrinsic
    def step(typingctx, tile, rows, offset, panel):
        def codegen(context, builder, sig, args):
            members, row_tuple = _members(builder, args[0]), cgutils.unpack_tuple(builder, args[1])
            weights = [
                emit.load_as(builder, emit.pointer(builder, args[3], 4 * LANES * j), emit.vec)
                for j in range(tile.vectors)
            ]
            for i in range(tile.rows):
                pointer = emit.pointer(builder, row_tuple[i], args[2])
                word = emit.broadcast(builder, emit.load_as(builder, pointer, emit.f32))
                for j, weight in enumerate(weights):
                    k = i * tile.vectors + j
                    members[k] = add_product(builder, members[k], word, weight)
            return _assemble(builder, members)

        return tile(tile, rows, types.intp, types.intp), codegen

    return step


# ``tile_fma(tile, rows, offset, panel)``: row i of the tile gains ``float at (rows[i] + offset)`` times the `vectors`
# vectors at address `panel`. The others do it with words of 32 bits: two bfloat16, whose products are added up in
# float32; or four bytes, in int32.
tile_fma = _make_step(lambda builder, sums, a, b: emit.fma(builder, a, b, sums))
tile_dot_bf16, tile_dot_int8 = _make_step(emit.dot_bf16), _make_step(emit.dot_int8)


@intrinsic
def tile_add_int(typingctx, tile, other):
    """``tile_add_int(tile, tile)``: the sum of tiles of int32."""

    def codegen(context, builder, sig, args):
        pairs = zip(*(_members(builder, value) for value in args), strict=True)
        sums = [builder.add(builder.bitcast(a, emit.ivec), builder.bitcast(b, emit.ivec)) for a, b in pairs]
        return _assemble(builder, [builder.bitcast(value, emit.vec) for value in sums])

    return tile(tile, tile), codegen


@intrinsic(prefer_literal=True)
def tile_gather(typingctx, table, offset, rows, vectors):
    """``tile_gather(table, offset, rows, vectors)``: vector i from the address ``table[i] + offset``."""
    kind = TileType(rows.literal_value, vectors.literal_value)

    def codegen(context, builder, sig, args):
        members = []
        for i in range(kind.rows * kind.vectors):
            address = builder.load(emit.pointer(builder, args[0], 8 * i), align=8, typ=emit.i64)
            members.append(emit.load_as(builder, emit.pointer(builder, address, args[1]), emit.vec))
        return _assemble(builder, members)

    return kind(types.intp, types.intp, rows, vectors), codegen


@intrinsic(prefer_literal=True)
def tile_collect(typingctx, address, stride, rows, vectors):
    """``tile_collect(address, stride, rows, vectors)``: vector i from ``address + i * stride``."""
    kind = TileType(rows.literal_value, vectors.literal_value)

    def codegen(context, builder, sig, args):
        pointer, members = emit.pointer(builder, args[0]), []
        for _ in range(kind.rows * kind.vectors):
            members.append(emit.load_as(builder, pointer, emit.vec))
            pointer = builder.gep(pointer, [args[1]], source_etype=ir.IntType(8))
        return _assemble(builder, members)

    return kind(types.intp, types.intp, rows, vectors), codegen


@intrinsic
def tile_spread(typingctx, tile, address, stride):
    """``tile_spread(tile, address, stride)``: vector i goes to ``address + i * stride``."""

    def codegen(context, builder, sig, args):
        pointer = emit.pointer(builder, args[1])
        for member in _members(builder, args[0]):
            builder.store(member, pointer, align=4)
            pointer = builder.gep(pointer, [args[2]], source_etype=ir.IntType(8))
        return context.get_dummy_value()

    return types.void(tile, types.intp, types.intp), codegen


@intrinsic
def tile_add(typingctx, tile, value):
    """``tile_add(tile, value)``: add a vector to every vector of the tile, or another tile of the same shape."""

    def codegen(context, builder, sig, args):
        members = _members(builder, args[0])
        others = _members(builder, args[1]) if isinstance(value, TileType) else [args[1]] * len(members)
        return _assemble(builder, [builder.fadd(a, b) for a, b in zip(members, others, strict=True)])

    return tile(tile, value), codegen


@intrinsic
def tile_relu(typingctx, tile):
    """``tile_relu(tile)``: `relu` of every vector of the tile."""

    def codegen(context, builder, sig, args):
        return _assemble(builder, [emit.maximum(builder, emit.floats(0.0), v) for v in _members(builder, args[0])])

    return tile(tile), codegen


@intrinsic
def tile_weights(typingctx, tile, peaks, sums):
    """``tile_weights(tile, peaks, sums)``: 2**(x - peak) of each x of the tile.

    Each column of vectors has its vector of peaks, and of sums of the results, at those addresses. Large results may be
    cut off at 2**126 and small ones at 2**-126. NaN stays NaN.
    """

    def codegen(context, builder, sig, args):
        members, high, low = list(_members(builder, args[0])), emit.floats(126.0), emit.floats(-126.0)
        for j in range(tile.vectors):
            peak, where = (emit.pointer(builder, address, 4 * LANES * j) for address in args[1:])
            peak, total = emit.load_as(builder, peak, emit.vec), emit.load_as(builder, where, emit.vec)
            for i in range(j, len(members), tile.vectors):
                x = builder.fsub(members[i], peak)
                if not isa.tile().native_scale:
                    x = emit.maximum(builder, low, builder.select(builder.fcmp_ordered("<", high, x), high, x))
                members[i] = emit.exp2(builder, x)
                total = builder.fadd(total, members[i])
            builder.store(total, where, align=4)
        return _assemble(builder, members)

    return tile(tile, types.intp, types.intp), codegen


def make_transform(left: np.ndarray, right: np.ndarray | None = None):
    """Make an intrinsic that computes ``left @ tile @ right.T``, the tile taken as a matrix of vectors.

    The matrices, of one shape and by default the same, are constant, so products with 0 and 1 cost nothing; two rows
    next to each other that are ``e + o`` and ``e - o`` share the two parts.
    """
    right = left if right is None else right
    m, n = left.shape

    def combine(builder, coefficients, values):
        result = None
        for c, v in sorted(zip(coefficients, values, strict=True), key=lambda term: abs(term[0]) != 1):
            if c == 0:
                continue
            if result is None:
                result = v if c == 1 else builder.fmul(v, emit.floats(c))
            elif c in {1, -1}:
                result = builder.fadd(result, v) if c == 1 else builder.fsub(result, v)
            else:
                result = emit.fma(builder, v, emit.floats(c), result)
        return result

    def apply(builder, matrix, values):
        out, i = [], 0
        while i < m:
            even, odd = matrix[i], None
            if i + 1 < m:
                even, odd = (matrix[i] + matrix[i + 1]) / 2, (matrix[i] - matrix[i + 1]) / 2
            if odd is None or (np.count_nonzero(even) + np.count_nonzero(odd) > np.count_nonzero(matrix[i])):
                out.append(combine(builder, matrix[i], values))
                i += 1
            else:
                e, o = combine(builder, even, values), combine(builder, odd, values)
                out += [builder.fadd(e, o), builder.fsub(e, o)]
                i += 2
        return out

    @intrinsic
    def transform(typingctx, tile):
        def codegen(context, builder, sig, args):
            x = _members(builder, args[0])
            columns = [
                apply(builder, left, x[j :: tile.vectors]) for j in range(tile.vectors)
            ]  # left @ tile, by column
            rows = [apply(builder, right, [column[i] for column in columns]) for i in range(m)]
            return _assemble(builder, [v for row in rows for v in row])

        if not isinstance(tile, TileType) or (tile.rows, tile.vectors) != (n, n):
            raise TypeError(f"found {tile}, expected a tile of {n} x {n} vectors")
        return TileType(m, m)(tile), codegen

    return transform


@intrinsic(prefer_literal=True)
def load_transposed(typingctx, address, stride, kind):
    """``load_transposed(address, stride, kind)``: a ``LANES x LANES`` block of stored weights, as a transposed tile."""
    result, stored = TileType(LANES, 1), kind.literal_value

    def codegen(context, builder, sig, args):
        pointer, rows = emit.pointer(builder, args[0]), []
        for _ in range(LANES):
            rows.append(emit.widen(builder, pointer, stored))
            pointer = builder.gep(pointer, [args[1]], source_etype=ir.IntType(8))
        return _assemble(builder, emit.transpose(builder, rows))

    return result(types.intp, types.intp, kind), codegen


@intrinsic(prefer_literal=True)
def load_words(typingctx, address, stride, kind, group):
    """``load_words(address, stride, kind, group)``: a block of ``LANES`` rows of ``LANES`` words, transposed.

    A word is four stored bytes of the kind `INT8`, or two values of any kind as bfloat16.
    """
    result, stored = TileType(LANES, 1), kind.literal_value
    as_stored = stored == BFLOAT16 or group.literal_value == 4

    def codegen(context, builder, sig, args):
        pointer, rows = emit.pointer(builder, args[0]), []
        for _ in range(LANES):
            if as_stored:
                rows.append(builder.load(pointer, align=1, typ=emit.vec))
            else:
                size = {FLOAT32: 4, FLOAT16: 2}.get(stored, 1)
                second = builder.gep(pointer, [ir.Constant(emit.i64, size * LANES)], source_etype=emit.i8)
                rows.append(emit.narrow(builder, *(emit.widen(builder, where, stored) for where in (pointer, second))))
            pointer = builder.gep(pointer, [args[1]], source_etype=emit.i8)
        return _assemble(builder, emit.transpose(builder, rows))

    return result(types.intp, types.intp, kind, group), codegen


@intrinsic
def tile_pair(typingctx, tile):
    """``tile_pair(tile)``: words of the bfloat16 of two rows, for each two rows of the tile."""
    result = TileType(tile.rows // 2, tile.vectors)

    def codegen(context, builder, sig, args):
        x, n = _members(builder, args[0]), tile.vectors
        firsts = (2 * i * n + j for i in range(result.rows) for j in range(n))
        return _assemble(builder, [emit.interleave(builder, x[first], x[first + n]) for first in firsts])

    return result(tile), codegen


@intrinsic
def tile_interleave(typingctx, first, second):
    """``tile_interleave(first, second)``: words of the bfloat16 of two tiles of one shape, lane by lane."""

    def codegen(context, builder, sig, args):
        pairs = zip(*(_members(builder, tile) for tile in args), strict=True)
        return _assemble(builder, [emit.interleave(builder, a, b) for a, b in pairs])

    return first(first, second), codegen


@intrinsic
def tile_spread_narrow(typingctx, tile, address, stride):
    """``tile_spread_narrow(tile, address, stride)``: vector i, as bfloat16, goes to ``address + i * stride``."""

    def codegen(context, builder, sig, args):
        pointer = emit.pointer(builder, args[1])
        for member in _members(builder, args[0]):
            builder.store(builder.fptrunc(member, ir.VectorType(emit.BFloat(), LANES)), pointer, align=4)
            pointer = builder.gep(pointer, [args[2]], source_etype=emit.i8)
        return context.get_dummy_value()

    return types.void(tile, types.intp, types.intp), codegen


@intrinsic
def tile_spread_largest(typingctx, tile, address, stride, tops):
    """``tile_spread_largest(tile, address, stride, tops)``: like `tile_spread`, and note the largest magnitudes.

    Those of vector i are noted lane by lane, in the i-th vector at the address `tops`.
    """

    def codegen(context, builder, sig, args):
        pointer = emit.pointer(builder, args[1])
        for i, member in enumerate(_members(builder, args[0])):
            builder.store(member, pointer, align=4)
            pointer = builder.gep(pointer, [args[2]], source_etype=emit.i8)
            top = emit.pointer(builder, args[3], 4 * LANES * i)
            builder.store(emit.larger(builder, emit.load_as(builder, top, emit.vec), member), top, align=4)
        return context.get_dummy_value()

    return types.void(tile, types.intp, types.intp, types.intp), codegen


@intrinsic
def tile_spread_bytes(typingctx, a, b, c, d, factors, factor_stride, address, stride, sums, sums_stride):
    """Multiply four tiles by factors, round them, and spread words of the four bytes; add up 128 times their sums.

    Vector i has its factors at ``factors + i * factor_stride``, its words go to ``address + i * stride``, and what the
    zero point of inputs makes of them is added to the int32 at ``sums + i * sums_stride``.
    """

    def codegen(context, builder, sig, args):
        tiles = [_members(builder, tile) for tile in args[:4]]
        zero = isa.tile().zero_point * 0x01010101
        zero_words = builder.bitcast(emit.ints(zero - (1 << 32) if zero >> 31 else zero), emit.vec)
        for i, members in enumerate(zip(*tiles, strict=True)):
            factor, target, total = (
                emit.pointer(builder, base, builder.mul(step, ir.Constant(emit.i64, i)))
                for base, step in zip(args[4::2], args[5::2], strict=True)
            )
            factor, word = emit.load_as(builder, factor, emit.vec), None
            for shift, member in zip((0, 8, 16, 24), members, strict=True):
                code = emit.rounded(builder, builder.fmul(member, factor))
                code = builder.shl(builder.and_(code, emit.ints(255)) if shift < 24 else code, emit.ints(shift))
                word = code if word is None else builder.or_(word, code)
            word = builder.bitcast(word, emit.vec)
            builder.store(word, target, align=4)
            builder.store(
                emit.dot_int8(builder, emit.load_as(builder, total, emit.vec), zero_words, word), total, align=4
            )
        return context.get_dummy_value()

    return types.void(a, b, c, d, *[types.intp] * 6), codegen


@intrinsic(prefer_literal=True)
def tile_collect_sums(typingctx, address, stride, zeros, scales, scale_stride, factors, rows, vectors):
    """Like `tile_collect`, of int32, from which those at `zeros` are taken before they are scaled to float32.

    Vector i has its zeros at ``zeros + i * STRIDE`` where STRIDE is the width of a panel, its scales at
    ``scales + i * scale_stride``, and all its lanes the i-th float32 at `factors` as another one.
    """
    kind = TileType(rows.literal_value, vectors.literal_value)

    def codegen(context, builder, sig, args):
        pointer, members = emit.pointer(builder, args[0]), []
        for i in range(kind.rows * kind.vectors):
            sums = emit.load_as(builder, pointer, emit.ivec)
            zero = emit.load_as(builder, emit.pointer(builder, args[2], 4 * isa.tile().width * i), emit.ivec)
            scale = emit.load_as(
                builder, emit.pointer(builder, args[3], builder.mul(args[4], ir.Constant(emit.i64, i))), emit.vec
            )
            factor = emit.broadcast(builder, emit.load_as(builder, emit.pointer(builder, args[5], 4 * i), emit.f32))
            value = builder.sitofp(builder.sub(sums, zero), emit.vec)
            members.append(builder.fmul(value, builder.fmul(scale, factor)))
            pointer = builder.gep(pointer, [args[1]], source_etype=emit.i8)
        return _assemble(builder, members)

    return kind(*[types.intp] * 6, rows, vectors), codegen


@intrinsic
def load_pairs_transposed(typingctx, address, stride):
    """``load_pairs_transposed(address, stride)``: words of each two of ``2 * LANES`` vectors, as a transposed tile."""
    result = TileType(LANES, 1)

    def codegen(context, builder, sig, args):
        pointer, rows = emit.pointer(builder, args[0]), []
        for _ in range(2 * LANES):
            rows.append(emit.load_as(builder, pointer, emit.vec))
            pointer = builder.gep(pointer, [args[1]], source_etype=emit.i8)
        words = [emit.interleave(builder, *rows[i : i + 2]) for i in range(0, 2 * LANES, 2)]
        return _assemble(builder, emit.transpose(builder, words))

    return result(types.intp, types.intp), codegen


@intrinsic
def tile_scale(typingctx, tile, v):
    """``tile_scale(tile, vector)``: multiply every vector of the tile by a vector."""

    def codegen(context, builder, sig, args):
        return _assemble(builder, [builder.fmul(member, args[1]) for member in _members(builder, args[0])])

    return tile(tile, vector), codegen


def _make_scatter(streaming: bool):
    @intrinsic
    def scatter(typingctx, tile, table, offset):
        def codegen(context, builder, sig, args):
            for i, member in enumerate(_members(builder, args[0])):
                address = builder.load(emit.pointer(builder, args[1], 8 * i), align=8, typ=emit.i64)
                target = emit.pointer(builder, address, args[2])
                if streaming:
                    emit.store_past_caches(builder, member, target)
                else:
                    builder.store(member, target, align=4)
            return context.get_dummy_value()

        return types.void(tile, types.intp, types.intp), codegen

    return scatter


# ``tile_scatter(tile, table, offset)``: row i goes to the address ``table[i] + offset``. ``tile_stream`` does the same
# past the caches, to whole vectors' multiples; other threads see it after a `fence`.
tile_scatter, tile_stream = _make_scatter(False), _make_scatter(True)
