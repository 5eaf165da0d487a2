"""Means of the blocks of Q or K, in one pass over fp32, fp64 or bfloat16."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from sla2_kernels.cpu.build import Array, Typed, kernel, run


@intrinsic
def _from_bits(context: Any, x: Any) -> Typed:
    """The fp32 value of a bfloat16 given as its uint16 bits; float values as they are."""
    if x != types.uint16:
        return x(x), lambda context, builder, signature, values: values[0]

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        wide = builder.zext(values[0], ir.IntType(32))
        return builder.bitcast(builder.shl(wide, ir.Constant(ir.IntType(32), 16)), ir.FloatType())

    return types.float32(x), generate


@kernel
def _block_means(x: Array, lengths: Array, block: int, means: Array, lo: int, hi: int) -> None:
    count, sums = means.shape[1], np.empty(means.shape[2], means.dtype)
    for item in range(lo, hi):
        bh, i = item // count, item % count
        start = i * block
        stop = max(start, min(start + block, lengths[bh]))
        sums[:] = 0
        for t in range(start, stop):
            for c in range(len(sums)):
                sums[c] += _from_bits(x[bh, t, c])
        one = means.dtype.type(1) / means.dtype.type(max(1, stop - start))
        for c in range(len(sums)):
            means[bh, i, c] = sums[c] * one


def block_means(x: Array, lengths: Array, block: int, threads: int = 1) -> Array:
    """Mean of the valid tokens of each block; blocks without one are 0.

    Args:
        x: (G, N, d) float32, float64, or uint16, the bits of bfloat16.
        lengths: valid tokens, int64 (G,).
        block: tokens in a block; the last one may be short.

    Returns:
        (G, ceil(N / block), d) in fp32 (fp64 for fp64).
    """
    kind = np.float64 if x.dtype == np.float64 else np.float32
    means = np.empty((x.shape[0], -(-x.shape[1] // block), x.shape[2]), kind)
    run(_block_means, means.shape[0] * means.shape[1], threads, x, lengths, block, means)
    return means
