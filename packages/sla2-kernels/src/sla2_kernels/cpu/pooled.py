"""The pooled complement: one key for each block that is not selected, its mean, as further tiles of
the same online softmax.
"""

from __future__ import annotations

import numpy as np

from sla2_kernels.cpu.build import Array, inner, kernel
from sla2_kernels.cpu.elementwise import LOG2_E, exp2, exponentials, row_maximum
from sla2_kernels.cpu.tiles import gemm


@kernel
def log_sizes(
    bias: Array, indices: Array, counts: Array, tokens: Array, sizes: Array, lo: int, hi: int
) -> None:
    """What is added to the logit of each pooled key, to base 2; one head per item.

    bias (G, T_m): b of each query block. sizes (G, T_m, T_n padded) <- log2(tokens) + b log2(e) for
    the valid key blocks that are not selected, -inf for the others.
    """
    t_m, t_n = counts.shape[1], tokens.shape[1]
    kind = bias.dtype.type
    for bh in range(lo, hi):
        for i in range(t_m):
            shift = bias[bh, i] * kind(LOG2_E)
            for j in range(sizes.shape[2]):
                sizes[bh, i, j] = -np.inf
                if j < t_n and tokens[bh, j] > 0:
                    sizes[bh, i, j] = np.log2(kind(tokens[bh, j])) + shift
            for s in range(counts[bh, i]):
                sizes[bh, i, indices[bh, i, s]] = -np.inf


@inner
def online_softmax(
    scores: Array, rows: int, count: int, top: Array, total: Array, acc: Array
) -> None:
    """scores[:rows, :count] <- exp2(scores - the new maximum of the row); top and total follow, and
    acc is rescaled to the new maximum.
    """
    zero, nothing = scores.dtype.type(0), scores.dtype.type(-np.inf)
    for r in range(rows):
        above = row_maximum(scores, r, count, top[r])
        shift = zero if above == nothing else above
        if above > top[r] and top[r] > nothing:
            factor = exp2(top[r] - above)
            total[r] *= factor
            for c in range(acc.shape[1]):
                acc[r, c] *= factor
        top[r] = above
        total[r] += exponentials(scores, r, count, shift)


@inner
def pooled_of_block(
    x: Array,
    rows: int,
    d: int,
    sizes: Array,
    bh: int,
    i: int,
    kt: Array,
    v_rows: Array,
    scores: Array,
    top: Array,
    total: Array,
    acc: Array,
) -> bool:
    """Go on with the online softmax of query block i over its pooled keys; whether it has any.

    x (R, D): Q. sizes of log_sizes. kt (G, P, D, W), scaled by log2(e) / sqrt(d), and v_rows (G, P,
    W, D): tiles of W pooled keys and values.
    """
    any_left = False
    for j in range(sizes.shape[2]):
        any_left = any_left or sizes[bh, i, j] != -np.inf
    if not any_left:
        return False
    count, wide, width = kt.shape[1], kt.shape[2], kt.shape[3]
    height, space = x.shape[0], scores.shape[1]
    group = space // width
    for first in range(0, count, group):
        last = min(first + group, count)
        used = (last - first) * width
        for p in range(first, last):
            place = (bh * count + p) * wide * width
            column = (p - first) * width
            gemm(x, 0, wide, 1, kt, place, width, scores, column, space, height, width, d, 0)
        for r in range(rows):
            for c in range(used):
                scores[r, c] += sizes[bh, i, first * width + c]
        online_softmax(scores, rows, used, top, total, acc)
        for p in range(first, last):
            place = (bh * count + p) * wide * width
            column = (p - first) * width
            gemm(
                scores, column, space, 1, v_rows, place, wide, acc, 0, wide, height, wide, width, 1
            )
    return True


@inner
def pooled_backward(
    x: Array,
    grad: Array,
    d: int,
    shifts: Array,
    means: Array,
    sizes: Array,
    bh: int,
    i: int,
    kt: Array,
    k_rows: Array,
    vt: Array,
    scores: Array,
    d_scores: Array,
    acc: Array,
    d_k: Array,
    d_v: Array,
    part: int,
    begins: bool,
) -> float:
    """acc += dQ of query block i from its pooled keys; d_k, d_v[bh, part] (<- if `begins`, else +=)
    those of the pooled keys and values; returns the gradient of b.

    x, grad (R, D): Q and dO. shifts, means (R,): L to base 2 and D. kt as of pooled_of_block,
    k_rows (G, P, W, D), vt (G, P, D, W). d_k, d_v (G, parts, P, W D). scores, d_scores (R, W).
    """
    count, wide, width = kt.shape[1], kt.shape[2], kt.shape[3]
    height, kind = x.shape[0], x.dtype.type
    scale = kind(1.0 / np.sqrt(d))
    d_bias: float = kind(0)
    again = 0 if begins else 1
    for p in range(count):
        square = (bh * count + p) * wide * width
        gemm(x, 0, wide, 1, kt, square, width, scores, 0, width, height, width, d, 0)
        gemm(grad, 0, wide, 1, vt, square, width, d_scores, 0, width, height, width, d, 0)
        for r in range(height):
            shift, mean = shifts[r], means[r]
            for c in range(width):
                share = exp2(scores[r, c] + (sizes[bh, i, p * width + c] - shift))
                d_score = share * (d_scores[r, c] - mean)
                d_bias += d_score
                scores[r, c] = share
                d_scores[r, c] = d_score * scale
        gemm(d_scores, 0, width, 1, k_rows, square, wide, acc, 0, wide, height, wide, width, 1)
        own = ((bh * d_k.shape[1] + part) * count + p) * wide * width
        gemm(d_scores, 0, 1, width, x, 0, wide, d_k, own, wide, width, wide, height, again)
        gemm(scores, 0, 1, width, grad, 0, wide, d_v, own, wide, width, wide, height, again)
    return d_bias
