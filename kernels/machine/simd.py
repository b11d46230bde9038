"""Vectors as Numba values: ``LANES`` float32 in one register, ordinary values inside jitted code.

A kernel assigns them to variables and LLVM keeps them in registers (it promotes the stack slots that Numba makes).
Addresses are plain integers; nothing here checks bounds, so the public function that launches a kernel must.
"""

from __future__ import annotations

import operator

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

from . import emit, isa
from .emit import LANES


class VectorType(types.Type):
    """Numba type of a vector of ``LANES`` float32."""

    def __init__(self) -> None:
        super().__init__(name=f"f32x{LANES}")


vector = VectorType()


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, emit.vec)


@intrinsic
def load(typingctx, address):
    """``load(address) -> vector``."""

    def codegen(context, builder, sig, args):
        return emit.load_as(builder, emit.pointer(builder, args[0]), emit.vec)

    return vector(types.intp), codegen


@intrinsic
def store(typingctx, address, value):
    """``store(address, vector)``."""

    def codegen(context, builder, sig, args):
        builder.store(args[1], emit.pointer(builder, args[0]), align=4)
        return context.get_dummy_value()

    return types.void(types.intp, vector), codegen


@intrinsic
def stream(typingctx, address, value):
    """``stream(address, vector)``: store past the caches, to a whole vector's multiple; see `fence`."""

    def codegen(context, builder, sig, args):
        emit.store_past_caches(builder, args[1], emit.pointer(builder, args[0]))
        return context.get_dummy_value()

    return types.void(types.intp, vector), codegen


@intrinsic
def prefetch(typingctx, address):
    """``prefetch(address)``: bring the cache line there into the L2 cache; any address will do."""

    def codegen(context, builder, sig, args):
        kind = ir.FunctionType(ir.VoidType(), [ir.PointerType(), emit.i32, emit.i32, emit.i32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        flags = (ir.Constant(emit.i32, value) for value in (0, 2, 1))  # to be read, kept in L2, data
        builder.call(function, [emit.pointer(builder, args[0]), *flags])
        return context.get_dummy_value()

    return types.void(types.intp), codegen


@intrinsic
def splat(typingctx, value):
    """``splat(float32) -> vector`` with the value in every lane."""

    def codegen(context, builder, sig, args):
        return emit.broadcast(builder, args[0])

    return vector(types.float32), codegen


@intrinsic
def fma(typingctx, a, b, c):
    """``fma(a, b, c) -> a * b + c`` on vectors."""

    def codegen(context, builder, sig, args):
        return emit.fma(builder, *args)

    return vector(vector, vector, vector), codegen


@intrinsic
def maximum(typingctx, a, b):
    """``maximum(a, b)`` lane by lane; where a lane of `a` is NaN, the lane of `b`."""

    def codegen(context, builder, sig, args):
        return emit.maximum(builder, *args)

    return vector(vector, vector), codegen


@intrinsic
def relu(typingctx, v):
    """``relu(vector)``: 0 where a lane is negative; NaN stays NaN."""

    def codegen(context, builder, sig, args):
        return emit.maximum(builder, emit.floats(0.0), args[0])  # in this order NaN passes

    return vector(vector), codegen


@intrinsic
def highest(typingctx, v):
    """``highest(vector) -> float32``, the largest lane."""

    def codegen(context, builder, sig, args):
        return emit.reduce(builder, args[0], lambda a, b: emit.maximum(builder, a, b))

    return types.float32(vector), codegen


@intrinsic
def total(typingctx, v):
    """``total(vector) -> float32``, the sum of the lanes."""

    def codegen(context, builder, sig, args):
        return emit.reduce(builder, args[0], builder.fadd)

    return types.float32(vector), codegen


@intrinsic
def exp2(typingctx, v):
    """``exp2(vector)``: round to an integer, polynomial on the rest, add the integer to the exponent.

    Below -126 the result is 2**-126; the argument must not exceed 127; NaN stays NaN.
    """

    def codegen(context, builder, sig, args):
        return emit.exp2(builder, emit.maximum(builder, emit.floats(-126.0), args[0]))  # in this order NaN passes

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


@intrinsic
def pair(typingctx, first, second):
    """``pair(first, second)``: words of the bfloat16 of two vectors, lane by lane."""

    def codegen(context, builder, sig, args):
        return emit.interleave(builder, *args)

    return vector(vector, vector), codegen


@intrinsic
def store_pairs(typingctx, address, low, high):
    """``store_pairs(address, low, high)``: two vectors, one after the other, as bfloat16."""

    def codegen(context, builder, sig, args):
        builder.store(emit.narrow(builder, args[1], args[2]), emit.pointer(builder, args[0]), align=4)
        return context.get_dummy_value()

    return types.void(types.intp, vector, vector), codegen


@intrinsic
def store_bytes(typingctx, address, v):
    """``store_bytes(address, vector)``: whole numbers -127 .. 127, rounded to, as bytes with the row's zero point."""

    def codegen(context, builder, sig, args):
        codes = builder.add(emit.rounded(builder, args[1]), emit.ints(isa.tile().zero_point))
        codes = builder.trunc(codes, ir.VectorType(emit.i8, LANES))
        builder.store(codes, emit.pointer(builder, args[0]), align=1)
        return context.get_dummy_value()

    return types.void(types.intp, vector), codegen


@intrinsic
def load_sums(typingctx, address, zero):
    """``load_sums(address, zero)``: the int32 at an address minus those at another, as float32."""

    def codegen(context, builder, sig, args):
        sums, zeros = (emit.load_as(builder, emit.pointer(builder, where), emit.ivec) for where in args)
        return builder.sitofp(builder.sub(sums, zeros), emit.vec)

    return vector(types.intp, types.intp), codegen


@intrinsic
def larger(typingctx, top, v):
    """``larger(top, v)``: the larger of `top`, which has no signs, and the magnitude of v; NaN is the largest."""

    def codegen(context, builder, sig, args):
        return emit.larger(builder, *args)

    return vector(vector, vector), codegen


@intrinsic
def largest(typingctx, top):
    """``largest(vector) -> float32``, the largest lane of what has no signs; NaN if there is one."""

    def codegen(context, builder, sig, args):
        kind = ir.FunctionType(emit.i32, [emit.ivec])
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.smax.v{LANES}i32")
        return builder.bitcast(builder.call(function, [builder.bitcast(args[0], emit.ivec)]), emit.f32)

    return types.float32(vector), codegen


@intrinsic
def fence(typingctx):
    """``fence()``: what was stored before is seen by other threads before what is stored after."""

    def codegen(context, builder, sig, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def next_task(typingctx, counter):
    """``next_task(address)``: take a number from a counter that all threads share (an atomic increment)."""

    def codegen(context, builder, sig, args):
        return builder.atomic_rmw("add", emit.pointer(builder, args[0]), ir.Constant(emit.i64, 1), "monotonic")

    return types.intp(types.intp), codegen


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
