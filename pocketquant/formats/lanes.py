"""Sixteen f32 in one SIMD register, as a Numba type: what the search kernels count in.

`Lanes` is LLVM's `<16 x float>`: one AVX-512 register, two of AVX2, four of SSE or NEON. A kernel that puts one
candidate into each lane keeps its running sums in registers and needs nothing from the auto-vectorizer. No operation
is reassociated or fused, so every machine gives the same bits.

Inside `numba.njit` functions: `+ - * /` between `Lanes`, or between `Lanes` and a float; `load`, `store`, `splat`,
`lowest`, `highest`, `rounded`, `where_less`,
`total`, `smallest`, `largest`, `first_equal`, `lane`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core.datamodel import models, register_default
from numba.core.imputils import lower_builtin, lower_cast
from numba.core.typeconv import Conversion
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic as numba_intrinsic

WIDTH = 16
_FLOAT = ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, WIDTH)
_I32 = ir.IntType(32)
_ROUNDER = 12582912.0  # 1.5 * 2**23: adding it leaves no bits for a fraction, so the sum is rounded to an integer


class LanesType(types.Type):  # type: ignore[misc]
    """Numba's view of sixteen f32."""

    def __init__(self) -> None:
        super().__init__(name="f32x16")

    def can_convert_from(self, typingctx: Any, other: Any) -> Any:
        return Conversion.safe if isinstance(other, (types.Float, types.Integer)) else None


lanes_type = LanesType()


@register_default(LanesType)
class _LanesModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, _VECTOR)


def _splatted(builder: ir.IRBuilder, scalar: ir.Value) -> ir.Value:
    first = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), scalar, _I32(0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(_I32, WIDTH), [0] * WIDTH))


@lower_cast(types.Float, LanesType)
@lower_cast(types.Integer, LanesType)
def _cast(context: Any, builder: ir.IRBuilder, fromty: Any, toty: Any, value: ir.Value) -> ir.Value:
    return _splatted(builder, context.cast(builder, value, fromty, types.float32))


def _add_operator(function: Any, instruction: str) -> None:
    @infer_global(function)
    class _Binary(ConcreteTemplate):  # type: ignore[misc]
        cases = (signature(lanes_type, lanes_type, lanes_type),)

    @lower_builtin(function, lanes_type, lanes_type)
    def _lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return getattr(builder, instruction)(*args)


for _function, _inplace, _instruction in (
    (operator.add, operator.iadd, "fadd"),
    (operator.sub, operator.isub, "fsub"),
    (operator.mul, operator.imul, "fmul"),
    (operator.truediv, operator.itruediv, "fdiv"),
):
    _add_operator(_function, _instruction)
    _add_operator(_inplace, _instruction)


def _pointer(context: Any, builder: ir.IRBuilder, arrayty: Any, array: Any, indexty: Any, index: Any) -> ir.Value:
    view = context.make_array(arrayty)(context, builder, array)
    offset = context.cast(builder, index, indexty, types.intp)
    return builder.bitcast(builder.gep(view.data, [offset]), _VECTOR.as_pointer())


def intrinsic(function: Callable[..., Any]) -> Callable[..., Any]:
    """Declares `function` to numba: it names the result's type and emits the LLVM instructions."""
    return numba_intrinsic(function)  # type: ignore[no-any-return]


@intrinsic
def load(typingctx: Any, array: Any, start: Any) -> Any:
    """`array[start : start + 16]` of a contiguous f32 array; no bounds are checked."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.load(_pointer(context, builder, sig.args[0], args[0], sig.args[1], args[1]), align=4)

    return lanes_type(array, start), codegen


@intrinsic
def store(typingctx: Any, array: Any, start: Any, value: Any) -> Any:
    """`array[start : start + 16] = value` of a contiguous f32 array; no bounds are checked."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        builder.store(args[2], _pointer(context, builder, sig.args[0], args[0], sig.args[1], args[1]), align=4)
        return context.get_dummy_value()

    return types.void(array, start, lanes_type), codegen


@intrinsic
def splat(typingctx: Any, value: Any) -> Any:
    """The same number in every lane."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return _splatted(builder, context.cast(builder, args[0], sig.args[0], types.float32))

    return lanes_type(value), codegen


def _choose(comparison: str) -> Any:
    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.select(builder.fcmp_ordered(comparison, args[0], args[1]), args[0], args[1])

    return codegen


@intrinsic
def lowest(typingctx: Any, a: Any, b: Any) -> Any:
    """The smaller of each two lanes."""
    return lanes_type(lanes_type, lanes_type), _choose("<")


@intrinsic
def highest(typingctx: Any, a: Any, b: Any) -> Any:
    """The larger of each two lanes."""
    return lanes_type(lanes_type, lanes_type), _choose(">")


@intrinsic
def where_less(typingctx: Any, a: Any, b: Any, yes: Any, no: Any) -> Any:
    """`yes` in the lanes where a < b, `no` in the others."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.select(builder.fcmp_ordered("<", args[0], args[1]), args[2], args[3])

    return lanes_type(lanes_type, lanes_type, lanes_type, lanes_type), codegen


@intrinsic
def rounded(typingctx: Any, value: Any) -> Any:
    """Each lane rounded to the nearest integer, ties to even; |value| must stay below 2**22."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        rounder = ir.Constant(_VECTOR, [ir.Constant(_FLOAT, _ROUNDER)] * WIDTH)
        return builder.fsub(builder.fadd(args[0], rounder), rounder)

    return lanes_type(lanes_type), codegen


@intrinsic
def total(typingctx: Any, value: Any) -> Any:
    """The sum over the lanes, halves first: the order is fixed, so the result is too."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return _reduced(builder, args[0], builder.fadd)

    return types.float32(lanes_type), codegen


@intrinsic
def smallest(typingctx: Any, value: Any) -> Any:
    """The smallest lane."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return _reduced(builder, args[0], lambda a, b: builder.select(builder.fcmp_ordered("<", a, b), a, b))

    return types.float32(lanes_type), codegen


@intrinsic
def largest(typingctx: Any, value: Any) -> Any:
    """The largest lane."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return _reduced(builder, args[0], lambda a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b))

    return types.float32(lanes_type), codegen


def _reduced(builder: ir.IRBuilder, vector: ir.Value, combine: Any) -> ir.Value:
    width = WIDTH
    while width > 1:
        width //= 2
        low, high = (ir.Constant(ir.VectorType(_I32, width), list(range(at, at + width))) for at in (0, width))
        vector = combine(builder.shuffle_vector(vector, vector, low), builder.shuffle_vector(vector, vector, high))
    return builder.extract_element(vector, _I32(0))


@intrinsic
def lane(typingctx: Any, value: Any, index: Any) -> Any:
    """One lane as a f32."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.extract_element(args[0], context.cast(builder, args[1], sig.args[1], types.int32))

    return types.float32(lanes_type, index), codegen


@intrinsic
def first_equal(typingctx: Any, value: Any, wanted: Any) -> Any:
    """The first lane that equals `wanted`; 0 if none does."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        wanted_lanes = _splatted(builder, args[1])
        hits = builder.fcmp_ordered("==", args[0], wanted_lanes)
        bits = builder.bitcast(hits, ir.IntType(WIDTH))
        place = builder.cttz(builder.zext(bits, _I32), ir.Constant(ir.IntType(1), 0))
        return builder.zext(builder.and_(place, _I32(WIDTH - 1)), ir.IntType(64))

    return types.int64(lanes_type, types.float32), codegen
