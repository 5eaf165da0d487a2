"""The whole operator on raw pointers, forward: pool -> route -> keys -> linear sums -> sparse
forward, on GPU or emulator.

Nothing here reads device memory, so nothing waits for the device: every launch goes to the caller's
stream. Memory comes from the caller's allocator. Q, K, V and O are `Strided`, all other tensors
C-contiguous; 16-bit ones are bfloat16 or float16 as `Problem.dtype` says.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sla2_kernels import hopper
from sla2_kernels.launch import Argument, Pointer, run_kernel
from sla2_kernels.problem import (
    NOTHING,
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


class Prepared(NamedTuple):
    """What is derived from Q, K and V once and read by the later steps (Alg. 2).

    `width` is 64 or 128, the channels of a row as the kernels see it. NULL: not made.

    Attributes:
        q, k, v: 16 bit (B, H, N, width).
        mean: of K over its valid tokens, fp32 (B H, width), where `k` is to be smoothed by it.
        pooled_q, pooled_k: block means, fp32 (B H, T_m, width) and (B H, T_n, width); of the
            smoothed K, if it is smoothed.
        q_bytes, k_bytes: 8-bit copies (B H, N, width), for a low-bit precision.
        v_bytes: 8-bit copy of V, transposed in each block: (B H, T_n, width, block_k).
        q_scale, k_scale, v_scale: what the copies are divided by, fp32 (B H, T_m), (B H, T_n) and
            (B H, width).
        k_tiles, v_tiles: K less `mean` and V, in low bit their 8-bit copies, as sm90/pack.cu and
            sm90/pack_low.cu lay them out, (B H, T_n, block_k, width).
        states: of the linear branch, 16 bit (B H, T_n, width (width + 1)): phi(K_j)^T V_j / block_k
            row by row, and behind it the column sums of phi(K_j) / block_k.
    """

    q: Strided
    k: Strided
    v: Strided
    mean: Pointer = NULL
    pooled_q: Pointer = NULL
    pooled_k: Pointer = NULL
    q_bytes: Pointer = NULL
    k_bytes: Pointer = NULL
    v_bytes: Pointer = NULL
    q_scale: Pointer = NULL
    k_scale: Pointer = NULL
    v_scale: Pointer = NULL
    k_tiles: Pointer = NULL
    v_tiles: Pointer = NULL
    states: Pointer = NULL


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


class Routed(NamedTuple):
    """What route() returns.

    Attributes:
        block_map: with its bits, if alpha was made.
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
        lse: the natural log-sum-exp L of the selected scores, fp32 (B, H, n_q); -inf where a row
            selects nothing.
        out_sparse: O_s (B, H, n_q, width), 16 bit; without a linear branch it is O. NULL without
            `save`.
        made, block_map, alpha, linear, smooth_k: for backward().
    """

    out: Strided
    lse: Pointer
    made: Prepared
    block_map: Map
    alpha: Alpha
    linear: Linear | None
    out_sparse: Strided
    smooth_k: bool


def copy_columns(
    device: Device,
    problem: Problem,
    source: Strided,
    tokens: int,
    columns: int,
    target_columns: int,
) -> Pointer:
    """The first `columns` channels of every token, cut or padded with zeros to `target_columns`.

    `source` is 16 bit (B, H, tokens, columns) in any layout with adjacent channels; the result is
    contiguous, (B H, tokens, target_columns).
    """
    target = device.allocate((problem.pairs, tokens, target_columns), problem.dtype)
    grid = min(65535, -(-tokens * target_columns // 256)), problem.pairs
    sizes = map(np.int32, (problem.heads, tokens, columns, target_columns))
    run_kernel(device, problem, "sla2_copy_columns", grid, *source.arguments, target, *sizes)
    return target


def widened(device: Device, problem: Problem, x: Strided, tokens: int) -> Strided:
    """x (B, H, tokens, head_dim) as the kernels read it: itself, or a padded contiguous copy."""
    p = problem
    if p.head_dim == p.width and x.fits:
        return x
    return Strided.of(
        copy_columns(device, p, x, tokens, p.head_dim, p.width), p.heads, tokens, p.width
    )


def contiguous(device: Device, problem: Problem, x: Strided, tokens: int) -> Pointer:
    """x (B, H, tokens, width) as contiguous rows: its own memory, or a copy."""
    p = problem
    whole = Strided.of(x.pointer, p.heads, tokens, p.width).strides
    if x.fits and all(
        n == 1 or a == b for n, a, b in zip((p.batch, p.heads, tokens), x.strides, whole)
    ):
        return x.pointer
    return copy_columns(device, p, x, tokens, p.width, p.width)


def pool(
    device: Device,
    problem: Problem,
    q: Strided,
    k: Strided,
    v: Strided,
    *,
    smooth_k: bool = True,
    pooled: bool = False,
) -> Prepared:
    """The first pass over Q and K, which routing and attention share; in low bit over V too.

    Args:
        q: 16 bit (B, H, n_q, d). k, v: 16 bit (B, H, n_k, d).
        smooth_k: make K's mean over its valid tokens, and take it from pooled_k.
        pooled: make pooled_q and pooled_k.

    A low-bit precision has also q_bytes, q_scale and v_scale made.
    """
    p, new = problem, device.allocate
    q = widened(device, p, q, p.n_q)
    k, v = (widened(device, p, x, p.n_k) for x in (k, v))
    made = Prepared(q=q, k=k, v=v)
    over_keys, over_queries = smooth_k or pooled or p.low, pooled or p.low
    if not over_keys:
        return made
    per_block = (p.pairs, p.t_n, p.width)
    means, tops = new(per_block, "float32"), new(per_block, "float32") if p.low else NULL
    if pooled:
        made = made._replace(pooled_q=new((p.pairs, p.t_m, p.width), "float32"), pooled_k=means)
    if p.low:
        made = made._replace(
            q_bytes=new((p.pairs, p.n_q, p.width), "uint8"),
            q_scale=new((p.pairs, p.t_m), "float32"),
            v_scale=new((p.pairs, p.width), "float32"),
        )
    run_kernel(
        device,
        p,
        "sla2_pool",
        (p.t_n + (p.t_m if over_queries else 0), p.pairs),
        *(q if over_queries else NOTHING).arguments,
        *k.arguments,
        *(v if p.low else NOTHING).arguments,
        p.kv_lengths,
        made.pooled_q,
        means,
        made.q_bytes,
        made.q_scale,
        tops,
        *map(np.int32, (p.heads, p.n_q, p.n_k, p.t_n)),
    )
    if not (smooth_k or p.low):
        return made
    mean = new((p.pairs, p.width), "float32")
    sizes = map(np.int32, (p.heads, p.n_k, p.t_n, True, smooth_k and pooled))
    args = means, tops, p.kv_lengths, mean, made.v_scale
    run_kernel(device, p, "sla2_key_mean", (p.pairs,), *args, *sizes)
    return made._replace(mean=mean) if smooth_k else made


def keys(
    device: Device,
    problem: Problem,
    made: Prepared,
    *,
    linear: bool = True,
    save: bool = False,
    tiles: bool = False,
) -> Prepared:
    """The second pass over K, and the one over V: what attention needs of them (Alg. 2).

    Args:
        made: what pool() made.
        linear: make the states of the linear branch.
        save: write the smoothed K, which backward() reads. `k` then is that, and `mean` NULL.

        tiles: make k_tiles and v_tiles, for blocks of 128 and 64.

    A low-bit precision has also k_scale and, without `tiles`, k_bytes and v_bytes made.
    """
    p, new = problem, device.allocate
    smooth = new((p.pairs, p.n_k, p.width), p.dtype) if save and made.mean.address else NULL
    states = new((p.pairs, p.t_n, p.width * (p.width + 1)), p.dtype) if linear else NULL
    k, mean = made.k, made.mean
    if p.low:
        made = made._replace(k_scale=new((p.pairs, p.t_n), "float32"))
    if tiles:
        shape = (p.pairs, p.t_n, p.block_k, p.width)
        k_tiles, v_tiles = (new(shape, "uint8" if p.low else p.dtype) for _ in range(2))
        made = made._replace(k_tiles=k_tiles, v_tiles=v_tiles)
    elif p.low:
        made = made._replace(
            k_bytes=new((p.pairs, p.n_k, p.width), "uint8"),
            v_bytes=new((p.pairs, p.t_n, p.width, p.block_k), "uint8"),
        )
    if smooth.address:
        made = made._replace(k=Strided.of(smooth, p.heads, p.n_k, p.width), mean=NULL)
    if not (smooth.address or linear or p.low or tiles):
        return made
    run_kernel(
        device,
        p,
        "sla2_keys",
        (p.t_n, p.pairs),
        *k.arguments,
        *(made.v if linear or p.low or tiles else NOTHING).arguments,
        mean,
        made.v_scale,
        p.kv_lengths,
        smooth,
        states,
        made.k_bytes,
        made.k_scale,
        made.v_bytes,
        made.k_tiles,
        made.v_tiles,
        *map(np.int32, (p.heads, p.n_k, p.head_dim)),
    )
    return made._replace(states=states)


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
    if alpha:
        bits = new((p.pairs, p.t_m, -(-p.t_n // 32)), "uint32")
        found = found._replace(bits=bits, rest_inverse=new((p.pairs, p.t_m), "float32"))
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


def linear_sums(device: Device, problem: Problem, states: Pointer, block_map: Map) -> Linear:
    """H and Z of every row block: means over the valid key blocks that it does not select.

    `states` are those of keys(). O_l = phi(Q) H / (phi(Q) . Z) is a quotient: means do what sums
    do.
    """
    p = problem
    bits, rest_inverse = row_bits(device, p, block_map)
    state, norm = masked_sum(device, p, bits, states, rest_inverse, p.t_m, p.t_n)
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
        made: k, v and mean, or the 8-bit copies and scales of q, k and v; q if 16 bit or `linear`.
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
    inputs: tuple[Argument, ...]
    mixed: tuple[Argument, ...]
    if p.low:
        name = "sla2_sparse_fwd_low"
        inputs = made.q_bytes, made.k_bytes, made.v_bytes, made.q_scale, made.k_scale, made.v_scale
        q = made.q if linear else NOTHING
    else:
        name = "sla2_sparse_fwd"
        inputs = (*made.q.arguments, *made.k.arguments, *made.v.arguments, made.mean)
    mixed = (linear.state, linear.norm) if linear else (NULL, NULL)
    mixed = (*q.arguments, *mixed) if p.low else mixed
    run_kernel(
        device,
        p,
        name,
        (p.t_m, p.pairs),
        *inputs,
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
    p, low, q = problem, None, made.q
    if p.low:
        low = hopper.LowBit(made.q_bytes, made.q_scale, made.k_scale, made.v_scale)
        q = q if linear else NOTHING
    if made.k_tiles.address:
        tiles = made.k_tiles, made.v_tiles
    elif p.low:
        tiles = hopper.pack_low(device, p, made.k_bytes, made.v_bytes)
    else:
        tiles = hopper.pack(device, p, made.k, made.v, made.mean)
    state, norm = (linear.state, linear.norm) if linear else (NULL, NULL)
    inputs = q, *tiles, block_map, state, norm, alpha
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
) -> Forward:
    """O = alpha O_s + (1 - alpha) O_l (Eq. 13-16).

    Where K is smoothed without `save` in 16 bit, the sparse branch takes it as it is: its softmax
    does not see the mean.

    Args:
        q: 16 bit (B, H, n_q, d). k, v: 16 bit (B, H, n_k, d).
        block_map: on the same device. Indices ascend; values are not checked.
        alpha: fp32, or None for the sparse branch alone.
        smooth_k: subtract the mean over tokens from K first; as in pool(), where it made `made`.
        save: keep what backward() needs.
        made: what pool() made, if route() needed it before.
        out: where to write O, if d is 64 or 128 and it `fits`; None: new contiguous memory.

    Raises:
        ValueError: the device's architecture cannot run the problem's precision.
        RuntimeError: what is needed to compile or run a kernel is missing, or one does not compile.
    """
    p = problem
    made = made or pool(device, p, q, k, v, smooth_k=smooth_k)
    tiles = hopper.takes(device, p) and not (save and p.low)  # a matched backward reads rows
    made = keys(device, p, made, linear=alpha is not None, save=save, tiles=tiles)
    linear = None if alpha is None else linear_sums(device, p, made.states, block_map)
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
    alpha: AlphaRule,
    *,
    smooth_k: bool = True,
    out: Strided | None = None,
) -> Forward:
    """route() and forward() after one first pass over Q and K, for a call without gradients.

    Arguments, results and errors are theirs.
    """
    p = problem
    made = pool(device, p, q, k, v, smooth_k=smooth_k, pooled=True)
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
        alpha=alpha,
    )
    block_map, ratio = found.block_map, found.alpha
    return forward(device, p, q, k, v, block_map, ratio, smooth_k=smooth_k, made=made, out=out)
