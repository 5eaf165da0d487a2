"""The axis of routers: which blocks each query block attends to exactly, one member a file.

Importing this folder registers them. `route` is the one routing of the package.
"""

from sla2_core.routing import global_threshold, heuristic, learned, topk_topp, truncated
from sla2_core.routing.base import Router, blocks_to_select, top_k_map
from sla2_core.routing.route import Routed, route
from sla2_core.routing.softtopk import soft_topk

__all__ = [
    "Routed",
    "Router",
    "blocks_to_select",
    "global_threshold",
    "heuristic",
    "learned",
    "route",
    "soft_topk",
    "top_k_map",
    "topk_topp",
    "truncated",
]
