"""projected: SLA's linear attention over all blocks, through a learned projection (2509.24006)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from sla2_core.complement.linear import Linear
from sla2_core.config import SLA2Config
from sla2_core.registry import COMPLEMENTS, Heads


@COMPLEMENTS.register("projected")
class Projected(Linear):
    """proj(O_l), O_l the linear attention over all blocks, not over the complement.

    `weight` (d, d) and `bias` (d,), as of nn.Linear and shared by the heads, start at zero. Stage 2
    trains them, as SLA does.
    """

    group: ClassVar[str] = "proj"
    stages: ClassVar[tuple[str, ...]] = ("stage2",)
    everywhere = True
    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, config: SLA2Config):
        super().__init__(config)
        self.head_dim = config.head_dim
        self.make_parameters()

    def start(self) -> Mapping[str, Tensor]:
        """Zeros, as SLA starts: the operator begins as the sparse branch alone."""
        d = self.head_dim
        return {"weight": torch.zeros(d, d), "bias": torch.zeros(d)}

    @classmethod
    def flops(cls, *, n_q: int, n_k: int, t_n: int, head_dim: int) -> float:
        """Those of linear attention, and 2 N_q d^2 for the projection."""
        whole = super().flops(n_q=n_q, n_k=n_k, t_n=t_n, head_dim=head_dim)
        return whole + 2.0 * n_q * head_dim**2

    def finish(self, out: Tensor, heads: Heads = None) -> Tensor:
        """out through the projection."""
        return project(out, self.weight, self.bias)


def project(out: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """out @ weight^T + bias, (B, H, n, d) in out's dtype.

    Args:
        out: (B, H, n, d).
        weight: (d, d); None is the zero matrix. bias: (d,), or None.
    """
    if weight is None:
        out = torch.zeros_like(out)
    else:
        out = out @ weight.to(out.dtype).t()
    return out if bias is None else out + bias.to(out.dtype)
