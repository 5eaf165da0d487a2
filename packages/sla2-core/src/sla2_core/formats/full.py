"""full: nothing is rounded; the sparse branch computes in the input's dtype."""

from __future__ import annotations

from torch import Tensor

from sla2_core.formats.base import Format
from sla2_core.registry import FORMATS


@FORMATS.register("full")
class Full(Format):
    """The input's own precision, with fp32 accumulation."""

    low = False
    cpu = ("none", "none")
    cuda = "full"

    def round_blocks(self, x: Tensor, block: int) -> Tensor:
        """x itself."""
        return x

    def round_values(self, v: Tensor, block_k: int) -> Tensor:
        """v itself."""
        return v

    def round_probabilities(self, p: Tensor, block_k: int) -> Tensor:
        """p itself."""
        return p
