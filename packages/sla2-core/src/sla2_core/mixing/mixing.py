"""alpha, the learnable ratio of the two branches: one value per query block and head, stored as
logits in fp32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sla2_core.config import SLA2Config
from sla2_core.routing.router import Float32Module

_LIMIT = 20.0  # of the log-odds of the routed mass: sigmoid(20) is 1 to fp32 rounding


def interpolate_knots(values: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Linear interpolation of (H, knots) at the relative positions rows / (num_rows - 1): (H,
    len(rows)).
    """
    knots = values.shape[1]
    if knots == 1:
        return values.expand(-1, len(rows))
    place = rows.to(values.dtype) / max(1, num_rows - 1) * (knots - 1)
    left = place.floor().clamp(0, knots - 2)
    return torch.lerp(values[:, left.long()], values[:, left.long() + 1], place - left)


def mass_log_odds(scores: Tensor, mask: Tensor) -> Tensor:
    """log(m / (1 - m)), m the share of exp(pooled score) that `mask` holds: (B, H, rows), within
    [-20, 20].

    `mask` is bool, or a soft mask in [0, 1], of the shape of `scores` (B, H, rows, T_n).
    """
    if mask.dtype == torch.bool:
        inside = scores.masked_fill(~mask, -torch.inf).logsumexp(-1)
        outside = scores.masked_fill(mask, -torch.inf).logsumexp(-1)
        return torch.where(
            torch.isnan(inside + outside), torch.nan, (inside - outside).clamp(-_LIMIT, _LIMIT)
        )
    weight = torch.exp(scores - scores.amax(-1, keepdim=True).detach())
    tiny = torch.finfo(scores.dtype).tiny
    inside, outside = (weight * mask).sum(-1), (weight * (1 - mask)).sum(-1)
    return (inside.clamp_min(tiny).log() - outside.clamp_min(tiny).log()).clamp(-_LIMIT, _LIMIT)


class Mixing(Float32Module):
    """alpha of each query block, of kind `config.alpha`.

    position: `logit` (H, knots), or (1, knots) with shared heads; interpolated over the relative
    position of the block. mass: `offset` and `slope`, each (H,); alpha = sigmoid(offset + slope *
    logit(m)), m the routed share of the pooled mass. one: no parameters; alpha = 1.
    """

    def __init__(self, config: SLA2Config):
        super().__init__()
        self.kind = config.alpha
        if self.kind == "position":
            heads = config.num_heads if config.alpha_per_head else 1
            start = math.log(config.alpha_init / (1 - config.alpha_init))
            self.logit = nn.Parameter(torch.full((heads, config.alpha_knots), start))
        elif self.kind == "mass":
            self.offset = nn.Parameter(torch.zeros(config.num_heads))
            self.slope = nn.Parameter(torch.ones(config.num_heads))

    def forward(
        self,
        scores: Tensor,
        mask: Tensor | None,
        *,
        rows: Tensor | None = None,
        num_rows: int | None = None,
    ) -> Tensor:
        """alpha (B|1, H|1, rows) in [0, 1], fp32.

        Args:
            scores: router scores (B, H, rows, T_n).
            mask: the selected blocks, bool or soft, of the same shape; only kind "mass" reads it.
            rows: int64 (rows,), which query blocks these are; None means all, in order.
            num_rows: T_m, where `rows` is given.
        """
        if self.kind == "one":
            return torch.ones((1, 1, 1), device=scores.device)
        if self.kind == "position":
            if rows is None:
                num_rows = scores.shape[2]
                rows = torch.arange(num_rows, device=scores.device)
            return torch.sigmoid(interpolate_knots(self.logit, rows, num_rows))[None]
        odds = mass_log_odds(scores, mask)
        return torch.sigmoid(self.offset[:, None] + self.slope[:, None] * odds)
