"""The first pass of the operator: what routing and attention derive from Q, K and V once, and how
rows are laid out for the kernels. Read by forward.py and backward.py; nothing reads device memory.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sla2_kernels.kernels import eight_bit_states
from sla2_kernels.launch import Pointer, run_kernel
from sla2_kernels.problem import NOTHING, NULL, Device, Problem, Strided


class Prepared(NamedTuple):
    """What is derived from Q, K and V once and read by the later steps (Alg. 2).

    `width` is 64 or 128, the channels of a row as the kernels see it. NULL: not made.

    Attributes:
        q, k, v: 16 bit (B, H, N, width).
        mean: of K over its valid tokens, fp32 (B H, width), where `k` is to be smoothed by it.
        pooled_q, pooled_k: block means, fp32 (B H, T_m, width) and (B H, T_n, width); of the
            smoothed K, if it is smoothed.
        key_means, value_means: block means of K, smoothed if it is, and of V over the valid tokens,
            16 bit (B H, T_n, width), 0 where there is none: the keys of the pooled complement.
        key_mean_tiles, value_mean_tiles: the same as the tiles of pooled keys that Hopper's forward
            copies whole, 16 bit (B H, T_n / block_k rounded up, block_k, width).
        k_bytes: 8-bit copy (B H, n_k, width), for a low-bit precision.
        v_bytes: 8-bit copy of V, transposed in each block: (B H, T_n, width, block_k).
        q_scale, k_scale, v_scale: what 8-bit values are divided by, fp32 (B H, T_m), (B H, T_n) and
            (B H, width).
        k_tiles, v_tiles: K less `mean` and V, in low bit their 8-bit copies, as sm90/pack.cu and
            sm90/pack_low.cu lay them out, (B H, T_n, block_k, width). Where pool() makes them, K as
            it is.
        states: of the linear branch, 16 bit (B H, T_n, width (width + 1)): phi(K_j)^T V_j / block_k
            row by row, and behind it the column sums of phi(K_j) / block_k. With state_weights
            they are 8 bit (B H, T_n, width (width + 2)), as csrc/states.cuh says.
        state_weights: what a block's 8-bit states are multiplied by, bytes
            (B H, T_n rounded up to a multiple of 64), as csrc/states.cuh orders them.
    """

    q: Strided
    k: Strided
    v: Strided
    mean: Pointer = NULL
    pooled_q: Pointer = NULL
    pooled_k: Pointer = NULL
    key_means: Pointer = NULL
    value_means: Pointer = NULL
    key_mean_tiles: Pointer = NULL
    value_mean_tiles: Pointer = NULL
    k_bytes: Pointer = NULL
    v_bytes: Pointer = NULL
    q_scale: Pointer = NULL
    k_scale: Pointer = NULL
    v_scale: Pointer = NULL
    k_tiles: Pointer = NULL
    v_tiles: Pointer = NULL
    states: Pointer = NULL
    state_weights: Pointer = NULL


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
    means: bool = False,
    tiles: bool = False,
    save: bool = False,
) -> Prepared:
    """The first pass over Q and K, which routing and attention share; in low bit and with `means`
    over V too.

    Args:
        q: 16 bit (B, H, n_q, d). k, v: 16 bit (B, H, n_k, d).
        smooth_k: make K's mean over its valid tokens, and take it from pooled_k and key_means.
        pooled: make pooled_q and pooled_k.
        means: make key_means and value_means.
        tiles: make these in tiles, key_means in nothing else, and in 16 bit k_tiles and v_tiles.
        save: with `tiles`, make key_means besides, which backward() reads, but neither k_tiles nor
            v_tiles, which keys() makes of the smoothed K.

    A low-bit precision has also q_scale and v_scale made.
    """
    p, new = problem, device.allocate
    q = widened(device, p, q, p.n_q)
    k, v = (widened(device, p, x, p.n_k) for x in (k, v))
    made = Prepared(q=q, k=k, v=v)
    over_keys, over_queries = smooth_k or pooled or means or p.low, pooled or p.low
    if not over_keys:
        return made
    per_block = (p.pairs, p.t_n, p.width)
    of_keys, tops = new(per_block, "float32"), new(per_block, "float32") if p.low else NULL
    if pooled:
        made = made._replace(pooled_q=new((p.pairs, p.t_m, p.width), "float32"), pooled_k=of_keys)
    if means:
        made = made._replace(value_means=new(per_block, p.dtype))
    if means and (save or not tiles):
        made = made._replace(key_means=new(per_block, p.dtype))
    if means and tiles:
        shape = (p.pairs, -(-p.t_n // p.block_k), p.block_k, p.width)
        of_k, of_v = (new(shape, p.dtype) for _ in range(2))
        made = made._replace(key_mean_tiles=of_k, value_mean_tiles=of_v)
        if not (save or p.low):
            shape = (p.pairs, p.t_n, p.block_k, p.width)
            k_tiles, v_tiles = (new(shape, p.dtype) for _ in range(2))
            made = made._replace(k_tiles=k_tiles, v_tiles=v_tiles)
    if p.low:
        made = made._replace(
            q_scale=new((p.pairs, p.t_m), "float32"),
            v_scale=new((p.pairs, p.width), "float32"),
        )
    value_blocks = p.t_n if means and not p.low else 0
    run_kernel(
        device,
        p,
        "sla2_pool",
        (p.t_n + value_blocks + (p.t_m if over_queries else 0), p.pairs),
        *(q if over_queries else NOTHING).arguments,
        *k.arguments,
        *(v if p.low or means else NOTHING).arguments,
        p.kv_lengths,
        made.pooled_q,
        of_keys,
        made.value_means,
        made.k_tiles,
        made.v_tiles,
        made.q_scale,
        tops,
        *map(np.int32, (p.heads, p.n_q, p.n_k, p.t_n, value_blocks)),
    )
    if not (smooth_k or means or p.low):
        return made
    mean = new((p.pairs, p.width), "float32")
    sizes = map(np.int32, (p.heads, p.n_k, p.t_n, 0, True, smooth_k and (pooled or means)))
    run_kernel(
        device,
        p,
        "sla2_key_mean",
        (p.pairs,),
        of_keys,
        tops,
        p.kv_lengths,
        mean,
        made.v_scale,
        made.key_means,
        made.value_means if tiles else NULL,
        made.key_mean_tiles,
        made.value_mean_tiles,
        NULL,
        *sizes,
    )
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
        save: write the smoothed K, which backward() reads. `k` then is that, and `mean` NULL. The
            states stay in 16 bit.
        tiles: make k_tiles and v_tiles, for blocks of 128 and 64.

    A low-bit precision has also k_scale and, without `tiles`, k_bytes and v_bytes made.
    """
    p, new = problem, device.allocate
    smooth = new((p.pairs, p.n_k, p.width), p.dtype) if save and made.mean.address else NULL
    name = "sla2_keys"
    kept: tuple[Pointer, ...] = (NULL,)  # the states, in 8 bit with their weights
    if linear and not save and eight_bit_states(device.arch, p.precision):
        name = "sla2_keys_low"
        states = new((p.pairs, p.t_n, p.width * (p.width + 2)), "uint8")
        kept = states, new((p.pairs, -(-p.t_n // 64) * 64), "uint8")
    elif linear:
        kept = (new((p.pairs, p.t_n, p.width * (p.width + 1)), p.dtype),)
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
        name,
        (p.t_n, p.pairs),
        *k.arguments,
        *(made.v if linear or p.low or tiles else NOTHING).arguments,
        mean,
        made.v_scale,
        p.kv_lengths,
        smooth,
        *kept,
        made.k_bytes,
        made.k_scale,
        made.v_bytes,
        made.k_tiles,
        made.v_tiles,
        *map(np.int32, (p.heads, p.n_k, p.head_dim)),
    )
    states, weights = (*kept, NULL)[:2]
    return made._replace(states=states, state_weights=weights)
