"""Gradients: per query block dQ, d alpha and the gradient of (H, Z) or of the pooled keys; per key
block dK and dV over the transposed map.
"""

from __future__ import annotations

import numpy as np

from sla2_kernels.cpu.build import Array, inner, kernel
from sla2_kernels.cpu.elementwise import LOG2_E, exp2, load_rows, softmax_rows, transpose
from sla2_kernels.cpu.forward import linear_of_block, scores_of_block
from sla2_kernels.cpu.pooled import pooled_backward
from sla2_kernels.cpu.states import copy, to_panels
from sla2_kernels.cpu.tiles import gemm


@inner
def _softmax_backward(phi: Array, d_phi: Array, rows: int, d: int) -> None:
    """d_phi <- phi (d_phi - sum(d_phi phi)): the gradient of the softmax's input."""
    for r in range(rows):
        mean = phi.dtype.type(0)
        for c in range(d):
            mean += phi[r, c] * d_phi[r, c]
        for c in range(d):
            d_phi[r, c] = phi[r, c] * (d_phi[r, c] - mean)


@inner
def _linear_backward(
    phi: Array,
    sums: Array,
    bh: int,
    row: int,
    d: int,
    rows: int,
    weight: float,
    below: Array,
    o_l: Array,
    grad: Array,
    turned: Array,
    d_sum: Array,
    d_phi: Array,
) -> None:
    """From dO_l = (1 - weight) grad: d_phi <- gradient of phi, d_sum <- (dH, dZ) of this query
    block. Uses up `grad`, o_l.
    """
    wide = phi.shape[1]
    one, zero = phi.dtype.type(1), phi.dtype.type(0)
    start = (bh * sums.shape[1] + row) * sums.shape[2]
    for r in range(phi.shape[0]):
        factor = zero if r >= rows or below[r] == 0 else (one - weight) / below[r]
        mean = zero
        for c in range(wide):
            grad[r, c] *= factor
            mean += grad[r, c] * o_l[r, c]
        below[r] = -mean  # the gradient of phi . Z
    gemm(phi, 0, 1, wide, grad, 0, wide, d_sum, 0, wide, wide, wide, phi.shape[0], 0)
    for c in range(wide):
        d_sum[wide, c] = 0
    for r in range(rows):
        for c in range(wide):
            d_sum[wide, c] += below[r] * phi[r, c]
    # d_phi transposed = H grad transposed: H is the left factor, read by rows
    transpose(grad, turned)
    gemm(
        sums,
        start,
        wide,
        1,
        turned,
        0,
        turned.shape[1],
        d_phi,
        0,
        turned.shape[1],
        wide,
        turned.shape[1],
        wide,
        0,
    )
    for c in range(wide):
        for r in range(rows):
            d_phi[c, r] += below[r] * sums[bh, row, wide * wide + c]


@kernel
def d_query_blocks(
    q: Array,
    grad_out: Array,
    o_s: Array,
    lse: Array,
    indices: Array,
    counts: Array,
    tokens: Array,
    block: int,
    kt: Array,
    k_rows: Array,
    vt: Array,
    sums: Array,
    share: Array,
    alpha: Array,
    pooled_kt: Array,
    pooled_k: Array,
    pooled_vt: Array,
    sizes: Array,
    step: int,
    d_q: Array,
    d_alpha: Array,
    d_sums: Array,
    d_pooled_k: Array,
    d_pooled_v: Array,
    d_rows: Array,
    q_rows: Array,
    q_turned: Array,
    g_rows: Array,
    g_turned: Array,
    lo: int,
    hi: int,
) -> None:
    """`step` query blocks of one head per item: d_q (G, N_q, d), d_alpha (G, T_m) of alpha or of b,
    and what the pass over key blocks needs.

    kt scaled by log2(e) / sqrt(d). pooled_kt, pooled_k, pooled_vt: kt, k_rows and vt of the pooled
    keys; sizes of log_sizes, or with 0 rows: no pooled keys. d_rows (G, 2, T_m, R) <- L log2(e),
    +inf where there is nothing, and D; q_rows, g_rows (G, T_m, R, D) and q_turned, g_turned (G,
    T_m, D, R): Q and dO_s; d_sums panels (G, P, T_m, S) of (dH, dZ); d_pooled_k, d_pooled_v (G,
    items of a head, P, W D): what the item adds to the gradients of pooled keys and values.
    """
    t_m, t_n = counts.shape[1], tokens.shape[1]
    n_q, d = q.shape[1], q.shape[2]
    wide, width = kt.shape[2], kt.shape[3]
    padded = q_rows.shape[2]
    kind = q.dtype.type
    one, zero = kind(1), kind(0)
    x, grad, acc = (
        np.empty((padded, wide), q.dtype),
        np.empty((padded, wide), q.dtype),
        np.empty((padded, wide), q.dtype),
    )
    scores, d_scores = np.empty((padded, width), q.dtype), np.empty((padded, width), q.dtype)
    o_l, below = np.empty((padded, wide), q.dtype), np.empty(padded, q.dtype)
    d_phi, turned, d_sum = (
        np.empty((wide, padded), q.dtype),
        np.empty((wide, padded), q.dtype),
        np.empty((wide + 1, wide), q.dtype),
    )
    linear = sums.shape[1] > 0
    scale = kind(1.0 / np.sqrt(d))
    pooled_width = pooled_kt.shape[3]
    pooled_scores, pooled_d_scores = (
        np.empty((padded, pooled_width), q.dtype),
        np.empty((padded, pooled_width), q.dtype),
    )
    parts = -(-t_m // step)
    for number in range(lo * step, hi * step):
        bh, part = number // step // parts, number // step % parts
        i = part * step + number % step
        if i >= t_m:
            continue
        start = i * block
        rows = min(block, n_q - start)
        weight = one
        if linear:
            weight = alpha[bh, i] if share[bh, i] == 1 else (one if share[bh, i] == 2 else zero)
        load_rows(grad_out, bh, start, rows, one, grad)
        d_alpha[bh, i] = 0
        mixed = linear and share[bh, i] != 2
        if mixed:
            load_rows(q, bh, start, rows, one, x)
            softmax_rows(x, rows, d)
            linear_of_block(x, sums, bh, i, d, below, o_l)
            if share[bh, i] == 1:
                total = zero
                for r in range(rows):
                    for c in range(d):
                        total += grad[r, c] * (o_s[bh, start + r, c] - o_l[r, c])
                d_alpha[bh, i] = total
            _linear_backward(
                x, sums, bh, i, d, rows, weight, below, o_l, grad, turned, d_sum, d_phi
            )
            to_panels(d_sum, bh, i, d_sums)
            transpose(d_phi, acc)
            _softmax_backward(x, acc, rows, d)
        elif linear:
            d_sum[:] = 0
            to_panels(d_sum, bh, i, d_sums)
        for r in range(padded):
            if not mixed or r >= rows:
                for c in range(wide):
                    acc[r, c] = 0
        load_rows(q, bh, start, rows, one, x)
        load_rows(grad_out, bh, start, rows, weight, grad)
        copy(x, q_rows[bh, i])
        transpose(x, q_turned[bh, i])
        copy(grad, g_rows[bh, i])
        transpose(grad, g_turned[bh, i])
        for r in range(padded):
            mean, shift = zero, kind(np.inf)
            if r < rows:
                for c in range(d):
                    mean += grad[r, c] * o_s[bh, start + r, c]
                shift = lse[bh, start + r] * kind(LOG2_E)
                if lse[bh, start + r] == -np.inf:
                    shift = kind(np.inf)
            d_rows[bh, 0, i, r], d_rows[bh, 1, i, r] = shift, mean
        for s in range(counts[bh, i]):
            j = indices[bh, i, s]
            if tokens[bh, j] == 0:
                continue
            scores_of_block(x, d, kt, bh * t_n + j, tokens[bh, j], scores, 0)
            scores_of_block(grad, d, vt, bh * t_n + j, width, d_scores, 0)
            for r in range(padded):
                shift, mean = d_rows[bh, 0, i, r], d_rows[bh, 1, i, r]
                for c in range(width):
                    d_scores[r, c] = exp2(scores[r, c] - shift) * (d_scores[r, c] - mean) * scale
            gemm(
                d_scores,
                0,
                width,
                1,
                k_rows,
                (bh * t_n + j) * width * wide,
                wide,
                acc,
                0,
                wide,
                padded,
                wide,
                width,
                1,
            )
        if sizes.shape[1]:
            d_alpha[bh, i] = pooled_backward(
                x,
                grad,
                d,
                d_rows[bh, 0, i],
                d_rows[bh, 1, i],
                sizes,
                bh,
                i,
                pooled_kt,
                pooled_k,
                pooled_vt,
                pooled_scores,
                pooled_d_scores,
                acc,
                d_pooled_k,
                d_pooled_v,
                part,
                number % step == 0,
            )
        for r in range(rows):
            for c in range(d):
                d_q[bh, start + r, c] = acc[r, c]


@kernel
def d_key_blocks(
    k: Array,
    v: Array,
    queries: Array,
    query_counts: Array,
    tokens: Array,
    block: int,
    kt: Array,
    vt: Array,
    d_rows: Array,
    q_rows: Array,
    q_turned: Array,
    g_rows: Array,
    g_turned: Array,
    d_states: Array,
    d_means_k: Array,
    d_means_v: Array,
    d_k: Array,
    d_v: Array,
    lo: int,
    hi: int,
) -> None:
    """One head's key block per item: d_k, d_v (G, N_k, d). queries (G, T_n, Q), query_counts (G,
    T_n): the transposed map.

    d_states (G, padded T_n, (D + 1) D): the gradient of (h_j, z_j), or with 0 rows: no linear
    branch. d_means_k, d_means_v (G, padded T_n, D): those of the pooled keys and values, which
    their tokens share, or with 0 rows: no pooled keys.
    """
    t_n, t_m = tokens.shape[1], q_rows.shape[1]
    d = k.shape[2]
    wide, width, padded = kt.shape[2], kt.shape[3], q_rows.shape[2]
    kind = k.dtype.type
    scale = kind(1.0 / np.sqrt(d))
    scores, d_scores = np.empty((width, padded), k.dtype), np.empty((width, padded), k.dtype)
    keys, values, phi = (
        np.empty((width, wide), k.dtype),
        np.empty((width, wide), k.dtype),
        np.empty((width, wide), k.dtype),
    )
    state, turned = np.empty((wide, wide), k.dtype), np.empty((wide, wide), k.dtype)
    value_rows, d_phi = np.empty((width, wide), k.dtype), np.empty((width, wide), k.dtype)
    for item in range(lo, hi):
        bh, j = item // t_n, item % t_n
        count, start = tokens[bh, j], j * block
        place = (bh * t_n + j) * wide * width
        keys[:] = 0
        values[:] = 0
        for s in range(query_counts[bh, j] if count else 0):
            i = queries[bh, j, s]
            square = (bh * t_m + i) * padded * wide
            gemm(
                kt,
                place,
                1,
                width,
                q_turned,
                square,
                padded,
                scores,
                0,
                padded,
                width,
                padded,
                d,
                0,
            )
            gemm(
                vt,
                place,
                1,
                width,
                g_turned,
                square,
                padded,
                d_scores,
                0,
                padded,
                width,
                padded,
                d,
                0,
            )
            for r in range(width):
                for c in range(padded):
                    p = exp2(scores[r, c] - d_rows[bh, 0, i, c])
                    scores[r, c] = p
                    d_scores[r, c] = p * (d_scores[r, c] - d_rows[bh, 1, i, c]) * scale
            gemm(
                scores, 0, padded, 1, g_rows, square, wide, values, 0, wide, width, wide, padded, 1
            )
            gemm(
                d_scores, 0, padded, 1, q_rows, square, wide, keys, 0, wide, width, wide, padded, 1
            )
        if d_states.shape[1]:
            load_rows(k, bh, start, count, kind(1), phi)
            softmax_rows(phi, count, d)
            whole = (bh * d_states.shape[1] + j) * d_states.shape[2]
            gemm(phi, 0, wide, 1, d_states, whole, wide, values, 0, wide, width, wide, wide, 1)
            for r in range(wide):
                for c in range(wide):
                    state[r, c] = d_states[bh, j, r * wide + c]
            transpose(state, turned)
            load_rows(v, bh, start, count, kind(1), value_rows)
            gemm(value_rows, 0, wide, 1, turned, 0, wide, d_phi, 0, wide, width, wide, wide, 0)
            for r in range(count):
                for c in range(d):
                    d_phi[r, c] += d_states[bh, j, wide * wide + c]
            _softmax_backward(phi, d_phi, count, d)
            for r in range(count):
                for c in range(d):
                    keys[r, c] += d_phi[r, c]
        for r in range(count if d_means_k.shape[1] else 0):
            one_token = kind(1) / kind(count)
            for c in range(d):
                keys[r, c] += d_means_k[bh, j, c] * one_token
                values[r, c] += d_means_v[bh, j, c] * one_token
        for r in range(min(block, k.shape[1] - start)):
            for c in range(d):
                d_k[bh, start + r, c] = keys[r, c] if r < count else kind(0)
                d_v[bh, start + r, c] = values[r, c] if r < count else kind(0)
