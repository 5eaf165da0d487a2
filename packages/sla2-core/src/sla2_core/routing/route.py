"""The one routing: from Q and K to scores and a block map, for every caller and backend."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sla2_core.backends.base import Backend
from sla2_core.backends.pooling import smooth_pooled
from sla2_core.block_map import BlockMap, Geometry, Rows
from sla2_core.options import Options
from sla2_core.registry import Heads
from sla2_core.routing.base import Router


class Routed(NamedTuple):
    """Router scores (B, H, T_m, T_n), -inf for blocks without a valid token, and the block map."""

    scores: Tensor
    block_map: BlockMap


def route(
    router: Router,
    q: Tensor,
    k: Tensor,
    topk: float,
    *,
    options: Options,
    backend: Backend,
    lengths: Tensor | None = None,
    text_tokens: int = 0,
    heads: Heads = None,
) -> Routed:
    """Choose the key blocks of each query block: scores of pooled Q and K, then the top k%.

    Args:
        q: (B, H, N_q, d), the queries that are routed. k: (B, H, N_k, d), not smoothed.
        topk: k% in (0, 1], of the key blocks without text.
        options: block sizes. backend: pools, and routes where it has a kernel for that.
        lengths: int64 (B,), valid keys of each item, or None; with text the padding is at its end.
        text_tokens: so many keys at the end are text. A key block with any text is always selected.
        heads: which of the router's heads these are; None means all.
    """
    geometry = Geometry(options.block_q, options.block_k, q.shape[2], k.shape[2])
    pooled_q, pooled_k = backend.pool(q, k, lengths, options)
    if router.by_row:  # K's mean shifts a row's scores alike: taking it out keeps them small
        pooled_k = smooth_pooled(pooled_k, k.shape[2], options.block_k, lengths)
    t_n = pooled_k.shape[2]
    routable = (k.shape[2] - text_tokens) // options.block_k if text_tokens else t_n
    if router.projects:
        weights = router.weights(heads)
        found = backend.route(pooled_q, pooled_k, weights, lengths, geometry, topk, routable)
        if found is not None:
            scores, indices, counts = found
            return Routed(scores, BlockMap._trusted(Rows(indices, counts), **geometry._asdict()))
    scores = router.scores(pooled_q, pooled_k, heads)
    start = torch.arange(t_n, device=q.device) * options.block_k
    if not text_tokens:
        block_map = router.select(scores, topk, geometry, lengths)
        if lengths is not None:
            scores = scores.masked_fill((start >= lengths[:, None])[:, None, None], -torch.inf)
        return Routed(scores, block_map)
    if lengths is not None:
        scores = scores.masked_fill((start >= lengths[:, None])[:, None, None], -torch.inf)
    text = torch.arange(routable, t_n, dtype=torch.int32, device=q.device)
    if lengths is not None:
        text = torch.where(start[routable:] < lengths[:, None], text, -1)[:, None, None]
    text = text.expand(*scores.shape[:3], -1)
    counts = (text >= 0).sum(-1, dtype=torch.int32)
    if routable:
        video = geometry._replace(n_k=routable * options.block_k)
        chosen = router.select(scores[..., :routable], topk, video)
        text, counts = _append(chosen, text), counts + chosen.counts
    rows = Rows(text.contiguous(), counts)
    return Routed(scores, BlockMap._trusted(rows, **geometry._asdict()))


def _append(chosen: BlockMap, text: Tensor) -> Tensor:
    """The chosen indices and then the text's, without the gaps that short rows leave between."""
    joined = torch.cat([chosen.indices, text], -1)
    if chosen.uniform:
        return joined
    last = torch.iinfo(torch.int32).max
    joined = torch.where(joined < 0, last, joined).sort(-1).values
    return torch.where(joined == last, -1, joined)
