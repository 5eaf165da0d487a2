"""topk_topp: top-k united with top-p in each row, the mask of SpargeAttention2 (2602.13515)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from sla2_core.config import SLA2Config
from sla2_core.registry import ROUTERS
from sla2_core.routing.base import Router, ranks
from sla2_core.routing.softtopk import soft_topk


@ROUTERS.register("topk_topp")
class TopKTopP(Router):
    """The k% best blocks of a row, and of its best blocks as many as together hold `top_p` of
    softmax(q k^T / sqrt(d)) over the pooled Q and K (Eq. 9); nothing is learned.

    Both are the beginning of the same descending order, so their union is the longer of the two:
    a row with a flat distribution selects more than k%, a peaked one k%. What is selected over all
    rows is therefore not set but measured (AttentionInfo.sparsity); the paper finds `top_p` for the
    sparsity that it wants: k% = 3 % with 0.2 (Wan2.1 1.3B) or 0.16 (14B) for 95 %.

    Blocks with text, which are always selected, take no part in the softmax.
    """

    options: ClassVar = {"top_p": 0.2}
    adjustable = ("top_p",)
    even = False

    def configure(self, config: SLA2Config) -> None:
        """Take over tau and `top_p`. Raises ValueError for a `top_p` outside [0, 1)."""
        super().configure(config)
        self.top_p = config.options["top_p"]
        if not 0 <= self.top_p < 1:
            raise ValueError(f"options.top_p: expected a number in [0, 1), got {self.top_p!r}")

    def lengths(self, scores: Tensor, count: Tensor) -> Tensor:
        """How many blocks each row selects, int64 (B, H, rows, 1); arguments as of hard()."""
        best = torch.sort(scores.detach(), dim=-1, descending=True, stable=True).values
        share = torch.softmax(best, -1)
        before = share.cumsum(-1) - share
        needed = (before < self.top_p) & (best > -torch.inf)
        return torch.maximum(needed.sum(-1, keepdim=True), count)

    def hard(self, scores: Tensor, count: Tensor) -> Tensor:
        """As Router.hard, `count` being the part of top-k."""
        return ranks(scores) < self.lengths(scores, count)

    def soft(self, scores: Tensor, count: Tensor) -> Tensor:
        """SoftTop-k that selects as many in each row as hard() does, so that a router that learns
        can be derived from this one.
        """
        return soft_topk(scores, self.lengths(scores, count).to(scores.dtype), self.tau)
