"""Block means of Q and K, and the smoothing of K, in plain torch: for every device and dtype.

The CPU and the CUDA backend have kernels for the means; the smoothing of means is this one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sla2_core.block_map import num_blocks

_MEAN_BLOCK = 256  # tokens that one partial sum of the mean over tokens holds


def block_means(x: Tensor, block: int, lengths: Tensor | None = None) -> Tensor:
    """Mean over the valid tokens of each block, in fp32 (fp64 stays).

    Args:
        x: (B, H, N, d).
        block: tokens in a block; the last one may be short.
        lengths: int64 (B,), valid tokens of each batch item; None means all N. Blocks without a
            valid token are 0.

    Returns:
        (B, H, ceil(N / block), d).
    """
    work = x if x.dtype == torch.float64 else x.float()
    b, _, n, _ = x.shape
    count = num_blocks(n, block)
    if lengths is not None:
        valid = torch.arange(n, device=x.device) < lengths[:, None]
        work = work.masked_fill(~valid[:, None, :, None], 0.0)
    whole = n // block
    if whole:
        sums = work[:, :, : whole * block].unflatten(2, (whole, block)).sum(3)
    else:
        sums = work[:, :, :0]
    if whole < count:
        sums = torch.cat([sums, work[:, :, whole * block :].sum(2, keepdim=True)], dim=2)
    start = torch.arange(count, device=x.device) * block
    last = torch.full((b, 1), n, device=x.device) if lengths is None else lengths[:, None]
    tokens = (last - start).clamp(0, block).clamp_min(1)
    return sums / tokens[:, None, :, None]


def spread_means(grad: Tensor, block: int, length: int, lengths: Tensor | None) -> Tensor:
    """The gradient of block_means: (B, H, length, d).

    Args:
        grad: of the means, (B, H, T, d). block: tokens in a block. length: how many tokens.
        lengths: int64 (B,), valid tokens of each item, or None.
    """
    start = torch.arange(grad.shape[2], device=grad.device) * block
    last = torch.full((1,), length, device=grad.device) if lengths is None else lengths
    tokens = (last[:, None] - start).clamp(0, block)[:, None, :, None]
    grad = (grad / tokens.clamp_min(1)).repeat_interleave(block, 2)[:, :, :length]
    if lengths is not None:
        inside = torch.arange(length, device=grad.device) < lengths[:, None]
        grad = grad * inside[:, None, :, None]
    return grad


def pool(x: Tensor, block: int, lengths: Tensor | None = None) -> Tensor:
    """As block_means, but for CPU tensors by the CPU kernel."""
    if x.device.type == "cpu":
        from sla2_core.backends import ops

        return ops.block_means(x, lengths, block)
    return block_means(x, block, lengths)


def smooth_keys(k: Tensor, lengths: Tensor | None = None) -> Tensor:
    """K minus its mean over the valid tokens (Alg. 2, step 1), in k's dtype: (B, H, N_k, d).

    The sparse branch and the top-k are unchanged by it, up to rounding; phi(K) and low-bit K are
    not.
    """
    means = pool(k, _MEAN_BLOCK, lengths)
    return (k - _mean_of_means(means, k.shape[2], _MEAN_BLOCK, lengths)).to(k.dtype)


def smooth_pooled(pooled: Tensor, n: int, block: int, lengths: Tensor | None = None) -> Tensor:
    """The block means (B, H, T_n, d) of smooth_keys(K), from those of K. K is not read again: its
    mean over tokens is the mean of the means, weighted by the valid tokens of each block.

    Args:
        pooled: block means of K, (B, H, T_n, d). n: tokens of K. block: tokens in a block.
        lengths: int64 (B,), valid tokens of each item, or None.
    """
    return pooled - _mean_of_means(pooled, n, block, lengths)


def _mean_of_means(means: Tensor, n: int, block: int, lengths: Tensor | None) -> Tensor:
    start = torch.arange(0, n, block, device=means.device)
    last = torch.full((1,), n, device=means.device) if lengths is None else lengths
    tokens = (last[:, None] - start).clamp(0, block)
    share = (tokens / last[:, None]).to(means.dtype)[:, None, :, None]
    return (means * share).sum(2, keepdim=True)
