"""Block means in plain torch, for every device and dtype, and their gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from sla2_core.block_map import num_blocks


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
