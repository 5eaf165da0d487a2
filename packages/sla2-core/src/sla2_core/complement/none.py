"""none: the blocks that are not selected give nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from sla2_core.complement.base import Branch, Complement
from sla2_core.options import Options
from sla2_core.registry import COMPLEMENTS, Heads


@COMPLEMENTS.register("none")
class Nothing(Complement):
    """The sparse branch alone."""

    absent = True

    def states(
        self, k: Tensor, v: Tensor, valid: Tensor, options: Options, heads: Heads = None
    ) -> None:
        """None: there is nothing to sum."""
        return None

    def rows(self, q: Tensor, states: None, weights: Tensor, options: Options) -> Branch:
        """0, and empty for every token."""
        empty = torch.ones_like(q[..., :1], dtype=torch.bool)
        return Branch(torch.zeros_like(q), empty)

    def dense(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        weights: Tensor,
        options: Options,
        heads: Heads = None,
    ) -> Branch:
        """As rows()."""
        return self.rows(q, None, weights, options)

    @classmethod
    def flops(cls, *, n_q: int, n_k: int, t_n: int, head_dim: int) -> float:
        """0."""
        return 0.0
