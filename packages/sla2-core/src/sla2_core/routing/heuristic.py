"""heuristic: SLA's router, the scores of the pooled Q and K as they are; nothing is learned."""

from __future__ import annotations

from sla2_core.registry import ROUTERS
from sla2_core.routing.base import Router


@ROUTERS.register("heuristic")
class HeuristicRouter(Router):
    """P_c = q k^T / sqrt(d) per head, in fp32 (arXiv 2509.24006)."""

    projects = True
