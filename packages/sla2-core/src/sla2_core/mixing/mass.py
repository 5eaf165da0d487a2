"""mass: alpha follows the share of the pooled softmax mass that the selected blocks hold."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sla2_core.config import SLA2Config
from sla2_core.mixing.base import Mixing
from sla2_core.registry import MIXINGS, Heads, of_heads

_LIMIT = 20.0  # of the log-odds of the routed mass: sigmoid(20) is 1 to fp32 rounding


@MIXINGS.register("mass")
class Mass(Mixing):
    """alpha = sigmoid(offset + slope * logit(m)), with m the share of exp(pooled score) that the
    selected blocks hold; `offset` and `slope` are fp32 (H,).

    The exact target is the full-softmax probability that the selected blocks hold (Eq. 7). This
    alpha depends on the content, and works at any length.
    """

    reads_map = True
    offset: nn.Parameter
    slope: nn.Parameter

    def __init__(self, config: SLA2Config):
        super().__init__(config)
        self.make_parameters()

    def start(self) -> Mapping[str, Tensor]:
        """Offset 0 and slope 1, with which alpha = m."""
        return {"offset": torch.zeros(self.num_heads), "slope": torch.ones(self.num_heads)}

    def alpha(
        self,
        scores: Tensor,
        mask: Tensor | None,
        *,
        rows: Tensor | None = None,
        num_rows: int | None = None,
        heads: Heads = None,
    ) -> Tensor:
        """As Mixing.alpha: (B, H, rows). Raises ValueError without a mask."""
        if mask is None:
            raise ValueError("mask: expected the selected blocks for alpha='mass', got None")
        odds = mass_log_odds(scores, mask)
        offset, slope = (of_heads(x, heads)[:, None] for x in (self.offset, self.slope))
        return torch.sigmoid(offset + slope * odds)

    def rule(self, heads: Heads = None) -> tuple[Tensor | None, Tensor | None]:
        """As Mixing.rule: offset and slope."""
        return of_heads(self.offset, heads), of_heads(self.slope, heads)


def mass_log_odds(scores: Tensor, mask: Tensor) -> Tensor:
    """log(m / (1 - m)) within [-20, 20], m the share of exp(score) that the mask holds:
    (B, H, rows).

    Args:
        scores: (B, H, rows, T_n), -inf for blocks without a valid token.
        mask: the selected blocks, of that shape; bool, or soft in [0, 1].
    """
    if mask.dtype == torch.bool:
        inside = scores.masked_fill(~mask, -torch.inf).logsumexp(-1)
        outside = scores.masked_fill(mask, -torch.inf).logsumexp(-1)
        odds = (inside - outside).clamp(-_LIMIT, _LIMIT)
        return torch.where(torch.isnan(inside + outside), torch.nan, odds)
    weight = torch.exp(scores - scores.amax(-1, keepdim=True).detach())
    tiny = torch.finfo(scores.dtype).tiny
    inside, outside = (weight * mask).sum(-1), (weight * (1 - mask)).sum(-1)
    odds = inside.clamp_min(tiny).log() - outside.clamp_min(tiny).log()
    return odds.clamp(-_LIMIT, _LIMIT)
