"""LLVM IR for the intrinsics of `machine.simd` and `machine.tiles`: a function for each instruction or short sequence.

Values are vectors of ``LANES`` float32, or of as many int32 that pass as such, and words: two bfloat16 or four bytes.
Only these three modules write LLVM IR.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from llvmlite import ir
from numba.core import cgutils

from . import isa

LANES = isa.tile().lanes
FLOAT32, FLOAT16, BFLOAT16, E4M3, E5M2, INT8 = range(6)  # how a weight is stored: the `kind` of loads

f32, i8, i16, i32, i64 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
vec, ivec, hvec = (ir.VectorType(kind, LANES) for kind in (f32, i32, i16))


class BFloat(ir.Type):
    """LLVM's bfloat16, which llvmlite lacks."""

    null, intrinsic_name = "0.0", "bf16"

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


def pointer(builder: ir.IRBuilder, address: ir.Value, offset: int | ir.Value = 0) -> ir.Value:
    """Return a pointer to the byte `offset` of an address."""
    if isinstance(offset, int):
        offset = ir.Constant(i64, offset)
    return builder.gep(builder.inttoptr(address, ir.PointerType()), [offset], source_etype=ir.IntType(8))


def load_as(builder: ir.IRBuilder, pointer: ir.Value, kind: ir.Type) -> ir.Value:
    """Load a value of a type that starts at a multiple of four bytes."""
    return builder.load(pointer, align=4, typ=kind)


def floats(value: float | np.floating) -> ir.Constant:
    """Return a vector of one float32."""
    return ir.Constant(vec, [float(np.float32(value))] * LANES)


def ints(value: int) -> ir.Constant:
    """Return a vector of one int32."""
    return ir.Constant(ivec, [value] * LANES)


def broadcast(builder: ir.IRBuilder, scalar: ir.Value) -> ir.Value:
    """Put a float32 into every lane."""
    undefined = ir.Constant(vec, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(i32, 0))
    return builder.shuffle_vector(first, undefined, ints(0))


def call(builder: ir.IRBuilder, name: str, *args: ir.Value) -> ir.Value:
    """Call the LLVM intrinsic ``llvm.<name>.vNf32``."""
    kind = ir.FunctionType(vec, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{LANES}f32"), args)


def fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """Return a * b + c."""
    return call(builder, "fmuladd", a, b, c)  # not `fma`: without the hardware that would be a call per lane


def maximum(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    """Return the larger, lane by lane; b where a is NaN."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def reduce(builder: ir.IRBuilder, v: ir.Value, combine: Callable[[ir.Value, ir.Value], ir.Value]) -> ir.Value:
    """Fold the lanes by halves, always in the same order."""
    n = LANES
    while n > 1:
        n //= 2
        low = builder.shuffle_vector(v, v, ir.Constant(ir.VectorType(i32, n), list(range(n))))
        high = builder.shuffle_vector(v, v, ir.Constant(ir.VectorType(i32, n), list(range(n, 2 * n))))
        v = combine(low, high)
    return builder.extract_element(v, ir.Constant(i32, 0))


def store_past_caches(builder: ir.IRBuilder, value: ir.Value, pointer: ir.Value) -> None:
    """Store a vector, which starts at a multiple of its size, past the caches."""
    instruction = builder.store(value, pointer, align=4 * LANES)
    instruction.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(i32, 1)]))


def _exp2_coefficients() -> Sequence[float]:
    """Polynomial ``1 + x q(x)`` for 2**x on [-1/2, 1/2], fitted at Chebyshev's points: relative error 1e-7.

    At 0 it must be 1: what fades by 2**0 does not change.
    """
    x = np.cos(np.pi * (np.arange(200) + 0.5) / 200) / 2
    return [1.0, *np.polyfit(x, (2.0**x - 1) / x, 4, w=np.abs(x) * 2.0**-x)[::-1]]


EXP2_COEFFICIENTS = tuple(np.float32(c) for c in _exp2_coefficients())


def exp2(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """Compute 2**x for x in [-126, 127]; with `native_scale` for any x but infinity."""
    whole = call(builder, "rint", x)
    rest = builder.fsub(x, whole)
    value = floats(EXP2_COEFFICIENTS[-1])
    for c in EXP2_COEFFICIENTS[-2::-1]:
        value = fma(builder, value, rest, floats(c))
    if isa.tile().native_scale:
        every, rounding = ir.Constant(i16, -1), ir.Constant(i32, 4)
        kind = ir.FunctionType(vec, [vec, vec, vec, i16, i32])
        scale = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.mask.scalef.ps.512")
        return builder.call(scale, [value, whole, value, every, rounding])
    exponent = builder.shl(builder.fptosi(whole, ivec), ints(23))
    return builder.bitcast(builder.add(builder.bitcast(value, ivec), exponent), vec)


def larger(builder: ir.IRBuilder, top: ir.Value, v: ir.Value) -> ir.Value:
    """Return the larger magnitudes, lane by lane; as integers their order is the same, and NaN is the largest."""
    bits = builder.and_(builder.bitcast(v, ivec), ints(0x7FFFFFFF))
    kind = ir.FunctionType(ivec, [ivec, ivec])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.smax.v{LANES}i32")
    return builder.bitcast(builder.call(function, [builder.bitcast(top, ivec), bits]), vec)


def rounded(builder: ir.IRBuilder, v: ir.Value) -> ir.Value:
    """Round float32 to int32."""
    kind = ir.FunctionType(ivec, [vec])
    name = f"llvm.lrint.v{LANES}i32.v{LANES}f32"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [v])


def narrow(builder: ir.IRBuilder, low: ir.Value, high: ir.Value) -> ir.Value:
    """Round two vectors to bfloat16, as one vector of words."""
    kind = ir.FunctionType(ir.VectorType(BFloat(), 2 * LANES), [vec, vec])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.cvtne2ps2bf16.512")
    return builder.bitcast(builder.call(function, [high, low]), vec)


def interleave(builder: ir.IRBuilder, first: ir.Value, second: ir.Value) -> ir.Value:
    """Return words of the bfloat16 of first and second, lane by lane."""
    halves = builder.bitcast(narrow(builder, first, second), ir.VectorType(i16, 2 * LANES))
    order = [lane for pair in zip(range(LANES), range(LANES, 2 * LANES), strict=True) for lane in pair]
    mask = ir.Constant(ir.VectorType(i32, 2 * LANES), order)
    return builder.bitcast(builder.shuffle_vector(halves, halves, mask), vec)


def _pairs(builder: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    """Return words as pairs of bfloat16."""
    return builder.bitcast(bits, ir.VectorType(BFloat(), 2 * LANES))


def dot_bf16(builder: ir.IRBuilder, sums: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
    """Add the products of pairs of bfloat16 to float32 sums."""
    a, b = _pairs(builder, a), _pairs(builder, b)
    kind = ir.FunctionType(vec, [vec, a.type, b.type])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
    return builder.call(function, [sums, a, b])


def dot_int8(builder: ir.IRBuilder, sums: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
    """Add the products of four bytes (a unsigned but on ARM, b signed) to int32 sums, which pass as float32."""
    name, factor = f"llvm.x86.avx512.vpdpbusd.{32 * LANES}", ivec
    if isa.tile().name == "neon":
        name, factor = "llvm.aarch64.neon.sdot.v4i32.v16i8", ir.VectorType(i8, 4 * LANES)
    kind = ir.FunctionType(ivec, [ivec, factor, factor])
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    factors = [builder.bitcast(value, factor) for value in (a, b)]
    return builder.bitcast(builder.call(function, [builder.bitcast(sums, ivec), *factors]), vec)


def widen(builder: ir.IRBuilder, pointer: ir.Value, kind: int) -> ir.Value:
    """Load ``LANES`` stored weights of a kind, at any alignment, and return them as float32."""
    if kind == FLOAT32:
        return builder.load(pointer, align=1, typ=vec)
    if kind == INT8:
        return builder.sitofp(builder.load(pointer, align=1, typ=ir.VectorType(i8, LANES)), vec)
    if kind in {E4M3, E5M2}:
        return _widen_float8(builder, builder.load(pointer, align=1, typ=ir.VectorType(i8, LANES)), kind)
    bits = builder.load(pointer, align=1, typ=hvec)
    if kind == BFLOAT16:
        return builder.bitcast(builder.shl(builder.zext(bits, ivec), ints(16)), vec)
    return _widen_half(builder, bits)


def _widen_half(builder: ir.IRBuilder, half: ir.Value) -> ir.Value:
    """Return float16 bits as float32."""
    if isa.tile().native_f16:
        return builder.fpext(builder.bitcast(half, ir.VectorType(ir.HalfType(), LANES)), vec)
    bits = builder.zext(half, ivec)
    # Shift exponent and fraction into place and rescale by 2**112, which also normalises subnormals; then infinities.
    magnitude = builder.shl(builder.and_(bits, ints(0x7FFF)), ints(13))
    scaled = builder.bitcast(builder.fmul(builder.bitcast(magnitude, vec), floats(2.0**112)), ivec)
    special = builder.icmp_unsigned(">=", magnitude, ints(0x0F800000))
    finite = builder.select(special, builder.or_(magnitude, ints(0x7F800000)), scaled)
    sign = builder.shl(builder.and_(bits, ints(0x8000)), ints(16))
    return builder.bitcast(builder.or_(finite, sign), vec)


def _widen_float8(builder: ir.IRBuilder, code: ir.Value, kind: int) -> ir.Value:
    """Return float8 as float32, by way of float16: E5M2 is its upper half; E4M3 has one bit less of the exponent."""
    bits = builder.zext(code, hvec)

    def constant(value: int) -> ir.Constant:
        return ir.Constant(hvec, [value] * LANES)

    if kind == E5M2:
        return _widen_half(builder, builder.shl(bits, constant(8)))
    sign = builder.shl(builder.and_(bits, constant(0x80)), constant(8))
    magnitude = builder.and_(bits, constant(0x7F))
    half = builder.or_(sign, builder.shl(magnitude, constant(7)))
    value = builder.fmul(_widen_half(builder, half), floats(2.0**8))  # 2**8 is between the biases of the exponents
    return builder.select(builder.icmp_unsigned("==", magnitude, constant(0x7F)), floats(np.nan), value)


def transpose(builder: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
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
                out[i] = builder.shuffle_vector(a, b, ir.Constant(ivec, low))
                out[i + half] = builder.shuffle_vector(a, b, ir.Constant(ivec, high))
        rows, half = out, half // 2
    return rows
