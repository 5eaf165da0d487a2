"""The whole operator on raw pointers, forward: prologue -> route -> linear states -> sparse
forward, on GPU or emulator.

Nothing here reads device memory, so nothing waits for the device: every launch goes to the caller's
stream. Memory comes from the caller's allocator. Q, K, V and O are `Strided`, all other tensors
C-contiguous; 16-bit ones are bfloat16 or float16 as `Problem.dtype` says.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sla2_kernels import hopper
from sla2_kernels.launch import Argument, Pointer, run_kernel
from sla2_kernels.problem import NULL, ONE, Alpha, Device, Map, Problem, Strided


@dataclass(frozen=True, kw_only=True)
class Prologue:
    """What is derived from Q, K and V once and read by the later steps (Alg. 2).

    `width` is 64 or 128, the channels of a row as the kernels see it. NULL: not made.

    Attributes:
        q, k, v: 16 bit (B, H, N, width), K minus its mean over tokens if it was smoothed.
        phi_k: softmax over the channels of k, 16 bit (B H, N, width).
        pooled_q, pooled_k: block means, fp32 (B H, T_m, width) and (B H, T_n, width).
        q_bytes, k_bytes: 8-bit copies (B H, N, width), for a low-bit precision.
        v_bytes: 8-bit copy of V, transposed in each block: (B H, T_n, width, block_k).
        q_scale, k_scale, v_scale: what the copies are divided by, fp32 (B H, T_m), (B H, T_n) and
            (B H, width).
    """

    q: Strided
    k: Strided
    v: Strided
    phi_k: Pointer = NULL
    pooled_q: Pointer = NULL
    pooled_k: Pointer = NULL
    q_bytes: Pointer = NULL
    k_bytes: Pointer = NULL
    v_bytes: Pointer = NULL
    q_scale: Pointer = NULL
    k_scale: Pointer = NULL
    v_scale: Pointer = NULL


@dataclass(frozen=True, kw_only=True)
class Linear:
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


@dataclass(frozen=True, kw_only=True)
class Forward:
    """What forward() returns.

    Attributes:
        out: O (B, H, n_q, d), 16 bit.
        lse: the natural log-sum-exp L of the selected scores, fp32 (B, H, n_q); -inf where a row
            selects nothing.
        out_sparse: O_s (B, H, n_q, width), 16 bit; without a linear branch it is O. NULL without
            `save`.
        prologue, block_map, alpha, linear, smooth_k: for backward().
    """

    out: Strided
    lse: Pointer
    prologue: Prologue
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


def prologue(
    device: Device,
    problem: Problem,
    q: Strided,
    k: Strided,
    v: Strided,
    *,
    smooth_k: bool = True,
    linear: bool = True,
    pool: bool = False,
    keep_k: bool = True,
) -> Prologue:
    """Make what the later steps need of Q, K and V, and no more (Alg. 2).

    Args:
        q: 16 bit (B, H, n_q, d). k, v: 16 bit (B, H, n_k, d).
        smooth_k: subtract K's mean over its valid tokens.
        linear: make phi_k.
        pool: make pooled_q and pooled_k.
        keep_k: also write the smoothed K in low bit, where backward() alone reads it; else the
            result's k is NULL.

    8-bit copies and their scales are made if the problem's precision is a low-bit one.
    """
    p, new, dtype = problem, device.allocate, problem.dtype
    q = widened(device, p, q, p.n_q)
    k, v = (widened(device, p, x, p.n_k) for x in (k, v))
    made: dict[str, Pointer] = {}
    mean = smooth = NULL
    heads, n_q, n_k, t_n = map(np.int32, (p.heads, p.n_q, p.n_k, p.t_n))
    rows_q, rows_k, per_key = (p.pairs, p.n_q, p.width), (p.pairs, p.n_k, p.width), (p.t_n, p.pairs)
    if smooth_k or p.low:
        sums = new((p.pairs, p.t_n, p.width), "float32")
        tops = new((p.pairs, p.t_n, p.width), "float32") if p.low else NULL
        mean = new((p.pairs, p.width), "float32")
        made["v_scale"] = new((p.pairs, p.width), "float32") if p.low else NULL
        args: tuple[Argument, ...]
        values = v if p.low else Strided(NULL, (0, 0, 0))
        args = *k.arguments, *values.arguments, p.kv_lengths, sums, tops, heads, n_k
        run_kernel(device, p, "sla2_key_sums", per_key, *args)
        run_kernel(
            device,
            p,
            "sla2_key_mean",
            (p.pairs,),
            sums,
            tops,
            p.kv_lengths,
            mean,
            made["v_scale"],
            heads,
            n_k,
            t_n,
        )
    if smooth_k and (keep_k or not p.low):
        smooth = new(rows_k, dtype)
    if not smooth_k:
        mean = NULL
    if linear:
        made["phi_k"] = new(rows_k, dtype)
    if pool:
        made["pooled_q"] = new((p.pairs, p.t_m, p.width), "float32")
        made["pooled_k"] = new((p.pairs, p.t_n, p.width), "float32")
    if p.low:
        made["q_bytes"], made["k_bytes"] = new(rows_q, "uint8"), new(rows_k, "uint8")
        made["v_bytes"] = new((p.pairs, p.t_n, p.width, p.block_k), "uint8")
        made["q_scale"], made["k_scale"] = (
            new((p.pairs, p.t_m), "float32"),
            new((p.pairs, p.t_n), "float32"),
        )

    def get(name: str) -> Pointer:
        return made.get(name, NULL)

    if smooth_k or linear or pool or p.low:
        run_kernel(
            device,
            p,
            "sla2_prologue_k",
            per_key,
            *k.arguments,
            mean,
            p.kv_lengths,
            smooth,
            get("phi_k"),
            get("pooled_k"),
            get("k_bytes"),
            get("k_scale"),
            heads,
            n_k,
            np.int32(p.head_dim),
        )
    if pool or p.low:
        outputs = map(get, ("pooled_q", "q_bytes", "q_scale"))
        args = *q.arguments, *outputs, heads, n_q
        run_kernel(device, p, "sla2_prologue_q", (p.t_m, p.pairs), *args)
    if p.low:
        args = *v.arguments, made["v_scale"], p.kv_lengths, made["v_bytes"], heads, n_k
        run_kernel(device, p, "sla2_prologue_v", per_key, *args)
    k = Strided.of(smooth, p.heads, p.n_k, p.width) if smooth_k else k
    return Prologue(q=q, k=k, v=v, **made)


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
) -> tuple[Map, Pointer]:
    """The block map of every row, and the router's scores (Eq. 16), which cover all key blocks.

    A row selects the K = max(1, round(topk * n)) best of the n key blocks that it may choose from,
    which are those of the first `routable` that hold a valid token, and every block from `routable`
    on that holds one. Ties go to the lower index.

    Args:
        pooled_q, pooled_k: block means, fp32 (B H, T_m, width) and (B H, T_n, width).
        weight_q, weight_k: projections, fp32 (weight_heads, d, d). NULL: the identity, which takes
            no launch.
        weight_heads: 1 or H.
        topk: k% in (0, 1].
        routable: how many key blocks compete, 0 to T_n; where the last tokens are text, those
            without any text. None: all T_n.

    Returns:
        The map, as wide as K of `routable` blocks and T_n - routable together, and the scores fp32
        (B, H, T_m, T_n), -inf for blocks without a valid token.

    Raises:
        ValueError: for `routable` outside [0, T_n].
    """
    p, new = problem, device.allocate
    routable = p.t_n if routable is None else routable
    if not 0 <= routable <= p.t_n:
        raise ValueError(f"routable: expected 0 to {p.t_n} key blocks, got {routable}")
    heads, channels = np.int32(p.heads), np.int32(p.head_dim)
    projected = []
    for x, weight, rows in ((pooled_q, weight_q, p.t_m), (pooled_k, weight_k, p.t_n)):
        if not weight.address:
            projected.append(x)
            continue
        y = new((p.pairs, rows, p.width), "float32")
        args = x, weight, y, heads, np.int32(weight_heads), np.int32(rows), channels
        run_kernel(device, p, "sla2_project", (-(-rows // 16), p.pairs), *args)
        projected.append(y)
    scores = new((p.batch, p.heads, p.t_m, p.t_n), "float32")
    t_m, t_n, n_k = np.int32(p.t_m), np.int32(p.t_n), np.int32(p.n_k)
    run_kernel(
        device,
        p,
        "sla2_scores",
        (-(-p.t_n // 32), -(-p.t_m // 32), p.pairs),
        *projected,
        p.kv_lengths,
        scores,
        heads,
        t_m,
        t_n,
        n_k,
        p.softmax_scale,
    )
    chosen = max(1, round(topk * routable)) if routable else 0
    width = chosen + p.t_n - routable
    indices = new((p.batch, p.heads, p.t_m, width), "int32")
    counts = new((p.batch, p.heads, p.t_m), "int32")
    run_kernel(
        device,
        p,
        "sla2_topk",
        (-(-p.t_m // 4), p.pairs),
        scores,
        p.kv_lengths,
        indices,
        counts,
        heads,
        t_m,
        t_n,
        n_k,
        np.int32(routable),
        np.int32(width),
        np.float64(topk),
    )
    return Map(indices, counts, width), scores


def linear_states(device: Device, problem: Problem, made: Prologue, block_map: Map) -> Linear:
    """H and Z of every row block: means over the valid key blocks that it does not select.

    `made` needs phi_k. O_l = phi(Q) H / (phi(Q) . Z) is a quotient: means do what sums do.
    """
    p, new = problem, device.allocate
    heads, n_k, t_m, t_n = map(np.int32, (p.heads, p.n_k, p.t_m, p.t_n))
    bits = new((p.pairs, p.t_m, -(-p.t_n // 32)), "uint32")
    rest_inverse = new((p.pairs, p.t_m), "float32")
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
        heads,
        t_m,
        t_n,
        n_k,
        np.int32(block_map.width),
    )
    states = new((p.pairs, p.t_n, p.width * (p.width + 1)), p.dtype)
    args = made.phi_k, *made.v.arguments, p.kv_lengths, states, heads, n_k
    run_kernel(device, p, "sla2_states", (p.t_n, p.pairs), *args)
    state, norm = masked_sum(device, p, bits, states, rest_inverse, p.t_m, p.t_n)
    return Linear(bits=bits, rest_inverse=rest_inverse, state=state, norm=norm)


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
    made: Prologue,
    block_map: Map,
    linear: Linear | None,
    alpha: Alpha,
    save: bool,
    out: Strided | None = None,
) -> tuple[Strided, Pointer, Strided]:
    """Softmax over the selected blocks, the linear branch and their mixture, in one kernel.

    Args:
        made: k and v, or the 8-bit copies and scales of q, k and v; q if 16 bit or `linear`.
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
        q = made.q if linear else Strided(NULL, (0, 0, 0))
    else:
        k = contiguous(device, p, made.k, p.n_k)  # it already is where K was smoothed
        name, inputs = "sla2_sparse_fwd", (*made.q.arguments, k, *made.v.arguments)
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
    made: Prologue,
    block_map: Map,
    linear: Linear | None,
    alpha: Alpha,
    out: Strided,
    out_sparse: Pointer,
    lse: Pointer,
) -> None:
    p, low, q = problem, None, made.q
    if p.low:
        tiles = hopper.pack_low(device, p, made.k_bytes, made.v_bytes)
        low = hopper.LowBit(made.q_bytes, made.q_scale, made.k_scale, made.v_scale)
        q = q if linear else Strided(NULL, (0, 0, 0))
    else:
        tiles = hopper.pack(device, p, made.k, made.v)
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
    made: Prologue | None = None,
    out: Strided | None = None,
) -> Forward:
    """O = alpha O_s + (1 - alpha) O_l (Eq. 13-16).

    Args:
        q: 16 bit (B, H, n_q, d). k, v: 16 bit (B, H, n_k, d).
        block_map: on the same device. Indices ascend; values are not checked.
        alpha: fp32, or None for the sparse branch alone.
        smooth_k: subtract the mean over tokens from K first.
        save: keep what backward() needs.
        made: the prologue, if route() needed it before (then made with linear=True for an alpha).
        out: where to write O, if d is 64 or 128 and it `fits`; None: new contiguous memory.

    Raises:
        ValueError: the device's architecture cannot run the problem's precision.
        RuntimeError: what is needed to compile or run a kernel is missing, or one does not compile.
    """
    p = problem
    made = made or prologue(
        device, p, q, k, v, smooth_k=smooth_k, linear=alpha is not None, keep_k=save
    )
    linear = None if alpha is None else linear_states(device, p, made, block_map)
    alpha = alpha or ONE
    out, lse, out_sparse = sparse_forward(device, p, made, block_map, linear, alpha, save, out)
    if p.head_dim != p.width:
        out = Strided.of(
            copy_columns(device, p, out, p.n_q, p.width, p.head_dim), p.heads, p.n_q, p.head_dim
        )
    return Forward(
        out=out,
        lse=lse,
        prologue=made,
        block_map=block_map,
        alpha=alpha,
        linear=linear,
        out_sparse=out_sparse,
        smooth_k=smooth_k,
    )
