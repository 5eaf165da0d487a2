"""Per key block: K and V laid out for the products, their means, and the linear branch's states
h_j, z_j; masked sums of those.
"""

from __future__ import annotations

import numpy as np

from sla2_kernels.cpu.build import Array, inner, kernel
from sla2_kernels.cpu.elementwise import load_rows, softmax_rows, transpose
from sla2_kernels.cpu.tiles import gemm

DEPTH = 128  # of a step of the masked sum: a panel of 128 x 64 stays in the first-level cache


@inner
def copy(x: Array, out: Array) -> None:
    """out <- x, two dimensions."""
    for r in range(x.shape[0]):
        for c in range(x.shape[1]):
            out[r, c] = x[r, c]


@inner
def to_panels(x: Array, bh: int, j: int, panels: Array) -> None:
    """panels[bh, :, j] <- x (rows, D) flattened, cut into panels.shape[3] numbers each."""
    width = panels.shape[3]
    parts = x.shape[1] // width
    for r in range(panels.shape[1] // parts):
        for part in range(parts):
            for c in range(width):
                panels[bh, r * parts + part, j, c] = x[r, part * width + c]


@inner
def mean_of(x: Array, bh: int, start: int, count: int, out: Array) -> None:
    """out <- the mean of x[bh, start:start + count], 0 without a token."""
    for c in range(x.shape[2]):
        out[c] = 0
    for r in range(start, start + count):
        for c in range(x.shape[2]):
            out[c] += x[bh, r, c]
    one = x.dtype.type(1) / x.dtype.type(max(1, count))
    for c in range(x.shape[2]):
        out[c] *= one


@kernel
def key_blocks(
    k_low: Array,
    v_low: Array,
    k: Array,
    v: Array,
    tokens: Array,
    block: int,
    scale: float,
    kt: Array,
    k_rows: Array,
    vt: Array,
    v_rows: Array,
    states: Array,
    means_k: Array,
    means_v: Array,
    lo: int,
    hi: int,
) -> None:
    """Lay out one head's key block per item: D and W are d and block_k padded. Outputs with T_n = 0
    are left out.

    k_low, v_low; k, v: (G, N_k, d), what the sparse branch sees; what the complement sees.
    tokens (G, T_n): valid ones. kt (G, T_n, D, W) <- scale K_low transposed; k_rows (G, T_n, W, D)
    <- K_low; vt, v_rows likewise, unscaled. states (G, P, T_n, S): (h_j, z_j), (D + 1) D numbers,
    in P panels of S, so that a panel of all blocks is contiguous. means_k, means_v (G, T_n, d):
    the means of k and v.
    """
    t_n, d = tokens.shape[1], k.shape[2]
    wide, width = kt.shape[2], kt.shape[3]
    rows, values = np.empty((width, wide), k.dtype), np.empty((width, wide), k.dtype)
    state = np.empty((wide + 1, wide), k.dtype)
    one = k.dtype.type(1)
    for item in range(lo, hi):
        bh, j = item // t_n, item % t_n
        count, start = tokens[bh, j], j * block
        load_rows(k_low, bh, start, count, one, rows)
        if k_rows.shape[1]:
            copy(rows, k_rows[bh, j])
        for r in range(count):
            for c in range(d):
                rows[r, c] *= scale
        transpose(rows, kt[bh, j])
        load_rows(v_low, bh, start, count, one, values)
        if v_rows.shape[1]:
            copy(values, v_rows[bh, j])
        if vt.shape[1]:
            transpose(values, vt[bh, j])
        if states.shape[1]:
            load_rows(k, bh, start, count, one, rows)
            softmax_rows(rows, count, d)
            load_rows(v, bh, start, count, one, values)
            gemm(rows, 0, 1, wide, values, 0, wide, state, 0, wide, wide, wide, width, 0)
            for c in range(wide):
                state[wide, c] = 0
            for r in range(count):
                for c in range(wide):
                    state[wide, c] += rows[r, c]
            to_panels(state, bh, j, states)
        if means_k.shape[1]:
            mean_of(k, bh, start, count, means_k[bh, j])
            mean_of(v, bh, start, count, means_v[bh, j])


@kernel
def complement(
    rest: Array, indices: Array, counts: Array, tokens: Array, share: Array, lo: int, hi: int
) -> None:
    """Mark the valid key blocks that are not selected; one head per item.

    rest (G, rows, T_n padded) <- 1 for them, 0 for the others. share (G, T_m) <- 0 if the row
    selects nothing, 2 if it selects everything, 1 otherwise.
    """
    t_m, t_n = counts.shape[1], tokens.shape[1]
    for bh in range(lo, hi):
        rest[bh] = 0
        for i in range(t_m):
            for j in range(t_n):
                rest[bh, i, j] = 1 if tokens[bh, j] > 0 else 0
            selected = 0
            for s in range(counts[bh, i]):
                j = indices[bh, i, s]
                selected += 1 if tokens[bh, j] > 0 else 0
                rest[bh, i, j] = 0
            left = 0
            for j in range(t_n):
                left += 1 if rest[bh, i, j] > 0 else 0
            share[bh, i] = 2 if left == 0 else (0 if selected == 0 else 1)


@kernel
def masked_sum(rest: Array, panels: Array, turned: bool, out: Array, lo: int, hi: int) -> None:
    """out[i] <- sum_j rest[i, j] panels[j], or out[j] <- sum_i rest[i, j] panels[i] if `turned`;
    one panel per item.

    rest (G, rows, columns), both padded. panels (G, P, n, S). out (G, padded rows, P S).
    """
    count, depth, size = panels.shape[1], panels.shape[2], panels.shape[3]
    row_step, depth_step = (1, rest.shape[2]) if turned else (rest.shape[2], 1)
    for item in range(lo, hi):
        bh, p = item // count, item % count
        for k in range(0, depth, DEPTH):
            gemm(
                rest,
                bh * rest.shape[1] * rest.shape[2] + k * depth_step,
                row_step,
                depth_step,
                panels,
                ((bh * count + p) * depth + k) * size,
                size,
                out,
                bh * out.shape[1] * out.shape[2] + p * size,
                out.shape[2],
                out.shape[1],
                size,
                min(DEPTH, depth - k),
                k,
            )
