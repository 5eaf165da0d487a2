"""What mixing is: how the sparse branch and the complement become one output."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from sla2_core.complement.base import Branch
from sla2_core.config import SLA2Config
from sla2_core.registry import Heads, Member


class Mixing(Member):
    """O = alpha O_s + (1 - alpha) O_l, with one alpha for each query block and head.

    A member gives `alpha`; one that mixes in another way gives `combine`.

    Attributes:
        kernel: the kernel of a complement that has combine() built in, as Complement.kernel names
            it; None where no kernel has it. combine() of this class is in "linear".
        reads_map: alpha() reads the block map, and so gives the router's scores a gradient.
        joins: combine() reads both branches' log-sum-exp, which then needs a gradient. It goes with
            complements that give one.
    """

    group: ClassVar[str] = "alpha"
    per_topk: ClassVar[bool] = True
    kernel: ClassVar[str | None] = "linear"
    reads_map: ClassVar[bool] = False
    joins: ClassVar[bool] = False

    def __init__(self, config: SLA2Config):
        super().__init__()
        self.num_heads = config.num_heads

    def alpha(
        self,
        scores: Tensor,
        mask: Tensor | None,
        *,
        rows: Tensor | None = None,
        num_rows: int | None = None,
        heads: Heads = None,
    ) -> Tensor | None:
        """alpha (B|1, H|1, rows) in [0, 1], fp32; None for a member that has no alpha.

        Args:
            scores: router scores (B, H, rows, T_n), -inf for blocks without a valid token.
            mask: the selected blocks, bool or soft, of the same shape; None unless reads_map.
            rows: int64 (rows,), which query blocks these are; None means all, in order.
            num_rows: T_m, where `rows` is given.
            heads: which of the module's heads these are; None means all.
        """
        return None

    def rule(self, heads: Heads = None) -> tuple[Tensor | None, Tensor | None] | None:
        """How a routing kernel makes alpha() by itself, where it is one of the forms that they
        know; None otherwise. A subclass with another alpha() has another rule().

        Returns:
            (offset, slope), fp32: (H,) both for sigmoid(offset + slope * logit(m)), m the share of
            exp(score) that the selected blocks hold; (H|1, knots) and None for sigmoid(offset at
            the query block's relative position); None both for alpha = 1.
        """
        return None

    def forward(
        self,
        scores: Tensor,
        mask: Tensor | None,
        *,
        rows: Tensor | None = None,
        num_rows: int | None = None,
        heads: Heads = None,
    ) -> Tensor | None:
        """As alpha()."""
        return self.alpha(scores, mask, rows=rows, num_rows=num_rows, heads=heads)

    def combine(self, sparse: Branch, rest: Branch, alpha: Tensor | None, block_q: int) -> Tensor:
        """The output (B, H, n, d) of n query tokens in blocks of `block_q`.

        For tokens that select nothing alpha counts as 0, for tokens without a complement as 1.

        Args:
            alpha: (B|1, H|1, T_m|1), or None for a member that has none.

        Raises:
            ValueError: None for a member that needs an alpha.
        """
        if alpha is None:
            raise ValueError(f"alpha: expected one value per query block from {self.name!r}")
        return mix(sparse, rest, alpha, block_q)


def mix(sparse: Branch, rest: Branch, alpha: Tensor, block_q: int) -> Tensor:
    """alpha O_s + (1 - alpha) O_l (Eq. 13), alpha (B|1, H|1, T_m|1); see Mixing.combine."""
    n = sparse.out.shape[2]
    if alpha.shape[2] == 1:
        per_token = alpha[..., None]
    else:
        per_token = alpha.repeat_interleave(block_q, 2)[:, :, :n, None]
    per_token = torch.where(sparse.empty, 0.0, per_token.to(sparse.out.dtype))
    per_token = torch.where(rest.empty, 1.0, per_token)
    return per_token * sparse.out + (1 - per_token) * rest.out
