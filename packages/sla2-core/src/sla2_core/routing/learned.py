"""learned: SLA2's router, a trained projection of the pooled Q and of the pooled K (Eq. 16)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sla2_core.config import SLA2Config
from sla2_core.registry import ROUTERS, Heads, of_heads
from sla2_core.routing.base import Router


@ROUTERS.register("learned")
class LearnedRouter(Router):
    """P_c = (q W_q)(k W_k)^T / sqrt(d) per head, in fp32.

    `weight_q` and `weight_k` are fp32 (1, d, d), or (H, d, d) with `per_head_router`. They start as
    the identity, which is SLA's heuristic router. They require a gradient in stage 1 alone, for a
    hard top-k gives them none.
    """

    settings = ("per_head_router",)
    projects = True
    weight_q: nn.Parameter
    weight_k: nn.Parameter

    def __init__(self, config: SLA2Config):
        super().__init__(config)
        self.copies = config.num_heads if config.per_head_router else 1
        self.make_parameters()

    def start(self) -> Mapping[str, Tensor]:
        """Identity matrices."""
        eye = torch.eye(self.head_dim).repeat(self.copies, 1, 1)
        return {"weight_q": eye, "weight_k": eye.clone()}

    def weights(self, heads: Heads = None) -> tuple[Tensor, Tensor]:
        """W_q and W_k, each fp32 (1|H, d, d), of some heads."""
        return of_heads(self.weight_q, heads), of_heads(self.weight_k, heads)
