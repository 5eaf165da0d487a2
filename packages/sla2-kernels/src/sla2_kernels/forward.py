"""The whole operator on raw pointers, forward: pool -> route -> keys -> linear sums -> sparse
forward, on GPU or emulator. With the pooled complement: pool -> route -> pooled forward, in low bit
with keys before it.

Nothing here reads device memory, so nothing waits for the device: every launch goes to the caller's
stream. Memory comes from the caller's allocator. Q, K, V and O are `Strided`, all other tensors
C-contiguous; 16-bit ones are bfloat16 or float16 as `Problem.dtype` says.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sla2_kernels import hopper
from sla2_kernels.launch import Argument, Pointer, run_kernel
from sla2_kernels.prepare import Prepared, copy_columns, keys, pool
from sla2_kernels.problem import (
    NULL,
    ONE,
    Alpha,
    AlphaRule,
    Device,
    Map,
    Problem,
    Strided,
)

SCORE_BYTES = 256 << 20  # of the router's scores, held at a time where nobody wants them


class Linear(NamedTuple):
    """What the linear branch knows of every row block.

    Attributes:
        bits: the block map, uint32 (B H, T_m, ceil(T_n / 32)); of 32 key blocks, block 2 i is bit i
            and block 2 i + 1 bit 16 + i.
        rest_inverse: 1 / number of valid key blocks that are not selected, 0 if none is left; fp32
            (B H, T_m).
        state: H, the mean of phi(K_j)^T V_j / block_k over those blocks, 16 bit
            (B H, T_m, width, width).
        norm: Z, the same mean of the column sums of phi(K_j), fp32 (B H, T_m, width).
    """

    bits: Pointer
    rest_inverse: Pointer
    state: Pointer
    norm: Pointer


class Pooled(NamedTuple):
    """The keys of the pooled complement, one for each key block.

    Attributes:
        k, v: the means of K (less its mean over tokens where K is smoothed) and of V over the
            block's valid tokens, 16 bit (B H, T_n, width); zeros where it has none. On Hopper,
            whose forward reads them in tiles, k is NULL if nothing is saved for backward().
        bits: the block map, as `Linear` has it: a set bit masks the pooled key.
        bias: b, fp32, in an `Alpha`.
    """

    k: Pointer
    v: Pointer
    bits: Pointer
    bias: Alpha


class Routed(NamedTuple):
    """What route() returns.

    Attributes:
        block_map: with its bits, if those or alpha were made.
        alpha: fp32 (B, H, T_m); ONE where it was not made.
        scores: fp32 (B, H, T_m, T_n), -inf for blocks without a valid token; NULL if not kept.
    """

    block_map: Map
    alpha: Alpha
    scores: Pointer


class Forward(NamedTuple):
    """What forward() returns.

    Attributes:
        out: O (B, H, n_q, d), 16 bit.
        lse: the natural log-sum-exp L of the selected scores, and of the pooled keys' logits
            where those join, fp32 (B, H, n_q); -inf where a row has neither.
        out_sparse: O_s (B, H, n_q, width), 16 bit; without a linear branch it is O. NULL without
            `save`.
        made, block_map, alpha, linear, smooth_k, pooled: for backward().
    """

    out: Strided
    lse: Pointer
    made: Prepared
    block_map: Map
    alpha: Alpha
    linear: Linear | None
    out_sparse: Strided
    smooth_k: bool
    pooled: Pooled | None = None


def route(
    device: Device,
    problem: Problem,
    pooled_q: Pointer,
    pooled_k: Pointer,
    weight_q: Pointer,
    weight_k: Pointer,
    weight_heads: int,
    topk: float,
    routable: int | None = None,
    *,
    keep_scores: bool = True,
    alpha: AlphaRule | None = None,
    bits: bool = False,
) -> Routed:
    """The block map of every row by the router's scores (Eq. 16), and alpha.

    A row selects the K = max(1, round(topk * n)) best of the n key blocks that it may choose from,
    which are those of the first `routable` that hold a valid token, and every block from `routable`
    on that holds one. Ties go to the lower index.

    Args:
        pooled_q, pooled_k: block means, fp32 (B H, T_m, width) and (B H, T_n, width).
        weight_q, weight_k: projections, fp32 (weight_heads, d, d). Both NULL: the identity, which
            takes no launch.
        weight_heads: 1 or H.
        topk: k% in (0, 1].
        routable: how many key blocks compete, 0 to T_n; where the last tokens are text, those
            without any text. None: all T_n.
        keep_scores: return the scores. Else they are held SCORE_BYTES at a time, by query blocks.
        alpha: how alpha is made; the map then has its bits. None: not made.
        bits: make the map's bits also without alpha.

    Raises:
        ValueError: for `routable` outside [0, T_n].
    """
    p, new = problem, device.allocate
    routable = p.t_n if routable is None else routable
    if not 0 <= routable <= p.t_n:
        raise ValueError(f"routable: expected 0 to {p.t_n} key blocks, got {routable}")
    if weight_q.address:
        means = pooled_q, pooled_k
        pooled_q, pooled_k = (new((p.pairs, t, p.width), "float32") for t in (p.t_m, p.t_n))
        run_kernel(
            device,
            p,
            "sla2_project",
            (-(-p.t_m // 16) + -(-p.t_n // 16), p.pairs),
            *means,
            weight_q,
            weight_k,
            pooled_q,
            pooled_k,
            *map(np.int32, (p.heads, weight_heads, p.t_m, p.t_n, p.head_dim)),
        )
    chosen = max(1, round(topk * routable)) if routable else 0
    width, per_row = chosen + p.t_n - routable, (p.batch, p.heads, p.t_m)
    found = Map(new((*per_row, width), "int32"), new(per_row, "int32"), width)
    ratio = ONE
    if alpha or bits:
        found = found._replace(
            bits=new((p.pairs, p.t_m, -(-p.t_n // 32)), "uint32"),
            rest_inverse=new((p.pairs, p.t_m), "float32"),
        )
    if alpha:
        ratio = Alpha.of(new(per_row, "float32"), per_row)
    rule = alpha or AlphaRule()
    rows = p.t_m
    if not keep_scores:
        rows = min(rows, max(1, SCORE_BYTES // (4 * 32 * p.pairs * p.t_n)) * 32)
    scores = new((p.batch, p.heads, rows, p.t_n), "float32")
    for first in range(0, p.t_m, rows):
        part = min(rows, p.t_m - first)
        sizes = tuple(map(np.int32, (p.heads, p.t_m, p.t_n, p.n_k, first, part)))
        run_kernel(
            device,
            p,
            "sla2_scores",
            (-(-p.t_n // 32), -(-part // 32), p.pairs),
            pooled_q,
            pooled_k,
            p.kv_lengths,
            scores,
            *sizes,
            p.softmax_scale,
        )
        run_kernel(
            device,
            p,
            "sla2_topk",
            (-(-part // 4), p.pairs),
            scores,
            p.kv_lengths,
            rule.offset,
            rule.slope,
            found.indices,
            found.counts,
            found.bits,
            found.rest_inverse,
            ratio.values,
            *sizes,
            *map(np.int32, (routable, width, rule.heads, rule.knots)),
            np.float64(topk),
        )
    return Routed(found, ratio, scores if keep_scores else NULL)


def linear_sums(device: Device, problem: Problem, made: Prepared, block_map: Map) -> Linear:
    """H and Z of every row block: means over the valid key blocks that it does not select.

    `made` has the states of keys(). O_l = phi(Q) H / (phi(Q) . Z) is a quotient: means do what sums
    do.
    """
    p = problem
    bits, rest_inverse = row_bits(device, p, block_map)
    if made.state_weights.address:
        state, norm = _masked_sum_low(device, p, bits, made, rest_inverse)
    else:
        state, norm = masked_sum(device, p, bits, made.states, rest_inverse, p.t_m, p.t_n)
    return Linear(bits=bits, rest_inverse=rest_inverse, state=state, norm=norm)


def row_bits(device: Device, problem: Problem, block_map: Map) -> tuple[Pointer, Pointer]:
    """`bits` and `rest_inverse` of a map, as `Linear` has them; made here if it has none."""
    if block_map.bits.address:
        return block_map.bits, block_map.rest_inverse
    p = problem
    bits = device.allocate((p.pairs, p.t_m, -(-p.t_n // 32)), "uint32")
    rest_inverse = device.allocate((p.pairs, p.t_m), "float32")
    run_kernel(
        device,
        p,
        "sla2_row_bits",
        (-(-p.t_m // 4), p.pairs),
        block_map.indices,
        block_map.counts,
        p.kv_lengths,
        bits,
        rest_inverse,
        *map(np.int32, (p.heads, p.t_m, p.t_n, p.n_k, block_map.width)),
    )
    return bits, rest_inverse


def masked_sum(
    device: Device,
    problem: Problem,
    bits: Pointer,
    x: Pointer,
    row_scale: Pointer,
    rows: int,
    depth: int,
) -> tuple[Pointer, Pointer]:
    """row_scale (1 - M) x: for every row the sum of the x whose bit in the row is clear.

    Args:
        bits: M, uint32 (B H, rows, ceil(depth / 32)).
        x: 16 bit (B H, depth, width (width + 1)): matrices, row by row, and a vector behind each.
        row_scale: fp32 (B H, rows), or NULL for 1.

    Returns:
        The matrices, 16 bit (B H, rows, width, width), and the vectors, fp32 (B H, rows, width).
    """
    p = problem
    matrix = device.allocate((p.pairs, rows, p.width, p.width), p.dtype)
    vector = device.allocate((p.pairs, rows, p.width), "float32")
    if hopper.takes(device, p):
        hopper.masked_sum(device, p, bits, x, row_scale, matrix, vector, rows, depth)
        return matrix, vector
    run_kernel(
        device,
        p,
        "sla2_masked_sum",
        (-(-p.width * (p.width + 1) // 128), -(-rows // 128), p.pairs),
        bits,
        x,
        row_scale,
        matrix,
        vector,
        np.int32(rows),
        np.int32(depth),
    )
    return matrix, vector


def _masked_sum_low(
    device: Device, problem: Problem, bits: Pointer, made: Prepared, rest_inverse: Pointer
) -> tuple[Pointer, Pointer]:
    """masked_sum() of states in 8 bit."""
    p = problem
    matrix = device.allocate((p.pairs, p.t_m, p.width, p.width), p.dtype)
    vector = device.allocate((p.pairs, p.t_m, p.width), "float32")
    args = bits, made.states, made.state_weights, made.v_scale, rest_inverse, matrix, vector
    if hopper.takes(device, p):
        hopper.masked_sum_low(device, p, *args)
        return matrix, vector
    grid = (p.width * (p.width + 2) // 128, -(-p.t_m // 128), p.pairs)
    sizes = np.int32(p.t_m), np.int32(p.t_n)
    run_kernel(device, p, "sla2_masked_sum_low", grid, *args, *sizes)
    return matrix, vector


def sparse_forward(
    device: Device,
    problem: Problem,
    made: Prepared,
    block_map: Map,
    linear: Linear | None,
    alpha: Alpha,
    save: bool,
    out: Strided | None = None,
) -> tuple[Strided, Pointer, Strided]:
    """Softmax over the selected blocks, the linear branch and their mixture, in one kernel.

    Args:
        made: q; k, v and mean, or the 8-bit copies of k and v and all scales.
        alpha: of every row block; read only with `linear`.
        save: keep O_s where a linear branch is mixed in.
        out: where to write O, 16 bit (B, H, n_q, width); None: new contiguous memory.

    Returns:
        O, L (natural, fp32 (B, H, n_q)), and O_s, which is O without `linear`, and NULL with it if
        `save` is off.
    """
    p, new = problem, device.allocate
    rows = (p.pairs, p.n_q, p.width)
    out = out or Strided.of(new(rows, p.dtype), p.heads, p.n_q, p.width)
    lse = new((p.batch, p.heads, p.n_q), "float32")
    out_sparse = new(rows, p.dtype) if save and linear else NULL
    kept = Strided.of(out_sparse, p.heads, p.n_q, p.width) if linear else out
    if hopper.takes(device, p):
        _sparse_by_wgmma(device, p, made, block_map, linear, alpha, out, out_sparse, lse)
        return out, lse, kept
    mixed = (linear.state, linear.norm) if linear else (NULL, NULL)
    run_kernel(
        device,
        p,
        "sla2_sparse_fwd_low" if p.low else "sla2_sparse_fwd",
        (p.t_m, p.pairs),
        *_selected(p, made),
        block_map.indices,
        block_map.counts,
        np.int32(block_map.width),
        p.kv_lengths,
        *mixed,
        alpha.values,
        *map(np.int32, alpha.strides),
        *out.arguments,
        out_sparse,
        lse,
        np.int32(p.heads),
        np.int32(p.n_q),
        np.int32(p.n_k),
        np.int32(p.head_dim),
        p.softmax_scale,
    )
    return out, lse, kept


def _selected(problem: Problem, made: Prepared) -> tuple[Argument, ...]:
    """Q, K and V as the forward kernels by `mma.sync` list them."""
    if problem.low:
        low = made.k_bytes, made.v_bytes, made.q_scale, made.k_scale, made.v_scale
        return (*made.q.arguments, *low)
    return (*made.q.arguments, *made.k.arguments, *made.v.arguments, made.mean)


def pooled_forward(
    device: Device,
    problem: Problem,
    made: Prepared,
    block_map: Map,
    pooled: Pooled,
    out: Strided | None = None,
) -> tuple[Strided, Pointer]:
    """One softmax over the selected blocks and the pooled keys of the others, in one kernel.

    Args:
        made: as of sparse_forward(); on Hopper with the tiles of K, V and their means.
        pooled: its k is of the smoothed K where `made` has a mean or 8-bit copies of such a K.
        out: as of sparse_forward().

    Returns:
        O and L (natural, fp32 (B, H, n_q)).
    """
    p, new = problem, device.allocate
    rows = (p.pairs, p.n_q, p.width)
    out = out or Strided.of(new(rows, p.dtype), p.heads, p.n_q, p.width)
    lse = new((p.batch, p.heads, p.n_q), "float32")
    if hopper.takes(device, p):
        low = hopper.LowBit(made.q_scale, made.k_scale, made.v_scale) if p.low else None
        tiles = made.k_tiles, made.v_tiles, made.mean, block_map
        means = made.key_mean_tiles, made.value_mean_tiles, pooled.bits, pooled.bias
        hopper.pooled_forward(device, p, made.q, *tiles, *means, out, lse, low=low)
        return out, lse
    run_kernel(
        device,
        p,
        "sla2_pooled_fwd_low" if p.low else "sla2_pooled_fwd",
        (p.t_m, p.pairs),
        *_selected(p, made),
        block_map.indices,
        block_map.counts,
        np.int32(block_map.width),
        p.kv_lengths,
        pooled.k,
        pooled.v,
        pooled.bits,
        pooled.bias.values,
        *map(np.int32, pooled.bias.strides),
        *out.arguments,
        lse,
        *map(np.int32, (p.heads, p.n_q, p.n_k)),
        p.softmax_scale,
    )
    return out, lse


def _sparse_by_wgmma(
    device: Device,
    problem: Problem,
    made: Prepared,
    block_map: Map,
    linear: Linear | None,
    alpha: Alpha,
    out: Strided,
    out_sparse: Pointer,
    lse: Pointer,
) -> None:
    p, low = problem, None
    if p.low:
        low = hopper.LowBit(made.q_scale, made.k_scale, made.v_scale)
    if made.k_tiles.address:
        tiles = made.k_tiles, made.v_tiles
    elif p.low:
        tiles = hopper.pack_low(device, p, made.k_bytes, made.v_bytes)
    else:
        tiles = hopper.pack(device, p, made.k, made.v, made.mean)
    state, norm = (linear.state, linear.norm) if linear else (NULL, NULL)
    inputs = made.q, *tiles, block_map, state, norm, alpha
    hopper.sparse_forward(device, p, *inputs, out, out_sparse, lse, low=low)


def forward(
    device: Device,
    problem: Problem,
    q: Strided,
    k: Strided,
    v: Strided,
    block_map: Map,
    alpha: Alpha | None,
    *,
    smooth_k: bool = True,
    save: bool = False,
    made: Prepared | None = None,
    out: Strided | None = None,
    complement: str = "linear",
) -> Forward:
    """O = alpha O_s + (1 - alpha) O_l (Eq. 13-16), or the softmax over the selected tokens and one
    pooled key for each of the other blocks.

    Where K is smoothed without `save` in 16 bit, the sparse branch takes it as it is: its softmax
    does not see the mean.

    Args:
        q: 16 bit (B, H, n_q, d). k, v: 16 bit (B, H, n_k, d).
        block_map: on the same device. Indices ascend; values are not checked.
        alpha: fp32, or None for the sparse branch alone. With complement="pooled" it is b, what is
            added to the logits of the pooled keys.
        smooth_k: subtract the mean over tokens from K first; as in pool(), where it made `made`.
        save: keep what backward() needs.
        made: what pool() made, if route() needed it before; for the pooled complement with `means`,
            and with the same `save`.
        complement: "linear" or "pooled", what joins the sparse branch.
        out: where to write O, if d is 64 or 128 and it `fits`; None: new contiguous memory.

    Raises:
        ValueError: the device's architecture cannot run the problem's precision.
        RuntimeError: what is needed to compile or run a kernel is missing, or one does not compile.
    """
    p, linear, pooled = problem, None, None
    joins = alpha is not None and complement == "pooled"
    on_hopper = hopper.takes(device, p)
    if not made:
        made = pool(device, p, q, k, v, smooth_k=smooth_k, means=joins, tiles=on_hopper, save=save)
    # A matched backward reads rows; there is none with pooled keys.
    rows = save and p.low and not joins
    tiles = on_hopper and not rows and not made.k_tiles.address
    made = keys(device, p, made, linear=not joins and alpha is not None, save=save, tiles=tiles)
    if alpha and joins:
        bits = row_bits(device, p, block_map)[0]
        pooled = Pooled(k=made.key_means, v=made.value_means, bits=bits, bias=alpha)
        alpha = ONE
        out, lse = pooled_forward(device, p, made, block_map, pooled, out)
        out_sparse = out
    else:
        if alpha:
            linear = linear_sums(device, p, made, block_map)
        alpha = alpha or ONE
        out, lse, out_sparse = sparse_forward(device, p, made, block_map, linear, alpha, save, out)
    if p.head_dim != p.width:
        out = Strided.of(
            copy_columns(device, p, out, p.n_q, p.width, p.head_dim), p.heads, p.n_q, p.head_dim
        )
    return Forward(
        out=out,
        lse=lse,
        made=made,
        block_map=block_map,
        alpha=alpha,
        linear=linear,
        out_sparse=out_sparse,
        smooth_k=smooth_k,
        pooled=pooled,
    )


def routed_forward(
    device: Device,
    problem: Problem,
    q: Strided,
    k: Strided,
    v: Strided,
    weight_q: Pointer,
    weight_k: Pointer,
    weight_heads: int,
    topk: float,
    routable: int | None,
    alpha: AlphaRule | Alpha,
    *,
    smooth_k: bool = True,
    out: Strided | None = None,
) -> Forward:
    """route() and forward() after one first pass over Q and K, for a call without gradients.

    Arguments, results and errors are theirs, but for `alpha`: an AlphaRule for the linear
    complement, b for the pooled one.
    """
    p, joins = problem, isinstance(alpha, Alpha)
    tiles = hopper.takes(device, p)
    made = pool(device, p, q, k, v, smooth_k=smooth_k, pooled=True, means=joins, tiles=tiles)
    found = route(
        device,
        p,
        made.pooled_q,
        made.pooled_k,
        weight_q,
        weight_k,
        weight_heads,
        topk,
        routable,
        keep_scores=False,
        alpha=None if isinstance(alpha, Alpha) else alpha,
        bits=joins,
    )
    return forward(
        device,
        p,
        q,
        k,
        v,
        found.block_map,
        alpha if isinstance(alpha, Alpha) else found.alpha,
        smooth_k=smooth_k,
        made=made,
        out=out,
        complement="pooled" if joins else "linear",
    )
