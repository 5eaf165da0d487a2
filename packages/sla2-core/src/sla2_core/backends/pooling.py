"""Block means of Q and K, and the smoothing of K, in plain torch: for every device and dtype.

The CPU and the CUDA backend have kernels for the means; the smoothing of means is this one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sla2_core.backends import kernels
from sla2_core.backends.means import block_means

_MEAN_BLOCK = 256  # tokens that one partial sum of the mean over tokens holds


def pool(x: Tensor, block: int, lengths: Tensor | None = None) -> Tensor:
    """As block_means, but for CPU tensors by the CPU kernel."""
    if x.device.type == "cpu":
        return kernels.block_means(x, lengths, block)
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
