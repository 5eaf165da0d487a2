"""The sparse branch, the pooled complement and the masked sum on Hopper (csrc/sm90): wgmma, bulk
copies and specialised warps, for the same results as the `mma.sync` kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sla2_kernels.kernels import has_wgmma
from sla2_kernels.launch import Argument, Pointer, multiprocessors, run_kernel
from sla2_kernels.problem import MULTIPROCESSORS, NULL, Alpha, Device, Map, Problem, Strided


def takes(device: Device, problem: Problem) -> bool:
    """Whether these kernels run a problem: for query blocks of 128 and key blocks of 64, if the
    device allows and has them.
    """
    return device.wgmma and has_wgmma(device.arch, problem.geometry)


def _multiprocessors(device: Device) -> int:
    if device.processors:
        return device.processors
    return multiprocessors(device.index) if device.target == "cuda" else MULTIPROCESSORS


@dataclass(frozen=True)
class LowBit:
    """The scales of Q, K and V: fp32 (B H, T_m), (B H, T_n) and (B H, width)."""

    q_scale: Pointer
    k_scale: Pointer
    v_scale: Pointer


def pack(
    device: Device, problem: Problem, k: Strided, v: Strided, mean: Pointer = NULL
) -> tuple[Pointer, Pointer]:
    """K - mean and V in the tiles that the forward copies whole, zeros past `kv_lengths`.

    Args:
        k, v: 16 bit (B, H, n_k, width).
        mean: of K over its tokens, fp32 (B H, width); NULL: 0.

    Returns:
        Tiles of K and of V, 16 bit (B H, T_n, block_k, width), swizzled.
    """
    return _pack(device, problem, k, v, mean, problem.kv_lengths, problem.n_k)


def _pack(
    device: Device,
    problem: Problem,
    x: Strided,
    y: Strided,
    mean: Pointer,
    lengths: Pointer,
    tokens: int,
) -> tuple[Pointer, Pointer]:
    p, blocks = problem, -(-tokens // problem.block_k)
    shape = (p.pairs, blocks, p.block_k, p.width)
    x_tiles, y_tiles = (device.allocate(shape, p.dtype) for _ in range(2))
    args = *x.arguments, *y.arguments, mean, lengths, x_tiles, y_tiles
    sizes = np.int32(p.heads), np.int32(tokens)
    run_kernel(device, p, "sla2_sm90_pack", (blocks, p.pairs, 2), *args, *sizes)
    return x_tiles, y_tiles


def pack_low(
    device: Device, problem: Problem, k_bytes: Pointer, v_bytes: Pointer
) -> tuple[Pointer, Pointer]:
    """8-bit K and V^T (`forward.Prepared`) in the tiles that the low-bit forward copies whole.

    Returns:
        Tiles of K and of V^T, uint8 (B H, T_n, block_k width), swizzled.
    """
    p = problem
    k_tiles, v_tiles = (
        device.allocate((p.pairs, p.t_n, p.block_k * p.width), "uint8") for _ in range(2)
    )
    args = k_bytes, v_bytes, k_tiles, v_tiles, np.int32(p.n_k)
    run_kernel(device, p, "sla2_sm90_pack_low", (p.t_n, p.pairs, 2), *args)
    return k_tiles, v_tiles


def sparse_forward(
    device: Device,
    problem: Problem,
    q: Strided,
    k_tiles: Pointer,
    v_tiles: Pointer,
    block_map: Map,
    state: Pointer,
    norm: Pointer,
    alpha: Alpha,
    out: Strided,
    out_sparse: Pointer,
    lse: Pointer,
    *,
    low: LowBit | None = None,
    blocks: int | None = None,
) -> None:
    """Softmax over the selected blocks, the linear branch and their mixture, in one kernel.

    Args:
        q: 16 bit (B, H, n_q, width).
        k_tiles, v_tiles: what pack(), or pack_low() with `low`, makes.
        state, norm: H and Z of every query block (`forward.Linear`), or NULL: no linear branch.
        out, out_sparse, lse: where to write O, O_s (NULL: nowhere) and L.
        low: the scales, where the problem's precision is a low-bit one.
        blocks: of threads, each of which walks over its query blocks; None: one a multiprocessor.
    """
    p = problem
    blocks = blocks or _multiprocessors(device)
    count = p.pairs * p.t_m
    name = "sla2_sm90_sparse_fwd_low" if low else "sla2_sm90_sparse_fwd"
    run_kernel(
        device,
        p,
        name,
        (min(blocks, count),),
        *q.arguments,
        k_tiles,
        v_tiles,
        *((low.q_scale, low.k_scale, low.v_scale) if low else ()),
        block_map.indices,
        block_map.counts,
        np.int32(block_map.width),
        p.kv_lengths,
        state,
        norm,
        alpha.values,
        *map(np.int32, alpha.strides),
        *out.arguments,
        out_sparse,
        lse,
        *map(np.int32, (p.heads, p.n_q, p.n_k, p.head_dim, count)),
        p.softmax_scale,
    )


def pooled_forward(
    device: Device,
    problem: Problem,
    q: Strided,
    k_tiles: Pointer,
    v_tiles: Pointer,
    mean: Pointer,
    block_map: Map,
    key_means: Pointer,
    value_means: Pointer,
    bits: Pointer,
    bias: Alpha,
    out: Strided,
    lse: Pointer,
    *,
    low: LowBit | None = None,
    blocks: int | None = None,
) -> None:
    """One softmax over the selected blocks and the pooled keys of the others, in one kernel.

    Args:
        mean: by which the pooled keys are smoothed and k_tiles are not, fp32 (B H, width); NULL: 0,
            as always in low bit.
        key_means, value_means: in tiles, see `prepare.Prepared`.
        bits, bias: as `forward.Pooled` has them.
        others: as in sparse_forward().
    """
    p = problem
    count = p.pairs * p.t_m
    run_kernel(
        device,
        p,
        "sla2_sm90_pooled_fwd_low" if low else "sla2_sm90_pooled_fwd",
        (min(blocks or _multiprocessors(device), count),),
        *q.arguments,
        k_tiles,
        v_tiles,
        *((low.q_scale, low.k_scale, low.v_scale) if low else (mean,)),
        block_map.indices,
        block_map.counts,
        np.int32(block_map.width),
        p.kv_lengths,
        key_means,
        value_means,
        bits,
        bias.values,
        *map(np.int32, bias.strides),
        *out.arguments,
        lse,
        *map(np.int32, (p.heads, p.n_q, p.n_k, count)),
        p.softmax_scale,
    )


def masked_sum(
    device: Device,
    problem: Problem,
    bits: Pointer,
    x: Pointer,
    row_scale: Pointer,
    matrix: Pointer,
    vector: Pointer,
    rows: int,
    depth: int,
    *,
    blocks: int | None = None,
) -> None:
    """`forward.masked_sum` by wgmma, into `matrix` and `vector`; `blocks` as in sparse_forward."""
    p = problem
    tiles = -(-rows // 256) * -(-p.width * (p.width + 1) // 128) * p.pairs
    sizes = map(np.int32, (rows, depth, tiles))
    args = bits, x, row_scale, matrix, vector
    grid = (min(blocks or _multiprocessors(device), tiles),)
    run_kernel(device, p, "sla2_sm90_masked_sum", grid, *args, *sizes)


def masked_sum_low(
    device: Device,
    problem: Problem,
    bits: Pointer,
    states: Pointer,
    weights: Pointer,
    v_scale: Pointer,
    rest_inverse: Pointer,
    matrix: Pointer,
    vector: Pointer,
    *,
    blocks: int | None = None,
) -> None:
    """The same of `prepare.Prepared`'s states in 8 bit, for the rows and blocks of the problem."""
    p = problem
    tiles = -(-p.t_m // 256) * (p.width * (p.width + 2) // 128) * p.pairs
    sizes = map(np.int32, (p.t_m, p.t_n, tiles))
    args = bits, states, weights, v_scale, rest_inverse, matrix, vector
    grid = (min(blocks or _multiprocessors(device), tiles),)
    run_kernel(device, p, "sla2_sm90_masked_sum_low", grid, *args, *sizes)


class Rest(NamedTuple):
    """What a complement adds to the gradients of the sparse branch, fp32, or NULL.

    Attributes:
        q: (B H, n_q, width).
        k, v: (B H, n_k, width); `by_block`, (B H, T_n, width), for each token of a block.
    """

    q: Pointer = NULL
    k: Pointer = NULL
    v: Pointer = NULL
    by_block: bool = False


def sparse_backward(
    device: Device,
    problem: Problem,
    q: Pointer,
    k: Pointer,
    v: Pointer,
    grad: Pointer,
    lse: Pointer,
    row_mean: Pointer,
    block_map: Map,
    columns: tuple[Argument, ...],
    rest_inverse: Pointer,
    alpha: Alpha,
    rest: Rest,
    d_q: Pointer,
    d_k: Pointer,
    d_v: Pointer,
    key_sum: Pointer,
    sliced: Pointer,
    *,
    blocks: int | None = None,
) -> None:
    """dQ by rows, dK and dV by columns, in 16 bit.

    Args:
        q, k, v, grad: 16 bit (B H, n_q or n_k, width), contiguous; grad is dO.
        lse, row_mean: L and dO . O_s of every row, fp32 (B H, n_q).
        columns: the arguments of `backward.Columns`.
        rest_inverse: see `forward.Linear`; NULL without a linear branch.
        rest: what the complement adds.
        d_q, d_v: where to write dQ and dV, 16 bit.
        d_k: where to write dK, fp32; it may be rest.k.
        key_sum: takes dK's sums over each key block and slice, fp32 (B H, T_n + slices, width).
        sliced: takes the slices' dK and dV, fp32 (B H, slices, 2, block_k, width).
        blocks: as in sparse_forward.
    """
    p, most = problem, blocks or _multiprocessors(device)
    q_rows, grad_rows = (Strided.of(x, p.heads, p.n_q, p.width) for x in (q, grad))
    k_rows, v_rows = (Strided.of(x, p.heads, p.n_k, p.width) for x in (k, v))
    q_tiles, grad_tiles = _pack(device, p, q_rows, grad_rows, NULL, NULL, p.n_q)
    tiles = (q_tiles, *pack(device, p, k_rows, v_rows), grad_tiles, lse, row_mean)
    mixed: tuple[Argument, ...]
    mixed = (p.kv_lengths, rest_inverse, alpha.values, *map(np.int32, alpha.strides))
    sizes = (np.int32(p.heads), np.int32(p.n_q), np.int32(p.n_k))
    run_kernel(
        device,
        p,
        "sla2_sm90_sparse_bwd_q",
        (min(most, p.pairs * p.t_m),),
        *tiles,
        block_map.indices,
        block_map.counts,
        np.int32(block_map.width),
        *mixed,
        rest.q,
        d_q,
        *sizes,
        np.int32(p.pairs * p.t_m),
        p.softmax_scale,
    )
    run_kernel(
        device,
        p,
        "sla2_sm90_sparse_bwd_kv",
        (min(most, p.pairs * p.t_n),),
        *tiles,
        *columns,
        *mixed,
        rest.k,
        rest.v,
        d_k,
        d_v,
        key_sum,
        sliced,
        np.int32(p.pairs),
        *sizes,
        np.int32(rest.by_block),
        p.softmax_scale,
    )
