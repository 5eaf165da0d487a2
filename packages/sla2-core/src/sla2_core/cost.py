"""FLOPs and bytes of an attention layer, by formula; a multiply-add counts as two."""

from __future__ import annotations

from dataclasses import dataclass

from sla2_core.block_map import BlockMap, Geometry, num_blocks
from sla2_core.config import SLA2Config
from sla2_core.registry import COMPLEMENTS


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one forward pass of one attention layer costs, for one batch item.

    Attributes:
        full_flops: of full attention. sparse_flops, linear_flops, router_flops: of the sparse
            branch, of the complement (also of one that is not linear attention) and of the router.
        bytes: what must move between device memory and the processor.
        sparsity: 1 - k%.
    """

    full_flops: float
    sparse_flops: float
    linear_flops: float
    router_flops: float
    bytes: float
    sparsity: float

    @property
    def flops(self) -> float:
        """Of all parts."""
        return self.sparse_flops + self.linear_flops + self.router_flops


def sla2_cost(
    *,
    n_q: int,
    n_k: int,
    num_heads: int,
    head_dim: int,
    topk: float,
    block_q: int = 128,
    block_k: int = 64,
    bytes_per_element: int = 2,
    complement: str = "linear",
) -> Cost:
    """The cost of a layer at its nominal k%; a multiply-add counts as two.

    FLOPs: full attention 4 N_q N_k d H; the sparse branch k% of that; the router 2 T_m T_n d H. The
    linear branch is 2 N_k d^2 H for h_j and 2 N_q d^2 H for phi(Q) H_i; the masked sum over blocks,
    2 T_m T_n d^2 H as a GEMM, is not in the paper's count and not in this one. The pooled
    complement is 4 N_q T_n d H. Bytes: Q, K, V read and O written once; pooled Q and K, and what
    the complement makes of each block (h_j and H_i; the means of V), written and read in fp32.

    Args:
        n_q, n_k: query and key tokens. num_heads, head_dim: of the layer.
        topk: k% in (0, 1]. block_q, block_k: tokens in a query block and in a key block.
        bytes_per_element: of Q, K, V and O.
        complement: a member of complement/, which counts its own FLOPs and bytes.

    Raises:
        ValueError: a size below 1, a k% outside (0, 1], or an unknown complement.
    """
    for name, value in (
        ("n_q", n_q),
        ("n_k", n_k),
        ("num_heads", num_heads),
        ("head_dim", head_dim),
        ("block_q", block_q),
        ("block_k", block_k),
    ):
        if value < 1:
            raise ValueError(f"{name}: expected an integer >= 1, got {value}")
    if not 0 < topk <= 1:
        raise ValueError(f"topk: expected a number in (0, 1], got {topk}")
    t_m, t_n = num_blocks(n_q, block_q), num_blocks(n_k, block_k)
    rest = COMPLEMENTS.get(complement)
    rest_flops = rest.flops(n_q=n_q, n_k=n_k, t_n=t_n, head_dim=head_dim)
    rest_flops += rest.block_flops(t_m=t_m, t_n=t_n, head_dim=head_dim)
    full = 4.0 * n_q * n_k * head_dim * num_heads
    tokens = bytes_per_element * (2 * n_q + 2 * n_k) * head_dim * num_heads
    summaries = rest.bytes(t_m=t_m, t_n=t_n, head_dim=head_dim) * num_heads
    pooled = 4 * 2 * (t_m + t_n) * head_dim * num_heads
    return Cost(
        full_flops=full,
        sparse_flops=topk * full,
        linear_flops=num_heads * rest_flops,
        router_flops=2.0 * t_m * t_n * head_dim * num_heads,
        bytes=float(tokens + summaries + pooled),
        sparsity=1.0 - topk,
    )


def measured_share(block_map: BlockMap, config: SLA2Config, text_tokens: int = 0) -> float:
    """FLOPs of an attention call as a share of full attention's, by sla2_cost at the k% that its
    block map really has: what a router that chooses adaptively costs.

    Args:
        block_map: of the call's routed queries. config: the layer's.
        text_tokens: so many further queries see every key, as text does beside a video.
    """
    sizes = {name: getattr(block_map, name) for name in Geometry._fields}
    return share_at(1 - block_map.sparsity, Geometry(**sizes), config, text_tokens)


def share_at(topk: float, geometry: Geometry, config: SLA2Config, text_tokens: int = 0) -> float:
    """As measured_share, of calls of this geometry whose maps hold a share `topk` of the block
    pairs.
    """
    cost = sla2_cost(
        **geometry._asdict(),
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        topk=topk,
        complement=config.complement,
    )
    dense = cost.full_flops * text_tokens / geometry.n_q
    return (cost.flops + dense) / (cost.full_flops + dense)
