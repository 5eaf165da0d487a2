"""How much of the possible gain a router has learnt: routed mass and error against the heuristic
router and the oracle.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sla2_core.attend import Parts
from sla2_core.config import SLA2Config
from sla2_core.training.capture import Captured
from sla2_core.training.stage1.soft import calls


@torch.no_grad()
def layer_report(
    layer: int,
    captured: Captured,
    config: SLA2Config,
    members: Mapping[str, Any],
    topk: float,
    rows: Tensor,
    max_scores: int,
) -> dict[str, Any]:
    """One layer at one k%, on the query blocks `rows` of one captured call.

    The oracle selects the top-k of the true block masses (full-softmax probability, mean over the
    query block). All three maps run through the hard operator with the learned alpha.

    Args:
        layer: its number. captured: the call, on the device to compute on.
        config: the layer's.
        members: router, complement and mixing by these names, as they work at this k%.
        topk: k% in (0, 1].
        rows: int64 (rows,), the query blocks, ascending.
        max_scores: elements of the largest score matrix.

    Returns:
        {"layer", "topk", "mass", "error", "gain"}. mass and error hold one number for each of
        "learned", "heuristic" and "oracle": the mean full-softmax probability of the selected
        blocks, and the squared error of the hard operator relative to full attention's mean square.
        gain is the share of the oracle's advantage in mass over the heuristic router that the
        learned one has; None where there is no advantage.
    """
    router, parts = members["router"], Parts(members["complement"], members["mixing"])
    mass = dict.fromkeys(("learned", "heuristic", "oracle"), 0.0)
    error = dict(mass)
    norm = 0.0
    for call, share in calls(captured, config, 1, max_scores):
        for row in rows.split(1):
            scores = call.scores(router, row)
            true = call.block_masses(row)
            pooled = call.pooled_q[:, :, row] @ call.pooled_k.transpose(-1, -2)
            part = share / len(rows)
            learned = call.hard_mask(router, scores, topk, row)
            # The others choose as many blocks in each row as the learned router does.
            count = (learned & ~call.forced).sum(-1, keepdim=True)
            masks = {
                "learned": learned,
                "heuristic": call.top_mask(pooled, count),
                "oracle": call.top_mask(true, count),
            }
            for name, mask in masks.items():
                out, full = call.attend(row, scores, mask, parts)
                mass[name] += float((true * mask).sum(-1).mean()) * part
                error[name] += float((out - full).square().mean()) * part
            norm += float(full.square().mean()) * part
    room = mass["oracle"] - mass["heuristic"]
    return {
        "layer": layer,
        "topk": topk,
        "mass": mass,
        "error": {name: value / norm for name, value in error.items()},
        "gain": (mass["learned"] - mass["heuristic"]) / room if room > 1e-6 else None,
    }
