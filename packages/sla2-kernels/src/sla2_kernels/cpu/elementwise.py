"""exp2, row reductions, softmax, rounding to low-bit formats, transposes inside the kernels; LLVM
vectorises them.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from sla2_kernels.cpu.build import FASTMATH, Array, Typed, inner

LOG2_E = 1.0 / math.log(2.0)
LN_2 = math.log(2.0)
_BITS = {types.float32: (32, 23, 127, -126.0, 7), types.float64: (64, 52, 1023, -1022.0, 13)}


def _call(builder: ir.IRBuilder, name: str, *values: ir.Value) -> ir.Value:
    """An LLVM intrinsic of one floating type."""
    kind = values[0].type
    name = f"llvm.{name}.{'f32' if kind == ir.FloatType() else 'f64'}"
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(kind, [kind] * len(values)), name
    )
    return builder.call(function, values)


@intrinsic
def exp2(context: Any, x: Any) -> Typed:
    """2 ** x: 2 ** round(x) by exponent bits, times a Taylor polynomial of the rest (error 5e-9,
    4e-18 in fp64).

    0 below the normal numbers; NaN stays NaN; for x up to the largest exponent.
    """
    bits, mantissa, bias, low, degree = _BITS[x]

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        kind, integer = values[0].type, ir.IntType(bits)

        def number(value: float) -> ir.Constant:
            return ir.Constant(kind, value)

        below = builder.fcmp_ordered("<", values[0], number(low))
        y = builder.select(below, number(low), values[0])
        above = builder.fcmp_ordered(">", y, number(bias))
        y = builder.select(above, number(bias), y)
        whole = _call(builder, "rint", y)
        rest = builder.fsub(y, whole)
        terms = [
            (
                float(np.float32(LN_2**i / math.factorial(i)))
                if bits == 32
                else LN_2**i / math.factorial(i)
            )
            for i in range(degree + 1)
        ]
        total = number(terms[-1])
        for term in reversed(terms[:-1]):
            total = _call(builder, "fmuladd", total, rest, number(term))
        power = builder.add(builder.fptosi(whole, integer), ir.Constant(integer, bias))
        power = builder.bitcast(builder.shl(power, ir.Constant(integer, mantissa)), kind)
        return builder.select(below, number(0.0), builder.fmul(total, power))

    return x(x), generate


@intrinsic
def rint(context: Any, x: Any) -> Typed:
    """The nearest integer, ties to even."""
    return x(x), lambda context, builder, signature, values: _call(builder, "rint", values[0])


@intrinsic
def floor_power_of_two(context: Any, x: Any) -> Typed:
    """The largest power of two <= x, for x > 0: the mantissa bits dropped."""
    bits, mantissa = _BITS[x][:2]

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        integer = ir.IntType(bits)
        mask = ((1 << bits) - 1) ^ ((1 << mantissa) - 1)
        kept = builder.and_(builder.bitcast(values[0], integer), ir.Constant(integer, mask))
        return builder.bitcast(kept, values[0].type)

    return x(x), generate


# "nnan": a NaN is not lost, it comes back in exp2(x - maximum)
@numba.njit(fastmath=FASTMATH | {"nnan"}, nogil=True, forceinline=True)
def row_maximum(x: Array, row: int, count: int, start: float) -> float:
    """max(start, x[row, :count])."""
    top = start
    for c in range(count):
        value = x[row, c]
        top = value if value > top else top
    return top


@inner
def exponentials(x: Array, row: int, count: int, shift: float) -> float:
    """x[row, :count] <- exp2(x - shift); returns their sum."""
    total: float = x.dtype.type(0)
    for c in range(count):
        p = exp2(x[row, c] - shift)
        x[row, c] = p
        total += p
    return total


@inner
def softmax_rows(x: Array, rows: int, d: int) -> None:
    """x[:rows, :d] <- softmax over d (the feature map phi)."""
    scale = x.dtype.type(LOG2_E)
    for r in range(rows):
        top = row_maximum(x, r, d, x.dtype.type(-np.inf))
        for c in range(d):
            x[r, c] = (x[r, c] - top) * scale
        one = x.dtype.type(1) / exponentials(x, r, d, x.dtype.type(0))
        for c in range(d):
            x[r, c] *= one


@inner
def round_e4m3(x: Array, row: int, count: int) -> None:
    """x[row, :count] in [0, 1] <- the nearest multiple of 1/448 that FP8 E4M3 holds,
    ties to even.
    """
    limit, least, eighth = x.dtype.type(448), x.dtype.type(2.0**-6), x.dtype.type(0.125)
    for c in range(count):
        value = x[row, c] * limit
        size = value if value > least else least
        step = floor_power_of_two(size) * eighth
        x[row, c] = rint(value / step) * step / limit


@inner
def round_int8(x: Array, row: int, count: int) -> None:
    """x[row, :count] in [0, 1] <- the nearest multiple of 1/127, ties to even."""
    limit = x.dtype.type(127)
    for c in range(count):
        x[row, c] = rint(x[row, c] * limit) / limit


@inner
def load_rows(x: Array, bh: int, start: int, count: int, factor: float, out: Array) -> None:
    """out[:count, :d] <- factor * x[bh, start:start + count]; the rest of `out` <- 0."""
    d = x.shape[2]
    for r in range(out.shape[0]):
        if r < count:
            for c in range(d):
                out[r, c] = x[bh, start + r, c] * factor
            for c in range(d, out.shape[1]):
                out[r, c] = 0
        else:
            for c in range(out.shape[1]):
                out[r, c] = 0


@inner
def transpose(x: Array, out: Array) -> None:
    """out <- x transposed, in tiles of 16 x 16."""
    for r0 in range(0, x.shape[0], 8):
        for c0 in range(0, x.shape[1], 16):
            for c in range(c0, c0 + 16):
                for r in range(r0, r0 + 8):
                    out[c, r] = x[r, c]
