"""global_threshold: block pairs chosen over all query blocks of a head until they hold a share of
its similarity, VMoBA's rule (2506.23858).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from sla2_core.config import SLA2Config
from sla2_core.registry import ROUTERS
from sla2_core.routing.base import Router


@ROUTERS.register("global_threshold")
class GlobalThreshold(Router):
    """The best pairs of a query block and a key block of the whole head, as many as together hold
    the share tau of its similarity (Eq. 3 and 4); nothing is learned.

    The similarity of a pair is q k^T of the block means, with the head's smallest one moved to 0
    and its largest to 1; K's mean is not taken out first, for that would move each row on its own.
    tau is K / T_n, K the blocks that k% selects. The best pairs lie above the mean, so fewer than
    k% of all pairs hold it: the sparsity is measured (AttentionInfo.sparsity). Query blocks differ
    in how many they receive; one with none takes its best.

    With `own_block` a query block always selects the key blocks that hold its own tokens, and they
    count first towards tau. The paper does not say so, its code does. They are the least that is
    selected, whatever k% is.

    What differs from VMoBA: the query is a block's mean, not a token, since a block map has a row
    for each query block. And VMoBA cuts keys in another way at every third layer, in frames,
    columns and cubes of 768 to 6,912 tokens; here every layer has the blocks and the token order
    of the configuration: runs of tokens in raster order, cubes in an order of tiles.
    """

    options: ClassVar = {"own_block": True}
    adjustable = ("own_block",)
    by_row = False
    even = False

    def configure(self, config: SLA2Config) -> None:
        """Take over the block sizes and `own_block`."""
        super().configure(config)
        self.block_q, self.block_k = config.block_q, config.block_k
        self.own_block = config.options["own_block"]

    def hard(self, scores: Tensor, count: Tensor) -> Tensor:
        """As Router.hard, of all query blocks in order: bool (B, H, T_m, T_n)."""
        live = scores != -torch.inf
        low = scores.masked_fill(~live, torch.inf).amin((-2, -1), keepdim=True)
        high = scores.amax((-2, -1), keepdim=True)
        width = torch.where(high > low, high - low, 1.0)
        similarity = ((scores - low) / width).masked_fill(~live, 0.0).double()
        tau = count / live[:, :, :1].sum(-1, keepdim=True)
        own = self._own(scores) & live
        missing = tau * similarity.sum((-2, -1), keepdim=True)
        missing = missing - (similarity * own).sum((-2, -1), keepdim=True)
        others = similarity.masked_fill(own, 0.0).flatten(-2)
        best, order = torch.sort(others, dim=-1, descending=True, stable=True)
        needed = best.cumsum(-1) - best < missing[..., 0]
        chosen = torch.zeros_like(needed).scatter(-1, order, needed).view_as(live)
        chosen = (chosen | own) & live
        first = torch.arange(scores.shape[-1], device=scores.device)
        first = first == scores.argmax(-1, keepdim=True)
        return torch.where(chosen.any(-1, keepdim=True), chosen, first)

    def _own(self, scores: Tensor) -> Tensor:
        """Which key blocks hold tokens of a query block: bool (T_m, T_n), all False without
        `own_block`.
        """
        t_m, t_n = scores.shape[-2:]
        start = torch.arange(t_m, device=scores.device)[:, None] * self.block_q
        first = torch.arange(t_n, device=scores.device) * self.block_k
        overlap = (first < start + self.block_q) & (first + self.block_k > start)
        return overlap & self.own_block
