"""Ulysses context parallelism: every rank gives up tokens for heads before the attention, and back
after it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def _all_to_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=group)
    return out


def _to_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(B, n, H, d) of this rank's tokens -> (B, P n, H / P, d) of all tokens and this rank's heads;
    P is the number of ranks.
    """
    ranks = dist.get_world_size(group)
    x = x.unflatten(2, (ranks, -1)).permute(2, 0, 1, 3, 4).contiguous()
    return _all_to_all(x, group).permute(1, 0, 2, 3, 4).flatten(1, 2)


def _to_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Inverse of _to_heads."""
    ranks = dist.get_world_size(group)
    x = x.unflatten(1, (ranks, -1)).permute(1, 0, 2, 3, 4).contiguous()
    return _all_to_all(x, group).permute(1, 2, 0, 3, 4).flatten(2, 3)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, to_heads: bool) -> Tensor:
        ctx.group, ctx.to_heads = group, to_heads
        return (_to_heads if to_heads else _to_tokens)(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return (_to_tokens if ctx.to_heads else _to_heads)(grad, ctx.group), None, None


class Ulysses:
    """The exchange that a diffusers `_parallel_config` asks for, among P ranks.

    Args:
        parallel_config: diffusers' ParallelConfig with a context_parallel_config.
        num_heads: H of the layer, which P must divide.

    Attributes:
        ranks: P. group: their process group. heads: which of the H heads this rank computes.

    Raises:
        ValueError: P does not divide H, ring attention, or shards of unequal size. Ring attention
            needs a softmax over all ranks; attention over the local tokens alone would be wrong in
            silence.
    """

    def __init__(self, parallel_config: Any, num_heads: int):
        config = parallel_config.context_parallel_config
        if config.ring_degree > 1:
            raise ValueError(
                "_parallel_config: expected Ulysses alone for SLA2, got"
                f" ring_degree={config.ring_degree}"
            )
        if config.ulysses_anything:
            raise ValueError(
                "_parallel_config: expected equal shards for SLA2, got ulysses_anything=True"
            )
        self.ranks = config.ulysses_degree
        if num_heads % self.ranks:
            raise ValueError(
                f"_parallel_config: expected ulysses_degree to divide {num_heads} heads, got"
                f" {self.ranks}"
            )
        self.group = config._ulysses_mesh.get_group()
        share = num_heads // self.ranks
        first = dist.get_rank(self.group) * share
        self.heads = slice(first, first + share)

    def gather_tokens(self, x: Tensor, text_tokens: int) -> Tensor:
        """All tokens of this rank's heads, (B, N, H / P, d): first all video tokens, then all text.

        Args:
            x: (B, n, H, d) of this rank's tokens, text last.
            text_tokens: how many of the n are text.
        """
        if not text_tokens:
            return _Exchange.apply(x, self.group, True)
        parts = x.split([x.shape[1] - text_tokens, text_tokens], dim=1)
        return torch.cat(
            [_Exchange.apply(part.contiguous(), self.group, True) for part in parts], dim=1
        )

    def scatter_tokens(self, x: Tensor, text_tokens: int) -> Tensor:
        """Inverse of gather_tokens: (B, N, H / P, d) -> (B, n, H, d). `text_tokens` counts this
        rank's.
        """
        if not text_tokens:
            return _Exchange.apply(x, self.group, False)
        text = text_tokens * self.ranks
        parts = x.split([x.shape[1] - text, text], dim=1)
        return torch.cat(
            [_Exchange.apply(part.contiguous(), self.group, False) for part in parts], dim=1
        )
