"""joint: both branches in one softmax, by their log-sum-exp; nothing is learned."""

from __future__ import annotations

import torch
from torch import Tensor

from sla2_core.complement.base import Branch
from sla2_core.mixing.base import Mixing
from sla2_core.registry import MIXINGS


@MIXINGS.register("joint")
class Joint(Mixing):
    """O = (e^{L_s} O_s + e^{L_r} O_r) / (e^{L_s} + e^{L_r}), with L_s and L_r the log-sum-exp of
    the selected scores and of the complement's logits: what one softmax over both gives.
    """

    kernel = "pooled"
    joins = True

    def combine(self, sparse: Branch, rest: Branch, alpha: Tensor | None, block_q: int) -> Tensor:
        """As the class says; alpha is not read. A token to which one branch gives nothing has the
        other alone. Raises ValueError for a branch without a log-sum-exp.
        """
        if sparse.lse is None or rest.lse is None:
            raise ValueError("complement: expected one that joins the softmax for alpha='joint'")
        share = torch.sigmoid(sparse.lse - rest.lse)[..., None]
        share = torch.where(rest.empty, 1.0, torch.where(sparse.empty, 0.0, share))
        return share * sparse.out + (1 - share) * rest.out
