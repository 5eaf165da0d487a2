"""SLA2: sparse-linear attention with a learnable router, quantisation-aware training, and diffusers
integrations.
"""

# These folders register their members.
from sla2_core import complement, formats, mixing, order, routing  # noqa: F401
from sla2_core.attention import SLA2Attention, SLAAttention, build_attention
from sla2_core.block_map import BlockMap
from sla2_core.config import SLA2Config
from sla2_core.functional import (
    block_sparse_attention,
    pooled_attention,
    sla2_attention,
    sla_attention,
)
from sla2_core.routing.softtopk import soft_topk
from sla2_core.sdpa import ScaledDotProductSLA2
from sla2_core.variants import training_free

__all__ = [
    "BlockMap",
    "SLA2Attention",
    "SLA2Config",
    "SLAAttention",
    "ScaledDotProductSLA2",
    "block_sparse_attention",
    "build_attention",
    "pooled_attention",
    "sla2_attention",
    "sla_attention",
    "soft_topk",
    "training_free",
]
__version__ = "0.1.0"
