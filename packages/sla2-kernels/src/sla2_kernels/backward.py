"""The whole operator on raw pointers, backward: row sums, the complement, dQ by rows, dK and dV
by columns (Alg. 3).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from sla2_kernels import hopper
from sla2_kernels.forward import Forward, Linear, Pooled, masked_sum, row_bits
from sla2_kernels.launch import Argument, Pointer, run_kernel
from sla2_kernels.prepare import contiguous, copy_columns, widened
from sla2_kernels.problem import NULL, Device, Problem, Strided

# At most so many blocks of threads, or one a tile, sum the gradients of the pooled keys: four
# rounds of two on each of an H100's multiprocessors. It bounds the memory of their parts, too.
POOLED_BLOCKS = 1056
# A column longer than LEAST_ROWS and than this part of all that is selected is cut into slices,
# each for a block of threads (csrc/columns.cuh).
PARTS_OF_SELECTED, LEAST_ROWS = 1056, 32


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The block map by columns: which row blocks selected each key block.

    Attributes:
        bits: uint32 (B H, T_n, ceil(T_m / 32)), row blocks in the order of `Linear.bits`.
        counts: int32 (B H, T_n).
        offsets: int32 (B H, T_n + 1).
        rows: int32 (B H, capacity); rows[offsets[j] : offsets[j + 1]] are those of column j, and
            ascend.
        slice_offsets: int32 (B H, T_n + 1); a column's slices among those of its head. NULL where
            no column is cut.
        slice_columns: int32 (B H, slices), the column of each, or NULL.
        slices: how many a head has at most, by shapes alone.
    """

    bits: Pointer
    counts: Pointer
    offsets: Pointer
    rows: Pointer
    capacity: int
    slice_offsets: Pointer = NULL
    slice_columns: Pointer = NULL
    slices: int = 0

    @property
    def arguments(self) -> tuple[Argument, ...]:
        """As the kernels of dK and dV list them."""
        lists = self.offsets, self.rows, np.int64(self.capacity)
        return (*lists, self.slice_offsets, self.slice_columns, np.int32(self.slices))


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """What backward() returns.

    Attributes:
        d_q, d_k, d_v: 16 bit, contiguous, (B, H, n_q, d) and (B, H, n_k, d).
        d_alpha: fp32 (B, H, T_m), of alpha, or of b with pooled keys; NULL without either. The
            gradient of a shared one is its sum over the axes that share it.
    """

    d_q: Pointer
    d_k: Pointer
    d_v: Pointer
    d_alpha: Pointer


def slice_plan(problem: Problem, width: int) -> tuple[int, int]:
    """How long a column may be that is not cut, in row blocks, and how many slices a head has at
    most, where rows select `width` blocks at most. By shapes alone: the host reads no map.
    """
    p, selected = problem, problem.t_m * width
    longest = max(LEAST_ROWS, -(-selected * p.pairs // PARTS_OF_SELECTED))
    # A column of c > longest rows has ceil(c / longest) <= 2 c / (longest + 1) slices.
    most = min(2 * selected // (longest + 1), p.t_n * -(-p.t_m // longest))
    return longest, most if p.t_m > longest else 0


def transpose_map(device: Device, problem: Problem, bits: Pointer, width: int) -> Columns:
    """The map by columns: count, scan, scatter; long columns are cut.

    Args:
        bits: uint32 (B H, T_m, ceil(T_n / 32)), as in `Linear`.
        width: how many blocks a row selects at most.
    """
    p, new = problem, device.allocate
    t_m, t_n = np.int32(p.t_m), np.int32(p.t_n)
    longest, slices = slice_plan(p, width)
    column_bits = new((p.pairs, p.t_n, -(-p.t_m // 32)), "uint32")
    counts = new((p.pairs, p.t_n), "int32")
    offsets = new((p.pairs, p.t_n + 1), "int32")
    cuts = new((p.pairs, p.t_n + 1), "int32") if slices else NULL
    cut_columns = new((p.pairs, slices), "int32") if slices else NULL
    capacity = p.t_m * width
    rows = new((p.pairs, capacity), "int32")
    per_column = (-(-p.t_n // 4), p.pairs)
    run_kernel(device, p, "sla2_column_bits", per_column, bits, column_bits, counts, t_m, t_n)
    made = counts, offsets, cuts, cut_columns, t_n, np.int32(longest), np.int32(slices)
    run_kernel(device, p, "sla2_column_offsets", (p.pairs,), *made)
    args = column_bits, offsets, rows, t_m, t_n, np.int64(capacity)
    run_kernel(device, p, "sla2_column_rows", per_column, *args)
    return Columns(
        bits=column_bits,
        counts=counts,
        offsets=offsets,
        rows=rows,
        capacity=capacity,
        slice_offsets=cuts,
        slice_columns=cut_columns,
        slices=slices,
    )


def _linear(
    device: Device,
    problem: Problem,
    saved: Forward,
    linear: Linear,
    columns: Columns,
    q: Pointer,
    k: Pointer,
    v: Pointer,
    grad: Pointer,
    row_dot: Pointer,
) -> tuple[hopper.Rest, Pointer]:
    """What the linear branch adds, and d alpha. q, k, v and dO are contiguous; row_dot is
    dO . O_s.
    """
    p, new, alpha = problem, device.allocate, saved.alpha
    heads, head_dim = np.int32(p.heads), np.int32(p.head_dim)
    d_q, d_k, d_v = (new((p.pairs, n, p.width), "float32") for n in (p.n_q, p.n_k, p.n_k))
    d_alpha = new((p.batch, p.heads, p.t_m), "float32")
    d_states = new((p.pairs, p.t_m, p.width * (p.width + 1)), p.dtype)
    run_kernel(
        device,
        p,
        "sla2_linear_bwd_q",
        (p.t_m, p.pairs),
        q,
        grad,
        linear.state,
        linear.norm,
        row_dot,
        saved.lse,
        linear.rest_inverse,
        alpha.values,
        *map(np.int32, alpha.strides),
        d_q,
        d_states,
        d_alpha,
        heads,
        np.int32(p.n_q),
        head_dim,
    )
    d_state, d_norm = masked_sum(device, p, columns.bits, d_states, NULL, p.t_n, p.t_m)
    args = k, v, d_state, d_norm, p.kv_lengths, d_k, d_v, heads, np.int32(p.n_k), head_dim
    run_kernel(device, p, "sla2_linear_bwd_kv", (p.t_n, p.pairs), *args)
    return hopper.Rest(q=d_q, k=d_k, v=d_v), d_alpha


def _pooled(
    device: Device,
    problem: Problem,
    lse: Pointer,
    pooled: Pooled,
    q: Pointer,
    grad: Pointer,
    row_dot: Pointer,
) -> tuple[hopper.Rest, Pointer]:
    """What the pooled complement adds, and the gradient of b. q and dO are contiguous; row_dot is
    dO . O.
    """
    p, new = replace(problem, precision="full"), device.allocate
    heads, n_q, n_k = map(np.int32, (p.heads, p.n_q, p.n_k))
    inputs = q, pooled.k, pooled.v, grad, lse, row_dot, pooled.bits, p.kv_lengths
    given: tuple[Argument, ...]
    given = (*inputs, pooled.bias.values, *map(np.int32, pooled.bias.strides))
    d_q = new((p.pairs, p.n_q, p.width), "float32")
    d_bias = new((p.batch, p.heads, p.t_m), "float32")
    by_rows = d_q, d_bias, heads, n_q, n_k, p.softmax_scale
    run_kernel(device, p, "sla2_pooled_bwd_q", (p.t_m, p.pairs), *given, *by_rows)
    # Query blocks are split among so many blocks of threads, by shapes alone: so are the sums.
    tiles = -(-p.t_n // p.block_k)
    blocks = -(-p.t_m // min(p.t_m, max(1, POOLED_BLOCKS // (tiles * p.pairs))))
    parts = -(-p.t_m // blocks)
    d_k, d_v = (new((p.pairs, parts, p.t_n, p.width), "float32") for _ in range(2))
    by_keys = d_k, d_v, heads, n_q, n_k, np.int32(blocks), p.softmax_scale
    run_kernel(device, p, "sla2_pooled_bwd_kv", (tiles, parts, p.pairs), *given, *by_keys)
    share_k, share_v = (new((p.pairs, p.t_n, p.width), "float32") for _ in range(2))
    args = d_k, d_v, p.kv_lengths, share_k, share_v, heads, n_k, np.int32(parts)
    run_kernel(device, p, "sla2_pooled_bwd_sum", (p.t_n, p.pairs), *args)
    return hopper.Rest(q=d_q, k=share_k, v=share_v, by_block=True), d_bias


@dataclass(frozen=True, kw_only=True)
class _Sparse:
    """What the kernels of the sparse branch differentiate; the last three are NULL unless the
    backward is matched.
    """

    problem: Problem
    q: Pointer
    k: Pointer
    v: Pointer
    row_mean: Pointer
    row_top: Pointer = NULL
    q_scale: Pointer = NULL
    k_scale: Pointer = NULL


def _matched(
    device: Device,
    problem: Problem,
    saved: Forward,
    queries: Pointer,
    values: Pointer,
    grad: Pointer,
) -> _Sparse:
    """Q, K, V as the low-bit forward saw them, and D and the largest P of each row with the
    unrounded P.
    """
    p, new, made, block_map = problem, device.allocate, saved.made, saved.block_map
    heads, n_q, n_k = map(np.int32, (p.heads, p.n_q, p.n_k))
    q, k, v = (new((p.pairs, rows, p.width), p.dtype) for rows in (p.n_q, p.n_k, p.n_k))
    per_pair = (-(-p.n_q * p.width // 512), p.pairs)
    run_kernel(device, p, "sla2_round_queries", per_pair, queries, made.q_scale, q, n_q)
    count = p.pairs * p.n_k * p.width
    grid = (min(65535, -(-count // 1024)),)
    run_kernel(device, p, "sla2_widen", grid, made.k_bytes, k, np.int64(count))
    args = values, made.v_scale, p.kv_lengths, v, heads, n_k
    run_kernel(device, p, "sla2_round_values", (-(-p.n_k * p.width // 512), p.pairs), *args)
    row_mean, row_top = (new((p.pairs, p.n_q), "float32") for _ in range(2))
    run_kernel(
        device,
        p,
        "sla2_bwd_matched_rows",
        (p.t_m * _parts(p), p.pairs),
        q,
        k,
        v,
        grad,
        saved.lse,
        made.q_scale,
        made.k_scale,
        block_map.indices,
        block_map.counts,
        np.int32(block_map.width),
        p.kv_lengths,
        row_mean,
        row_top,
        heads,
        n_q,
        n_k,
        p.softmax_scale,
    )
    return _Sparse(
        problem=p,
        q=q,
        k=k,
        v=v,
        row_mean=row_mean,
        row_top=row_top,
        q_scale=made.q_scale,
        k_scale=made.k_scale,
    )


def _parts(problem: Problem) -> int:
    """Tiles of query rows in a query block."""
    return problem.block_q // min(64, problem.block_q)


def backward(
    device: Device, problem: Problem, saved: Forward, grad: Strided, *, qat_backward: str = "paper"
) -> Gradients:
    """Gradients of forward(..., save=True) (Alg. 3).

    Args:
        problem: the forward's.
        saved: the forward's result.
        grad: dO, 16 bit (B, H, n_q, d).
        qat_backward: after a low-bit forward, "paper" takes P from the original Q, K, V and the
            forward's L (Alg. 3); "matched" differentiates the low-bit forward with its rounding as
            the identity: the rounded Q, K, V and P, and D = rowsum(P dP) from the unrounded P.
            `saved.made` then needs its 8-bit tensors and scales.

    Raises:
        ValueError: the device's architecture cannot run the problem's precision, or `qat_backward`
            is "matched" after a low-bit forward with pooled keys, which no kernel has.
        RuntimeError: what is needed to compile or run a kernel is missing, or one does not compile.
    """
    p, new, made = problem, device.allocate, saved.made
    if saved.pooled and p.low and qat_backward == "matched":
        raise ValueError("qat_backward: expected 'paper' with pooled keys, got 'matched'")
    # These kernels read rows many times over: contiguous ones, copied here where the caller's are
    # not.
    d_out = contiguous(device, p, widened(device, p, grad, p.n_q), p.n_q)
    q, out_sparse = (contiguous(device, p, x, p.n_q) for x in (made.q, saved.out_sparse))
    k, v = (contiguous(device, p, x, p.n_k) for x in (made.k, made.v))
    heads, n_q, n_k, t_m, t_n = map(np.int32, (p.heads, p.n_q, p.n_k, p.t_m, p.t_n))
    linear, block_map = saved.linear, saved.block_map
    alpha: tuple[Argument, ...] = (saved.alpha.values, *map(np.int32, saved.alpha.strides))
    rest_inverse = linear.rest_inverse if linear else NULL
    row_dot = new((p.pairs, p.n_q), "float32")
    run_kernel(device, p, "sla2_bwd_row_dot", (p.t_m, p.pairs), d_out, out_sparse, row_dot, n_q)
    complement = linear or saved.pooled
    bits = complement.bits if complement else row_bits(device, p, block_map)[0]
    columns = transpose_map(device, p, bits, block_map.width)
    rest, d_alpha = hopper.Rest(), NULL
    if linear:
        rest, d_alpha = _linear(device, p, saved, linear, columns, q, k, v, d_out, row_dot)
    elif saved.pooled:
        rest, d_alpha = _pooled(device, p, saved.lse, saved.pooled, q, d_out, row_dot)
    if qat_backward == "matched" and p.low:
        s = _matched(device, p, saved, q, v, d_out)
    else:
        s = _Sparse(problem=replace(p, precision="full"), q=q, k=k, v=v, row_mean=row_dot)
    d_q, d_k, d_v = (new((p.pairs, n, p.width), p.dtype) for n in (p.n_q, p.n_k, p.n_k))
    d_k_sum = rest.k if linear else new((p.pairs, p.n_k, p.width), "float32")
    key_sum = new((p.pairs, p.t_n + columns.slices, p.width), "float32")
    sliced = NULL
    if columns.slices:
        sliced = new((p.pairs, columns.slices, 2, p.block_k, p.width), "float32")
    if hopper.takes(device, p) and not s.problem.low:
        hopper.sparse_backward(
            device,
            p,
            s.q,
            s.k,
            s.v,
            d_out,
            saved.lse,
            s.row_mean,
            block_map,
            columns.arguments,
            rest_inverse,
            saved.alpha,
            rest,
            d_q,
            d_k_sum,
            d_v,
            key_sum,
            sliced,
        )
    else:
        run_kernel(
            device,
            s.problem,
            "sla2_sparse_bwd_q",
            (p.t_m * _parts(p), p.pairs),
            s.q,
            s.k,
            s.v,
            d_out,
            saved.lse,
            s.row_mean,
            s.q_scale,
            s.k_scale,
            block_map.indices,
            block_map.counts,
            np.int32(block_map.width),
            p.kv_lengths,
            rest_inverse,
            *alpha,
            rest.q,
            d_q,
            heads,
            n_q,
            n_k,
            p.softmax_scale,
        )
        run_kernel(
            device,
            s.problem,
            "sla2_sparse_bwd_kv",
            (p.pairs * (p.t_n + columns.slices),),
            s.q,
            s.k,
            s.v,
            d_out,
            saved.lse,
            s.row_mean,
            s.row_top,
            s.q_scale,
            s.k_scale,
            *columns.arguments,
            p.kv_lengths,
            rest_inverse,
            *alpha,
            rest.k,
            rest.v,
            d_k_sum,
            d_v,
            key_sum,
            sliced,
            np.int32(p.pairs),
            heads,
            n_q,
            n_k,
            t_m,
            np.int32(rest.by_block),
            p.softmax_scale,
        )
    mean = NULL
    if saved.smooth_k:
        mean = new((p.pairs, p.width), "float32")
        run_kernel(
            device,
            p,
            "sla2_key_mean",
            (p.pairs,),
            key_sum,
            NULL,
            p.kv_lengths,
            mean,
            *5 * (NULL,),
            columns.slice_offsets,
            heads,
            n_k,
            t_n,
            np.int32(columns.slices),
            np.int32(False),
            np.int32(False),
        )
    cut = columns.slice_offsets, sliced, np.int32(columns.slices)
    args = d_k_sum, mean, *cut, p.kv_lengths, d_k, d_v, heads, n_k
    run_kernel(device, p, "sla2_finish_kv", (-(-p.n_k * p.width // 1024), p.pairs), *args)
    if p.head_dim != p.width:
        grads = ((d_q, p.n_q), (d_k, p.n_k), (d_v, p.n_k))
        d_q, d_k, d_v = (
            copy_columns(device, p, Strided.of(x, p.heads, n, p.width), n, p.width, p.head_dim)
            for x, n in grads
        )
    return Gradients(d_q=d_q, d_k=d_k, d_v=d_v, d_alpha=d_alpha)
