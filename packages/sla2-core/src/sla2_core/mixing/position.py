"""position: alpha interpolated over the relative position of the query block, per head."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sla2_core.config import SLA2Config
from sla2_core.mixing.base import Mixing
from sla2_core.registry import MIXINGS, Heads, of_heads


@MIXINGS.register("position")
class Position(Mixing):
    """alpha = sigmoid(logit at the query block's relative position), interpolated linearly between
    knots; any length works.

    `logit` is fp32 (H, knots), or (1, knots) with shared heads. knots = 1 is one value per head;
    knots = T_m with shared heads is the paper's alpha.
    """

    settings = ("alpha_knots", "alpha_per_head")
    initial = ("alpha_init",)
    logit: nn.Parameter

    def __init__(self, config: SLA2Config):
        super().__init__(config)
        self.knots, self.at_first = config.alpha_knots, config.alpha_init
        self.copies = config.num_heads if config.alpha_per_head else 1
        self.make_parameters()

    def start(self) -> Mapping[str, Tensor]:
        """The logit of alpha_init, at every knot."""
        value = math.log(self.at_first / (1 - self.at_first))
        return {"logit": torch.full((self.copies, self.knots), value)}

    def alpha(
        self,
        scores: Tensor,
        mask: Tensor | None,
        *,
        rows: Tensor | None = None,
        num_rows: int | None = None,
        heads: Heads = None,
    ) -> Tensor:
        """As Mixing.alpha: (1, H|1, rows). Neither scores nor mask are read."""
        if rows is None:
            num_rows = scores.shape[2]
            rows = torch.arange(num_rows, device=scores.device)
        logit = of_heads(self.logit, heads)
        return torch.sigmoid(interpolate_knots(logit, rows, num_rows or 1))[None]

    def rule(self, heads: Heads = None) -> tuple[Tensor | None, Tensor | None]:
        """As Mixing.rule: the logits at the knots."""
        return of_heads(self.logit, heads), None


def interpolate_knots(values: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """values (H, knots) interpolated linearly at the relative positions rows / (num_rows - 1):
    (H, rows).

    Args:
        values: at knots that are spread evenly from the first query block to the last.
        rows: int64 (rows,), numbers of query blocks. num_rows: T_m, how many there are.
    """
    knots = values.shape[1]
    if knots == 1:
        return values.expand(-1, len(rows))
    place = rows.to(values.dtype) / max(1, num_rows - 1) * (knots - 1)
    left = place.floor().clamp(0, knots - 2)
    return torch.lerp(values[:, left.long()], values[:, left.long() + 1], place - left)
