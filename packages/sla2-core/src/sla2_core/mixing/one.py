"""one: alpha is 1, the sparse branch alone; nothing is learned."""

from __future__ import annotations

import torch
from torch import Tensor

from sla2_core.mixing.base import Mixing
from sla2_core.registry import MIXINGS, Heads


@MIXINGS.register("one")
class One(Mixing):
    """alpha = 1; query blocks that select nothing still take the complement."""

    def alpha(
        self,
        scores: Tensor,
        mask: Tensor | None,
        *,
        rows: Tensor | None = None,
        num_rows: int | None = None,
        heads: Heads = None,
    ) -> Tensor:
        """1, as (1, 1, 1)."""
        return torch.ones((1, 1, 1), device=scores.device)

    def rule(self, heads: Heads = None) -> tuple[Tensor | None, Tensor | None]:
        """As Mixing.rule: none is needed."""
        return None, None
