"""Vectors and register tiles as Numba values.

A *vector* is ``LANES`` float32 in one register; a *tile* is ``rows x vectors`` of them, meant to live in registers
for the whole of a loop. Both are ordinary values inside jitted code: a kernel assigns them to variables and LLVM keeps
them in registers (it promotes the stack slots that Numba makes). Addresses are plain integers; nothing here checks
bounds, so the public function that launches a kernel must.

Only this module writes LLVM IR.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

from kernels import isa

LANES = isa.tile().lanes
FLOAT32, FLOAT16, BFLOAT16, E4M3, E5M2 = range(5)  # how a weight is stored: the `kind` argument of the loads below

_f32, _i8, _i16, _i32, _i64 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_vec, _ivec, _hvec = (ir.VectorType(kind, LANES) for kind in (_f32, _i32, _i16))


class VectorType(types.Type):
    """Numba type of a vector of ``LANES`` float32."""

    def __init__(self) -> None:
        super().__init__(name=f"f32x{LANES}")


class TileType(types.Type):
    """Numba type of ``rows x vectors`` vectors."""

    def __init__(self, rows: int, vectors: int) -> None:
        self.rows, self.vectors = rows, vectors
        super().__init__(name=f"tile{rows}x{vectors * LANES}")


vector = VectorType()


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, _vec)


@register_model(TileType)
class _TileModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, ir.ArrayType(_vec, fe_type.rows * fe_type.vectors))


# --- IR helpers -------------------------------------------------------------------------------------------------------


def _pointer(builder: ir.IRBuilder, address: ir.Value, offset: int | ir.Value = 0) -> ir.Value:
    if isinstance(offset, int):
        offset = ir.Constant(_i64, offset)
    return builder.gep(builder.inttoptr(address, ir.PointerType()), [offset], source_etype=ir.IntType(8))


def _load(builder: ir.IRBuilder, pointer: ir.Value, kind: ir.Type) -> ir.Value:
    return builder.load(pointer, align=4, typ=kind)


def _constant(value: float | np.floating) -> ir.Constant:
    return ir.Constant(_vec, [float(np.float32(value))] * LANES)


def _icon(value: int) -> ir.Constant:
    return ir.Constant(_ivec, [value] * LANES)


def _broadcast(builder: ir.IRBuilder, scalar: ir.Value) -> ir.Value:
    undefined = ir.Constant(_vec, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_i32, 0))
    return builder.shuffle_vector(first, undefined, _icon(0))


def _call(builder: ir.IRBuilder, name: str, *args: ir.Value) -> ir.Value:
    """Call the LLVM intrinsic ``llvm.<name>.vNf32``."""
    kind = ir.FunctionType(_vec, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{LANES}f32"), args)


def _fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    return _call(builder, "fmuladd", a, b, c)  # not `fma`: without the hardware that would be a call per lane


def _maximum(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _reduce(builder: ir.IRBuilder, v: ir.Value, combine: Callable[[ir.Value, ir.Value], ir.Value]) -> ir.Value:
    """Fold the lanes by halves, always in the same order."""
    n = LANES
    while n > 1:
        n //= 2
        low = builder.shuffle_vector(v, v, ir.Constant(ir.VectorType(_i32, n), list(range(n))))
        high = builder.shuffle_vector(v, v, ir.Constant(ir.VectorType(_i32, n), list(range(n, 2 * n))))
        v = combine(low, high)
    return builder.extract_element(v, ir.Constant(_i32, 0))


# --- vectors ----------------------------------------------------------------------------------------------------------


@intrinsic
def load(typingctx, address):
    """``load(address) -> vector``."""

    def codegen(context, builder, sig, args):
        return _load(builder, _pointer(builder, args[0]), _vec)

    return vector(types.intp), codegen


@intrinsic
def store(typingctx, address, value):
    """``store(address, vector)``."""

    def codegen(context, builder, sig, args):
        builder.store(args[1], _pointer(builder, args[0]), align=4)
        return context.get_dummy_value()

    return types.void(types.intp, vector), codegen


def _store_past_caches(builder: ir.IRBuilder, value: ir.Value, pointer: ir.Value) -> None:
    instruction = builder.store(value, pointer, align=4 * LANES)
    instruction.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_i32, 1)]))


@intrinsic
def stream(typingctx, address, value):
    """``stream(address, vector)``: store past the caches, to a whole vector's multiple; see `fence`."""

    def codegen(context, builder, sig, args):
        _store_past_caches(builder, args[1], _pointer(builder, args[0]))
        return context.get_dummy_value()

    return types.void(types.intp, vector), codegen


@intrinsic
def prefetch(typingctx, address):
    """``prefetch(address)``: bring the cache line there into the L2 cache; any address will do."""

    def codegen(context, builder, sig, args):
        kind = ir.FunctionType(ir.VoidType(), [ir.PointerType(), _i32, _i32, _i32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        flags = (ir.Constant(_i32, value) for value in (0, 2, 1))  # to be read, kept in L2, data
        builder.call(function, [_pointer(builder, args[0]), *flags])
        return context.get_dummy_value()

    return types.void(types.intp), codegen


@intrinsic
def splat(typingctx, value):
    """``splat(float32) -> vector`` with the value in every lane."""

    def codegen(context, builder, sig, args):
        return _broadcast(builder, args[0])

    return vector(types.float32), codegen


@intrinsic
def fma(typingctx, a, b, c):
    """``fma(a, b, c) -> a * b + c`` on vectors."""

    def codegen(context, builder, sig, args):
        return _fma(builder, *args)

    return vector(vector, vector, vector), codegen


@intrinsic
def maximum(typingctx, a, b):
    """``maximum(a, b)`` lane by lane; where a lane of `a` is NaN, the lane of `b`."""

    def codegen(context, builder, sig, args):
        return _maximum(builder, *args)

    return vector(vector, vector), codegen


@intrinsic
def relu(typingctx, v):
    """``relu(vector)``: 0 where a lane is negative; NaN stays NaN."""

    def codegen(context, builder, sig, args):
        return _maximum(builder, _constant(0.0), args[0])  # in this order NaN passes

    return vector(vector), codegen


@intrinsic
def highest(typingctx, v):
    """``highest(vector) -> float32``, the largest lane."""

    def codegen(context, builder, sig, args):
        return _reduce(builder, args[0], lambda a, b: _maximum(builder, a, b))

    return types.float32(vector), codegen


@intrinsic
def total(typingctx, v):
    """``total(vector) -> float32``, the sum of the lanes."""

    def codegen(context, builder, sig, args):
        return _reduce(builder, args[0], builder.fadd)

    return types.float32(vector), codegen


def _exp2_coefficients() -> Sequence[float]:
    """Polynomial ``1 + x q(x)`` for 2**x on [-1/2, 1/2], fitted at Chebyshev's points: relative error 1e-7.

    At 0 it must be 1: what fades by 2**0 does not change.
    """
    x = np.cos(np.pi * (np.arange(200) + 0.5) / 200) / 2
    return [1.0, *np.polyfit(x, (2.0**x - 1) / x, 4, w=np.abs(x) * 2.0**-x)[::-1]]


EXP2_COEFFICIENTS = tuple(np.float32(c) for c in _exp2_coefficients())


def _exp2(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """Compute 2**x for x in [-126, 127]; with `native_scale` for any x but infinity."""
    whole = _call(builder, "rint", x)
    rest = builder.fsub(x, whole)
    value = _constant(EXP2_COEFFICIENTS[-1])
    for c in EXP2_COEFFICIENTS[-2::-1]:
        value = _fma(builder, value, rest, _constant(c))
    if isa.tile().native_scale:
        every, rounding = ir.Constant(_i16, -1), ir.Constant(_i32, 4)
        kind = ir.FunctionType(_vec, [_vec, _vec, _vec, _i16, _i32])
        scale = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.mask.scalef.ps.512")
        return builder.call(scale, [value, whole, value, every, rounding])
    exponent = builder.shl(builder.fptosi(whole, _ivec), _icon(23))
    return builder.bitcast(builder.add(builder.bitcast(value, _ivec), exponent), _vec)


@intrinsic
def exp2(typingctx, v):
    """``exp2(vector)``: round to an integer, polynomial on the rest, add the integer to the exponent.

    Below -126 the result is 2**-126; the argument must not exceed 127; NaN stays NaN.
    """

    def codegen(context, builder, sig, args):
        return _exp2(builder, _maximum(builder, _constant(-126.0), args[0]))  # in this order NaN passes

    return vector(vector), codegen


@intrinsic
def choose(typingctx, a, b, x, y):
    """``choose(a, b, x, y)``: x where ``a < b``, else y, lane by lane."""

    def codegen(context, builder, sig, args):
        return builder.select(builder.fcmp_ordered("<", args[0], args[1]), args[2], args[3])

    return vector(vector, vector, vector, vector), codegen


for _op, _method in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):

    @infer_global(_op)
    class _VectorOperator(AbstractTemplate):
        def generic(self, args, kws):
            return signature(vector, vector, vector) if tuple(args) == (vector, vector) else None

    def _lower(context, builder, sig, args, _method=_method):
        return getattr(builder, _method)(*args)

    lower_builtin(_op, vector, vector)(_lower)


# --- tiles ------------------------------------------------------------------------------------------------------------


def _members(builder: ir.IRBuilder, tile: ir.Value) -> list[ir.Value]:
    return [builder.extract_value(tile, i) for i in range(tile.type.count)]


def _assemble(builder: ir.IRBuilder, members: Sequence[ir.Value]) -> ir.Value:
    tile = ir.Constant(ir.ArrayType(_vec, len(members)), ir.Undefined)
    for i, member in enumerate(members):
        tile = builder.insert_value(tile, member, i)
    return tile


@intrinsic(prefer_literal=True)
def row_addresses(typingctx, table, rows):
    """``row_addresses(table, rows)``: the first `rows` int64 of the table at that address, as a tuple."""
    n = rows.literal_value

    def codegen(context, builder, sig, args):
        values = [builder.load(_pointer(builder, args[0], 8 * i), align=8, typ=_i64) for i in range(n)]
        return context.make_tuple(builder, sig.return_type, values)

    return types.UniTuple(types.intp, n)(types.intp, rows), codegen


@intrinsic(prefer_literal=True)
def tile_zero(typingctx, rows, vectors):
    """``tile_zero(rows, vectors)``: a tile of zeros."""
    kind = TileType(rows.literal_value, vectors.literal_value)

    def codegen(context, builder, sig, args):
        return ir.Constant(ir.ArrayType(_vec, kind.rows * kind.vectors), None)

    return kind(rows, vectors), codegen


@intrinsic(prefer_literal=True)
def tile_load(typingctx, address, stride, rows, vectors):
    """``tile_load(address, stride, rows, vectors)``: rows lie `stride` bytes apart."""
    kind = TileType(rows.literal_value, vectors.literal_value)

    def codegen(context, builder, sig, args):
        pointer, members = _pointer(builder, args[0]), []
        for _ in range(kind.rows):
            for j in range(kind.vectors):
                offset = ir.Constant(_i64, 4 * LANES * j)
                members.append(_load(builder, builder.gep(pointer, [offset], source_etype=ir.IntType(8)), _vec))
            pointer = builder.gep(pointer, [args[1]], source_etype=ir.IntType(8))
        return _assemble(builder, members)

    return kind(types.intp, types.intp, rows, vectors), codegen


@intrinsic
def tile_store(typingctx, tile, address, stride):
    """``tile_store(tile, address, stride)``: rows go `stride` bytes apart."""

    def codegen(context, builder, sig, args):
        members, pointer = _members(builder, args[0]), _pointer(builder, args[1])
        for i in range(tile.rows):
            for j in range(tile.vectors):
                offset = ir.Constant(_i64, 4 * LANES * j)
                target = builder.gep(pointer, [offset], source_etype=ir.IntType(8))
                builder.store(members[i * tile.vectors + j], target, align=4)
            pointer = builder.gep(pointer, [args[2]], source_etype=ir.IntType(8))
        return context.get_dummy_value()

    return types.void(tile, types.intp, types.intp), codegen


@intrinsic
def tile_fma(typingctx, tile, rows, offset, panel):
    """``tile_fma(tile, rows, offset, panel)``: one step of the inner dimension, an outer product.

    Row i of the tile gains ``float at (rows[i] + offset)`` times the `vectors` vectors at address `panel`.
    """

    def codegen(context, builder, sig, args):
        members, row_tuple = _members(builder, args[0]), cgutils.unpack_tuple(builder, args[1])
        weights = [_load(builder, _pointer(builder, args[3], 4 * LANES * j), _vec) for j in range(tile.vectors)]
        for i in range(tile.rows):
            scalar = _broadcast(builder, _load(builder, _pointer(builder, row_tuple[i], args[2]), _f32))
            for j, weight in enumerate(weights):
                members[i * tile.vectors + j] = _fma(builder, scalar, weight, members[i * tile.vectors + j])
        return _assemble(builder, members)

    return tile(tile, rows, types.intp, types.intp), codegen


@intrinsic(prefer_literal=True)
def tile_gather(typingctx, table, offset, rows, vectors):
    """``tile_gather(table, offset, rows, vectors)``: vector i from the address ``table[i] + offset``."""
    kind = TileType(rows.literal_value, vectors.literal_value)

    def codegen(context, builder, sig, args):
        members = []
        for i in range(kind.rows * kind.vectors):
            address = builder.load(_pointer(builder, args[0], 8 * i), align=8, typ=_i64)
            members.append(_load(builder, _pointer(builder, address, args[1]), _vec))
        return _assemble(builder, members)

    return kind(types.intp, types.intp, rows, vectors), codegen


@intrinsic(prefer_literal=True)
def tile_collect(typingctx, address, stride, rows, vectors):
    """``tile_collect(address, stride, rows, vectors)``: vector i from ``address + i * stride``."""
    kind = TileType(rows.literal_value, vectors.literal_value)

    def codegen(context, builder, sig, args):
        pointer, members = _pointer(builder, args[0]), []
        for _ in range(kind.rows * kind.vectors):
            members.append(_load(builder, pointer, _vec))
            pointer = builder.gep(pointer, [args[1]], source_etype=ir.IntType(8))
        return _assemble(builder, members)

    return kind(types.intp, types.intp, rows, vectors), codegen


@intrinsic
def tile_spread(typingctx, tile, address, stride):
    """``tile_spread(tile, address, stride)``: vector i goes to ``address + i * stride``."""

    def codegen(context, builder, sig, args):
        pointer = _pointer(builder, args[1])
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
        return _assemble(builder, [_maximum(builder, _constant(0.0), v) for v in _members(builder, args[0])])

    return tile(tile), codegen


@intrinsic
def tile_weights(typingctx, tile, peaks, sums):
    """``tile_weights(tile, peaks, sums)``: 2**(x - peak) of each x of the tile.

    Each column of vectors has its vector of peaks, and of sums of the results, at those addresses. Large results may be
    cut off at 2**126 and small ones at 2**-126. NaN stays NaN.
    """

    def codegen(context, builder, sig, args):
        members, high, low = list(_members(builder, args[0])), _constant(126.0), _constant(-126.0)
        for j in range(tile.vectors):
            peak, where = (_pointer(builder, address, 4 * LANES * j) for address in args[1:])
            peak, total = _load(builder, peak, _vec), _load(builder, where, _vec)
            for i in range(j, len(members), tile.vectors):
                x = builder.fsub(members[i], peak)
                if not isa.tile().native_scale:
                    x = _maximum(builder, low, builder.select(builder.fcmp_ordered("<", high, x), high, x))
                members[i] = _exp2(builder, x)
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
                result = v if c == 1 else builder.fmul(v, _constant(c))
            elif c in {1, -1}:
                result = builder.fadd(result, v) if c == 1 else builder.fsub(result, v)
            else:
                result = _fma(builder, v, _constant(c), result)
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


def _widen(builder: ir.IRBuilder, pointer: ir.Value, kind: int) -> ir.Value:
    """Load ``LANES`` stored weights of a kind, at any alignment, and return them as float32."""
    if kind == FLOAT32:
        return builder.load(pointer, align=1, typ=_vec)
    if kind in {E4M3, E5M2}:
        return _widen_float8(builder, builder.load(pointer, align=1, typ=ir.VectorType(_i8, LANES)), kind)
    bits = builder.load(pointer, align=1, typ=_hvec)
    if kind == BFLOAT16:
        return builder.bitcast(builder.shl(builder.zext(bits, _ivec), _icon(16)), _vec)
    return _widen_half(builder, bits)


def _widen_half(builder: ir.IRBuilder, half: ir.Value) -> ir.Value:
    """Return float16 bits as float32."""
    if isa.tile().native_f16:
        return builder.fpext(builder.bitcast(half, ir.VectorType(ir.HalfType(), LANES)), _vec)
    bits = builder.zext(half, _ivec)
    # Shift exponent and fraction into place and rescale by 2**112, which also normalises subnormals; then infinities.
    magnitude = builder.shl(builder.and_(bits, _icon(0x7FFF)), _icon(13))
    scaled = builder.bitcast(builder.fmul(builder.bitcast(magnitude, _vec), _constant(2.0**112)), _ivec)
    special = builder.icmp_unsigned(">=", magnitude, _icon(0x0F800000))
    finite = builder.select(special, builder.or_(magnitude, _icon(0x7F800000)), scaled)
    sign = builder.shl(builder.and_(bits, _icon(0x8000)), _icon(16))
    return builder.bitcast(builder.or_(finite, sign), _vec)


def _widen_float8(builder: ir.IRBuilder, code: ir.Value, kind: int) -> ir.Value:
    """Return float8 as float32, by way of float16: E5M2 is its upper half; E4M3 has one bit less of the exponent."""
    bits = builder.zext(code, _hvec)

    def constant(value: int) -> ir.Constant:
        return ir.Constant(_hvec, [value] * LANES)

    if kind == E5M2:
        return _widen_half(builder, builder.shl(bits, constant(8)))
    sign = builder.shl(builder.and_(bits, constant(0x80)), constant(8))
    magnitude = builder.and_(bits, constant(0x7F))
    half = builder.or_(sign, builder.shl(magnitude, constant(7)))
    value = builder.fmul(_widen_half(builder, half), _constant(2.0**8))  # 2**8 is between the biases of the exponents
    return builder.select(builder.icmp_unsigned("==", magnitude, constant(0x7F)), _constant(np.nan), value)


def _transpose(builder: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
    """Transpose ``LANES`` vectors in registers by log2(LANES) rounds of pairwise exchanges."""
    half = LANES // 2
    while half:
        # Row i gives its lanes with bit `half` set to row i + half, and takes that row's lanes without it.
        low = [lane if not lane & half else LANES + (lane ^ half) for lane in range(LANES)]
        high = [lane | half if not lane & half else LANES + lane for lane in range(LANES)]
        out = list(rows)
        for i in range(LANES):
            if not i & half:
                a, b = rows[i], rows[i + half]
                out[i] = builder.shuffle_vector(a, b, ir.Constant(_ivec, low))
                out[i + half] = builder.shuffle_vector(a, b, ir.Constant(_ivec, high))
        rows, half = out, half // 2
    return rows


@intrinsic(prefer_literal=True)
def load_transposed(typingctx, address, stride, kind):
    """``load_transposed(address, stride, kind)``: a ``LANES x LANES`` block of stored weights, as a transposed tile."""
    result, stored = TileType(LANES, 1), kind.literal_value

    def codegen(context, builder, sig, args):
        pointer, rows = _pointer(builder, args[0]), []
        for _ in range(LANES):
            rows.append(_widen(builder, pointer, stored))
            pointer = builder.gep(pointer, [args[1]], source_etype=ir.IntType(8))
        return _assemble(builder, _transpose(builder, rows))

    return result(types.intp, types.intp, kind), codegen


def _make_scatter(streaming: bool):
    @intrinsic
    def scatter(typingctx, tile, table, offset):
        def codegen(context, builder, sig, args):
            for i, member in enumerate(_members(builder, args[0])):
                address = builder.load(_pointer(builder, args[1], 8 * i), align=8, typ=_i64)
                target = _pointer(builder, address, args[2])
                if streaming:
                    _store_past_caches(builder, member, target)
                else:
                    builder.store(member, target, align=4)
            return context.get_dummy_value()

        return types.void(tile, types.intp, types.intp), codegen

    return scatter


# ``tile_scatter(tile, table, offset)``: row i goes to the address ``table[i] + offset``. ``tile_stream`` does the same
# past the caches, to whole vectors' multiples; other threads see it after a `fence`.
tile_scatter, tile_stream = _make_scatter(False), _make_scatter(True)


@intrinsic
def fence(typingctx):
    """``fence()``: what was stored before is seen by other threads before what is stored after."""

    def codegen(context, builder, sig, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


# --- tasks ------------------------------------------------------------------------------------------------------------


@intrinsic
def next_task(typingctx, counter):
    """``next_task(address)``: take a number from a counter that all threads share (an atomic increment)."""

    def codegen(context, builder, sig, args):
        return builder.atomic_rmw("add", _pointer(builder, args[0]), ir.Constant(_i64, 1), "monotonic")

    return types.intp(types.intp), codegen


# --- memory as arrays -------------------------------------------------------------------------------------------------


def _pointer_to(element: types.Type):
    @intrinsic
    def pointer(typingctx, address):
        def codegen(context, builder, sig, args):
            return builder.inttoptr(args[0], ir.PointerType())

        return types.CPointer(element)(types.intp), codegen

    return pointer


# For ``numba.carray(float_pointer(address), shape)``: the memory at an address as an array.
double_pointer = _pointer_to(types.float64)
byte_pointer = _pointer_to(types.uint8)
int_pointer = _pointer_to(types.intp)
float_pointer = _pointer_to(types.float32)
