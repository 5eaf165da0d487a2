"""torch.library operators over the small CPU kernels: block means, top-k, SoftTop-k."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sla2_core.backends.base import to_work, work_dtype
from sla2_core.backends.means import spread_means
from sla2_core.block_map import num_blocks

if TYPE_CHECKING:
    from sla2_kernels.cpu.build import Array

_ALONE = 1 << 22  # elements below which one thread does it


def heads_of(x: Tensor) -> Array:
    """A contiguous numpy array (B * H, ...) of x (B, H, ...)."""
    return x.detach().flatten(0, 1).contiguous().numpy()


@torch.library.custom_op("sla2::block_means", mutates_args=(), device_types="cpu")
def block_means(x: Tensor, lengths: Tensor | None, block: int) -> Tensor:
    """pooling.block_means by the CPU kernel.

    x (B, H, N, d); lengths int64 (B,) or None -> (B, H, ceil(N / block), d).
    """
    from sla2_kernels.cpu.pool import block_means as means

    b, h, n, d = x.shape
    values = x.contiguous().view(torch.uint16) if x.dtype == torch.bfloat16 else to_work(x)
    lengths = torch.full((b,), n) if lengths is None else lengths
    threads = 1 if x.numel() < _ALONE else torch.get_num_threads()
    valid = lengths.repeat_interleave(h).to(torch.int64).numpy()
    return torch.from_numpy(means(heads_of(values), valid, block, threads)).view(b, h, -1, d)


@block_means.register_fake
def _(x: Tensor, lengths: Tensor | None, block: int) -> Tensor:
    return x.new_empty(
        (*x.shape[:2], num_blocks(x.shape[2], block), x.shape[3]), dtype=work_dtype(x)
    )


def _save_means(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, lengths, ctx.block = inputs
    ctx.length, ctx.dtype = x.shape[2], x.dtype
    ctx.save_for_backward(lengths)


def _differentiate_means(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (lengths,) = ctx.saved_tensors
    return spread_means(grad, ctx.block, ctx.length, lengths).to(ctx.dtype), None, None


block_means.register_autograd(_differentiate_means, setup_context=_save_means)


@torch.library.custom_op("sla2::top_k", mutates_args=(), device_types="cpu")
def top_k(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest of each row, ties to the lower index, NaN first, ascending:
    int32 (B, H, T_m, count).
    """
    from sla2_kernels.cpu.route import top_k as select

    threads = 1 if scores.numel() < 1 << 16 else torch.get_num_threads()
    found = select(heads_of(scores), count, threads)
    return torch.from_numpy(found).view(*scores.shape[:3], count)


@top_k.register_fake
def _(scores: Tensor, count: int) -> Tensor:
    return scores.new_empty((*scores.shape[:3], count), dtype=torch.int32)


@torch.library.custom_op("sla2::soft_top_k", mutates_args=(), device_types="cpu")
def soft_top_k(x: Tensor, k: Tensor) -> Tensor:
    """sigmoid(x + lambda), lambda such that each row sums to k: x (..., T_n) fp32 or fp64, k
    (..., 1) of x's dtype.
    """
    from sla2_kernels.cpu.softtopk import soft_top_k as solve

    rows = x.detach().reshape(-1, x.shape[-1]).contiguous().numpy()
    each = k.detach().expand(*x.shape[:-1], 1).reshape(-1).contiguous().numpy()
    threads = 1 if x.numel() < 1 << 14 else torch.get_num_threads()
    return torch.from_numpy(solve(rows, each, threads)).view(x.shape)


@soft_top_k.register_fake
def _(x: Tensor, k: Tensor) -> Tensor:
    return x.new_empty(x.shape)
