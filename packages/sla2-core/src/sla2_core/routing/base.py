"""What a router is: scores of every pair of blocks, a hard block map for the operator, and a soft
one for stage 1.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from sla2_core.backends import kernels
from sla2_core.block_map import BlockMap, Geometry, Rows, num_blocks
from sla2_core.checks import without_autocast
from sla2_core.config import SLA2Config
from sla2_core.registry import Heads, Member
from sla2_core.routing.softtopk import soft_topk


def blocks_to_select(topk: float, t_n: int, truncate: bool = False) -> int:
    """K = max(1, round(k% * T_n)) for k% = `topk`; ties to even, as Python rounds. With `truncate`
    int() in the place of round().
    """
    return max(1, int(topk * t_n) if truncate else round(topk * t_n))


class Router(Member):
    """The k% best key blocks of every row, by scores of pooled Q and K.

    A member gives `scores`, or `weights` where its scores are a projection of each (then the CUDA
    kernel computes them), and may choose blocks in another way by `hard` and `soft`.

    Attributes:
        projects: scores() is (q W_q)(k W_k)^T / sqrt(d) with W_q, W_k = weights(), and select() is
            the top-k of this class.
        by_row: select() and hard() choose for each query block by itself. Where they do not, hard()
            is given all query blocks of a head, and K's mean stays in the pooled K.
        even: every row selects as many blocks, the best of it. Where it does not, select() is what
            hard() says.
    """

    group: ClassVar[str] = "router"
    stages: ClassVar[tuple[str, ...]] = ("stage1",)
    projects: ClassVar[bool] = False
    by_row: ClassVar[bool] = True
    even: ClassVar[bool] = True

    def __init__(self, config: SLA2Config):
        super().__init__()
        self.head_dim, self.num_heads = config.head_dim, config.num_heads
        self.configure(config)

    def configure(self, config: SLA2Config) -> None:
        """Take over tau, the temperature of SoftTop-k."""
        self.tau = config.tau

    def weights(self, heads: Heads = None) -> tuple[Tensor, Tensor] | None:
        """W_q and W_k, each fp32 (1|H, d, d), of some heads; None is the identity."""
        return None

    def scores(self, pooled_q: Tensor, pooled_k: Tensor, heads: Heads = None) -> Tensor:
        """P_c = (q W_q)(k W_k)^T / sqrt(d) per head (Eq. 16).

        Args:
            pooled_q: block means (B, H, rows, d) of Q, fp32 or fp64. pooled_k: (B, H, T_n, d) of K.
            heads: which of the module's heads these are; None means all.

        Returns:
            (B, H, rows, T_n) in fp32 (fp64 for fp64 inputs to an fp64 module).
        """
        with without_autocast(pooled_q):
            weights = self.weights(heads)
            if weights is not None:
                weight_q, weight_k = weights
                pooled_q = pooled_q.to(weight_q.dtype) @ weight_q
                pooled_k = pooled_k.to(weight_k.dtype) @ weight_k
            return (pooled_q @ pooled_k.transpose(-1, -2)) * self.head_dim**-0.5

    def forward(self, pooled_q: Tensor, pooled_k: Tensor, heads: Heads = None) -> Tensor:
        """As scores()."""
        return self.scores(pooled_q, pooled_k, heads)

    def select(
        self, scores: Tensor, topk: float, geometry: Geometry, kv_lengths: Tensor | None = None
    ) -> BlockMap:
        """The hard block map of scores (B, H, T_m, T_n): by top_k_map, or by hard().

        Args:
            topk: k% in (0, 1]. geometry: sizes of the map.
            kv_lengths: int64 (B,), valid keys, or None.
        """
        if self.even:
            return top_k_map(scores, topk, **geometry._asdict(), kv_lengths=kv_lengths)
        scores, count = choices(scores.detach(), topk, geometry.block_k, kv_lengths)
        return BlockMap._of_mask(self.hard(scores, count), geometry)

    def hard(self, scores: Tensor, count: Tensor) -> Tensor:
        """select() as a mask, for stage 1: bool (B, H, rows, T_n).

        Args:
            scores: (B, H, rows, T_n), -inf where a block cannot be chosen.
            count: how many each row selects, (B|1, 1, 1, 1).
        """
        return ranks(scores) < count

    def soft(self, scores: Tensor, count: Tensor) -> Tensor:
        """select() made differentiable, for stage 1: SoftTop-k (Eq. 17), arguments as of hard()."""
        return soft_topk(scores, count.to(scores.dtype), self.tau)


def ranks(scores: Tensor) -> Tensor:
    """The place of each entry in its row from the largest down, int64 of scores' shape; ties to the
    lower index, NaN first.
    """
    return torch.argsort(scores, dim=-1, descending=True, stable=True).argsort(-1)


def choices(
    scores: Tensor,
    topk: float,
    block_k: int,
    kv_lengths: Tensor | None = None,
    truncate: bool = False,
) -> tuple[Tensor, Tensor]:
    """What each item may choose from, and how many blocks a row's top-k takes.

    Args:
        scores: (B, H, rows, T_n). topk: k% in (0, 1]. block_k: tokens in a key block.
        kv_lengths: int64 (B,), valid keys, or None.
        truncate: cut k% * T_n to an integer instead of rounding it.

    Returns:
        the scores, -inf for blocks without a valid key, and K = max(1, round(k% * T_n)), T_n
        counted from the item's own length: int64 (B|1, 1, 1, 1).
    """
    t_n = scores.shape[-1]
    if kv_lengths is None:
        most = blocks_to_select(topk, t_n, truncate)
        count = torch.full((1, 1, 1, 1), most, device=scores.device)
        return scores, count
    blocks = num_blocks(kv_lengths, block_k)
    dead = torch.arange(t_n, device=scores.device) >= blocks[:, None]
    # blocks_to_select for each item; ties to even, as Python's round
    count = topk * blocks.double()
    count = (count.floor() if truncate else count.round()).clamp_min(1).long()
    return scores.masked_fill(dead[:, None, None], -torch.inf), count[:, None, None, None]


def top_k_map(
    scores: Tensor,
    topk: float,
    *,
    block_q: int,
    block_k: int,
    n_q: int,
    n_k: int,
    kv_lengths: Tensor | None = None,
    truncate: bool = False,
) -> BlockMap:
    """The K best key blocks of every row, ties to the lower index, indices ascending; no gradient.

    Args:
        scores: (B, H, T_m, T_n) fp32 or fp64.
        topk: k% in (0, 1]; K = max(1, round(k% * T_n)), T_n counted from the item's own kv_lengths.
        block_q, block_k: tokens in a query block and in a key block. n_q, n_k: query and key
            tokens.
        kv_lengths: int64 (B,), valid keys, or None. Blocks without a valid key are not chosen.
        truncate: cut k% * T_n to an integer instead of rounding it.
    """
    scores = scores.detach()
    t_n = scores.shape[-1]
    most = blocks_to_select(topk, t_n, truncate)
    if kv_lengths is None:
        indices = _best(scores, most)
        counts = torch.full(scores.shape[:3], most, dtype=torch.int32, device=scores.device)
    else:
        scores, count = choices(scores, topk, block_k, kv_lengths, truncate)
        # Of the best `most` blocks the item's own `count` stay; the places of the others go last.
        best = _best(scores, most).long()
        order = torch.sort(scores.gather(-1, best), dim=-1, descending=True, stable=True).indices
        kept = (torch.arange(most, device=scores.device) < count).expand_as(order)
        kept = torch.zeros_like(kept).scatter(-1, order, kept)
        best = torch.where(kept, best, t_n).sort(-1).values
        indices = torch.where(best == t_n, -1, best)
        counts = count.to(torch.int32)[..., 0].expand(scores.shape[:3]).contiguous()
    rows = Rows(indices.to(torch.int32).contiguous(), counts)
    sizes = dict(block_q=block_q, block_k=block_k, n_q=n_q, n_k=n_k)
    return BlockMap._trusted(rows, **sizes, uniform=kv_lengths is None)


def _best(scores: Tensor, count: int) -> Tensor:
    """Ascending indices of the `count` best of each row, ties to the lower index."""
    if scores.device.type == "cpu":
        return kernels.top_k(scores, count)
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return order[..., :count].sort(-1).values
