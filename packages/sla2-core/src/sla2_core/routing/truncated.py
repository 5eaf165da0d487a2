"""truncated: the scores of the published SLA code and its number of blocks, int(k% T_n)."""

from __future__ import annotations

from torch import Tensor

from sla2_core.block_map import BlockMap, Geometry
from sla2_core.registry import ROUTERS
from sla2_core.routing.base import Router, top_k_map


@ROUTERS.register("truncated")
class TruncatedRouter(Router):
    """As "heuristic", but k% of T_n blocks is cut to an integer, not rounded to the nearest one.

    Checkpoints trained with the published SLA code chose their blocks so: at k% = 0.15 and 512
    blocks it takes 76, where rounding takes 77. One block is selected at least.
    """

    def select(
        self, scores: Tensor, topk: float, geometry: Geometry, kv_lengths: Tensor | None = None
    ) -> BlockMap:
        """As Router.select, with max(1, int(k% T_n)) blocks in a row."""
        sizes = geometry._asdict()
        return top_k_map(scores, topk, **sizes, kv_lengths=kv_lengths, truncate=True)
