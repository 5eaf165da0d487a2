"""sum: O = O_s + O_l, as SLA has it (2509.24006); the complement's projection sets the share."""

from __future__ import annotations

from torch import Tensor

from sla2_core.complement.base import Branch
from sla2_core.mixing.base import Mixing
from sla2_core.registry import MIXINGS


@MIXINGS.register("sum")
class Sum(Mixing):
    """O_s + O_l; nothing is learned."""

    kernel = None

    def combine(self, sparse: Branch, rest: Branch, alpha: Tensor | None, block_q: int) -> Tensor:
        """O_s + O_l; alpha is not read."""
        return sparse.out + rest.out
