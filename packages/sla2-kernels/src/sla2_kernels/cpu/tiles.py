"""The matrix product inside the kernels: register tiles written as LLVM vectors, which numba
compiles for this CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from sla2_kernels.cpu.build import Array, Typed, inner

PAD = 16  # columns of every operand come in multiples of this, rows in multiples of ROWS
ROWS = 8


def _register_bytes() -> tuple[int, int]:
    """Bytes of a vector register, and how many vectors wide the widest tile is (32 registers hold 4
    x 4, 16 hold 4 x 2).
    """
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 64, 4
    if features.get("avx2"):
        return 32, 2
    return (
        16,
        4 if "aarch64" in llvm.get_process_triple() or "arm64" in llvm.get_process_triple() else 2,
    )


REGISTER, WIDE_VECTORS = _register_bytes()
WIDE_BYTES = REGISTER * WIDE_VECTORS
_I64, _I32 = ir.IntType(64), ir.IntType(32)


def _tile_function(
    module: ir.Module, element: ir.Type, size: int, rows: int, vectors: int
) -> ir.Function:
    """void tile(A, a_rs, a_ks, B, ldb, C, ldc, depth, accumulate): C[rows, vectors] (+)= A B;
    strides in elements.
    """
    name = f"sla2_tile_{size}_{rows}_{vectors}"
    if name in module.globals:
        return module.globals[name]
    lanes = REGISTER // size
    vector, pointer = ir.VectorType(element, lanes), element.as_pointer()
    fma = cgutils.get_or_insert_function(
        module, ir.FunctionType(vector, [vector] * 3), f"llvm.fma.v{lanes}f{8 * size}"
    )
    arguments = [pointer, _I64, _I64, pointer, _I64, pointer, _I64, _I64, _I64]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), arguments), name)
    function.linkage = "internal"
    a, a_rs, a_ks, b, ldb, c, ldc, depth, accumulate = function.args
    entry, load, loop, store = (
        function.append_basic_block(x) for x in ("entry", "load", "loop", "store")
    )

    def places(builder: ir.IRBuilder) -> Iterator[ir.Value]:
        """Pointers to the tile's vectors in C."""
        for row in range(rows):
            start = builder.gep(c, [builder.mul(ldc, ir.Constant(_I64, row))])
            for v in range(vectors):
                yield builder.bitcast(
                    builder.gep(start, [ir.Constant(_I64, lanes * v)]), vector.as_pointer()
                )

    builder = ir.IRBuilder(entry)
    builder.cbranch(builder.icmp_signed("!=", accumulate, ir.Constant(_I64, 0)), load, loop)
    builder = ir.IRBuilder(load)
    before = [builder.load(place, align=size) for place in places(builder)]
    builder.branch(loop)

    builder = ir.IRBuilder(loop)
    k = builder.phi(_I64)
    k.add_incoming(ir.Constant(_I64, 0), entry)
    k.add_incoming(ir.Constant(_I64, 0), load)
    sums = []
    for value in before:
        total = builder.phi(vector)
        total.add_incoming(ir.Constant(vector, None), entry)
        total.add_incoming(value, load)
        sums.append(total)
    a_k, b_k = builder.gep(a, [builder.mul(k, a_ks)]), builder.gep(b, [builder.mul(k, ldb)])
    right = []
    for v in range(vectors):
        place = builder.bitcast(
            builder.gep(b_k, [ir.Constant(_I64, lanes * v)]), vector.as_pointer()
        )
        right.append(builder.load(place, align=size))
    after = []
    undefined = ir.Constant(vector, ir.Undefined)
    for row in range(rows):
        value = builder.load(
            builder.gep(a_k, [builder.mul(a_rs, ir.Constant(_I64, row))]), align=size
        )
        single = builder.insert_element(undefined, value, ir.Constant(_I32, 0))
        left = builder.shuffle_vector(
            single, undefined, ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes)
        )
        after += [
            builder.call(fma, [left, right[v], sums[row * vectors + v]]) for v in range(vectors)
        ]
    following = builder.add(k, ir.Constant(_I64, 1))
    k.add_incoming(following, loop)
    for total, value in zip(sums, after):
        total.add_incoming(value, loop)
    builder.cbranch(builder.icmp_signed("<", following, depth), loop, store)

    builder = ir.IRBuilder(store)
    for place, value in zip(places(builder), after):
        builder.store(value, place, align=size)
    builder.ret_void()
    return function


def _tile(wide: bool) -> Callable[..., None]:
    """Intrinsic tile(A, a0, a_rs, a_ks, B, b0, ldb, C, c0, ldc, depth, accumulate): arrays, element
    offsets and strides.
    """

    @intrinsic
    def tile(
        context: Any,
        a: Any,
        a0: Any,
        a_rs: Any,
        a_ks: Any,
        b: Any,
        b0: Any,
        ldb: Any,
        c: Any,
        c0: Any,
        ldc: Any,
        depth: Any,
        accumulate: Any,
    ) -> Typed:
        integer = types.intp
        signature = types.void(
            a, integer, integer, integer, b, integer, integer, c, integer, integer, integer, integer
        )

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
            kinds = signature.args
            element = context.get_data_type(kinds[0].dtype)
            size = kinds[0].dtype.bitwidth // 8
            rows, vectors = (4, WIDE_VECTORS) if wide else (ROWS, PAD * size // REGISTER)

            def at(which: int, offset: int) -> ir.Value:
                array = context.make_array(kinds[which])(context, builder, values[which])
                return builder.gep(array.data, [values[offset]])

            function = _tile_function(builder.module, element, size, rows, vectors)
            builder.call(
                function,
                [at(0, 1), values[2], values[3], at(4, 5), values[6], at(7, 8), *values[9:12]],
            )
            return context.get_dummy_value()

        return signature, generate

    typed: Callable[..., None] = tile
    return typed


_wide, _narrow = _tile(True), _tile(False)


@inner
def gemm(
    a: Array,
    a0: int,
    a_rs: int,
    a_ks: int,
    b: Array,
    b0: int,
    ldb: int,
    c: Array,
    c0: int,
    ldc: int,
    m: int,
    n: int,
    depth: int,
    accumulate: int,
) -> None:
    """C[m, n] = A B, or += with `accumulate`. A[i, k] is a.flat[a0 + i a_rs + k a_ks], rows of B
    and C are contiguous.

    m is a multiple of ROWS, n of PAD, depth >= 1; offsets and strides count elements of contiguous
    arrays of one dtype.
    """
    width = WIDE_BYTES // a.itemsize
    j = 0
    while n - j >= width:
        for i in range(0, m, 4):
            _wide(
                a,
                a0 + i * a_rs,
                a_rs,
                a_ks,
                b,
                b0 + j,
                ldb,
                c,
                c0 + i * ldc + j,
                ldc,
                depth,
                accumulate,
            )
        j += width
    while j < n:
        for i in range(0, m, ROWS):
            _narrow(
                a,
                a0 + i * a_rs,
                a_rs,
                a_ks,
                b,
                b0 + j,
                ldb,
                c,
                c0 + i * ldc + j,
                ldc,
                depth,
                accumulate,
            )
        j += PAD
