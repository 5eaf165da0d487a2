"""Per query block: softmax over the selected key blocks; the linear branch over the others and
their mixture, or the pooled keys of the others in the same softmax.
"""

from __future__ import annotations

import numpy as np

from sla2_kernels.cpu.build import Array, inner, kernel
from sla2_kernels.cpu.elementwise import (
    LN_2,
    load_rows,
    round_e4m3,
    round_int8,
    softmax_rows,
)
from sla2_kernels.cpu.pooled import online_softmax, pooled_of_block
from sla2_kernels.cpu.tiles import gemm


@inner
def scores_of_block(
    x: Array, depth: int, blocks: Array, block: int, tokens: int, scores: Array, column: int
) -> None:
    """scores[:, column:column + W] <- x blocks[block], with -inf for the keys at or past `tokens`.

    x (rows, D). blocks is a contiguous (..., D, W) array seen as a list of blocks.
    """
    wide, width, total = x.shape[1], blocks.shape[3], scores.shape[1]
    gemm(
        x,
        0,
        wide,
        1,
        blocks,
        block * wide * width,
        width,
        scores,
        column,
        total,
        x.shape[0],
        width,
        depth,
        0,
    )
    if tokens < width:
        for r in range(x.shape[0]):
            for c in range(column + tokens, column + width):
                scores[r, c] = -np.inf


@inner
def linear_of_block(
    phi: Array, sums: Array, bh: int, row: int, d: int, below: Array, out: Array
) -> None:
    """out <- phi H / (phi . Z), below <- phi . Z; sums[bh, row] holds (H, Z). Rows with phi . Z = 0
    become 0.
    """
    wide = phi.shape[1]
    start = (bh * sums.shape[1] + row) * sums.shape[2]
    gemm(phi, 0, wide, 1, sums, start, wide, out, 0, wide, phi.shape[0], wide, d, 0)
    for r in range(phi.shape[0]):
        total = phi.dtype.type(0)
        for c in range(wide):
            total += phi[r, c] * sums[bh, row, wide * wide + c]
        below[r] = total
        one = phi.dtype.type(0) if total == 0 else phi.dtype.type(1) / total
        for c in range(wide):
            out[r, c] = phi.dtype.type(0) if total == 0 else out[r, c] * one


@kernel
def query_blocks(
    q_low: Array,
    q: Array,
    indices: Array,
    counts: Array,
    tokens: Array,
    block: int,
    group: int,
    rounding: int,
    kt: Array,
    v_rows: Array,
    sums: Array,
    share: Array,
    alpha: Array,
    pooled_kt: Array,
    pooled_v: Array,
    sizes: Array,
    o_s: Array,
    lse: Array,
    out: Array,
    lo: int,
    hi: int,
) -> None:
    """One head's query block per item: O_s and L (natural) of the sparse branch; with `sums` also
    the mixture. With `sizes` O_s and L are those of the softmax that the pooled keys have joined.

    q_low, q: (G, N_q, d), what the sparse branch and the complement see. indices (G, T_m, K),
    counts (G, T_m). group: key blocks whose scores are held at once; all of them if `rounding` (0
    none, 1 FP8 E4M3, 2 INT8 of P~). kt, v_rows from key_blocks, kt scaled by log2(e) / sqrt(d).
    sums (G, rows, (D + 1) D) or with 0 rows: no linear branch. share, alpha: (G, T_m). pooled_kt,
    pooled_v: kt and v_rows of the pooled keys; sizes of log_sizes, or with 0 rows: no pooled keys.
    o_s, out: (G, N_q, d); lse: (G, N_q).
    """
    t_m, t_n = counts.shape[1], tokens.shape[1]
    n_q, d = q.shape[1], q.shape[2]
    wide, width = kt.shape[2], kt.shape[3]
    padded = -(-block // 16) * 16
    kind = q.dtype.type
    one, zero, nothing = kind(1), kind(0), kind(-np.inf)
    x, acc, linear = (
        np.empty((padded, wide), q.dtype),
        np.empty((padded, wide), q.dtype),
        np.empty((padded, wide), q.dtype),
    )
    scores = np.empty((padded, max(group * width, pooled_kt.shape[3])), q.dtype)
    top, total, below = (
        np.empty(padded, q.dtype),
        np.empty(padded, q.dtype),
        np.empty(padded, q.dtype),
    )
    for item in range(lo, hi):
        bh, i = item // t_m, item % t_m
        start = i * block
        rows = min(block, n_q - start)
        height = -(-rows // 8) * 8
        load_rows(q_low, bh, start, rows, one, x)
        for r in range(padded):
            top[r] = nothing
            total[r] = 0
            for c in range(wide):
                acc[r, c] = 0
        first, seen = 0, False
        while first < counts[bh, i]:
            last = min(first + group, counts[bh, i])
            used = 0
            for s in range(first, last):
                j = indices[bh, i, s]
                if tokens[bh, j] > 0:
                    scores_of_block(
                        x[:height], d, kt, bh * t_n + j, tokens[bh, j], scores, used * width
                    )
                    used += 1
            if used:
                seen = True
                online_softmax(scores, rows, used * width, top, total, acc)
                for r in range(rows if rounding else 0):
                    if rounding == 1:
                        round_e4m3(scores, r, used * width)
                    elif rounding == 2:
                        round_int8(scores, r, used * width)
                used = 0
                for s in range(first, last):
                    j = indices[bh, i, s]
                    if tokens[bh, j] > 0:
                        gemm(
                            scores,
                            used * width,
                            scores.shape[1],
                            1,
                            v_rows,
                            (bh * t_n + j) * width * wide,
                            wide,
                            acc,
                            0,
                            wide,
                            height,
                            wide,
                            width,
                            1,
                        )
                        used += 1
            first = last
        if sizes.shape[1]:
            load_rows(q, bh, start, rows, one, x)  # the pooled part is not rounded
            whole = x[:height]
            joined = pooled_of_block(
                whole, rows, d, sizes, bh, i, pooled_kt, pooled_v, scores, top, total, acc
            )
            seen = seen or joined
        for r in range(rows):
            factor = one / total[r] if seen else zero
            lse[bh, start + r] = (top[r] + np.log2(total[r])) * kind(LN_2) if seen else nothing
            for c in range(d):
                o_s[bh, start + r, c] = acc[r, c] * factor if seen else zero
        if sums.shape[1] == 0:
            continue
        weight = alpha[bh, i] if share[bh, i] == 1 else (one if share[bh, i] == 2 else zero)
        if share[bh, i] != 2:
            load_rows(q, bh, start, rows, one, x)
            softmax_rows(x, rows, d)
            linear_of_block(x[:height], sums, bh, i, d, below, linear)
        for r in range(rows):
            for c in range(d):
                sparse = o_s[bh, start + r, c]
                out[bh, start + r, c] = (
                    sparse if share[bh, i] == 2 else linear[r, c] + weight * (sparse - linear[r, c])
                )
