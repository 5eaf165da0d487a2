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
    """alpha = sigmoid(offset + slope * logit(m)), m the routed share of exp(pooled score); `offset`
    and `slope` are (H,). Eq. 7 gives the exact target: alpha is the full-softmax probability that
    the selected blocks hold. This follows the content, at any length.
    """

    reads_map = True
    offset: nn.Parameter
    slope: nn.Parameter

    def __init__(self, config: SLA2Config):
        super().__init__(config)
        self.make_parameters()

    def start(self) -> Mapping[str, Tensor]:
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
        if mask is None:
            raise ValueError("mask: expected the selected blocks for alpha='mass', got None")
        odds = mass_log_odds(scores, mask)
        offset, slope = (of_heads(x, heads)[:, None] for x in (self.offset, self.slope))
        return torch.sigmoid(offset + slope * odds)


def mass_log_odds(scores: Tensor, mask: Tensor) -> Tensor:
    """log(m / (1 - m)), m the share of exp(pooled score) that `mask` holds: (B, H, rows), within
    [-20, 20].

    `mask` is bool, or a soft mask in [0, 1], of the shape of `scores` (B, H, rows, T_n).
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
