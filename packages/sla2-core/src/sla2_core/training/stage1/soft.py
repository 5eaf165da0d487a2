"""What stage 1 computes on one captured call: the soft operator beside full attention, and true
block masses, by rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sla2_core.attend import Parts, soft_attend
from sla2_core.backends.pooling import pool, smooth_keys, smooth_pooled
from sla2_core.block_map import num_blocks
from sla2_core.config import SLA2Config
from sla2_core.options import Options
from sla2_core.routing import Router, blocks_to_select
from sla2_core.training.capture import Captured


class Call:
    """A captured call prepared for work on a few query blocks of a few heads: K smoothed, Q and K
    pooled.

    Text tokens stand last. Their queries are dense in the model, so only video queries count here;
    key blocks that hold any text are always selected.

    Args:
        captured: the call. config: the layer's. chunk: which of the captured heads to take.

    Attributes:
        q: (B, H, N_q, d), video tokens alone. k, v: (B, H, N_k, d), K smoothed; raw_k is not.
        lengths: int64 (B,), valid keys, or None.
        pooled_q, pooled_k: block means (B, H, T_m, d) and (B, H, T_n, d).
        forced: bool (T_n,), blocks with text. dead: bool (B|1, 1, 1, T_n), blocks without a valid
            key.
    """

    def __init__(self, captured: Captured, config: SLA2Config, chunk: slice):
        self.config, self.options = config, Options.of(config).unsmoothed
        self.heads = list(captured.heads)[chunk]
        n_video = captured.q.shape[2] - captured.text_tokens
        q, k, v = captured.q[:, chunk, :n_video], captured.k[:, chunk], captured.v[:, chunk]
        self.lengths = None
        if captured.kv_lengths is not None:
            self.lengths = torch.tensor(captured.kv_lengths, device=q.device)
        self.q, self.raw_k, self.v = q, k, v
        self.k = smooth_keys(k, self.lengths) if config.smooth_k else k
        self.pooled_q = pool(q, config.block_q)
        self.pooled_k = pool(self.k, config.block_k, self.lengths)
        if not config.smooth_k:  # the router sees means about 0 all the same, as in the operator
            n_k = k.shape[2]
            self.pooled_k = smooth_pooled(self.pooled_k, n_k, config.block_k, self.lengths)
        self.t_m, self.t_n = self.pooled_q.shape[2], self.pooled_k.shape[2]
        start = torch.arange(self.t_n, device=q.device) * config.block_k
        self.forced = torch.zeros_like(start, dtype=torch.bool)
        if captured.text_tokens:
            self.forced = start + config.block_k > n_video
        self.dead = torch.zeros((1, 1, 1, self.t_n), dtype=torch.bool, device=q.device)
        if self.lengths is not None:
            self.dead = (start >= self.lengths[:, None])[:, None, None, :]

    def tokens(self, rows: Tensor) -> Tensor:
        """The query tokens (B, H, n, d) of the query blocks `rows`, int64 (rows,), ascending."""
        block, n = self.config.block_q, self.q.shape[2]
        place = (rows[:, None] * block + torch.arange(block, device=rows.device)).flatten()
        return self.q[:, :, place[place < n]]

    def count(self, topk: float) -> Tensor:
        """How many blocks a row selects at k% = `topk`, beside the forced ones: int64
        (B|1, 1, 1, 1).
        """
        routable = (~(self.forced | self.dead)).sum(-1, keepdim=True)
        counts = [blocks_to_select(topk, int(n)) for n in routable.flatten()]
        return torch.tensor(counts, device=self.q.device).view(routable.shape)

    def scores(self, router: Router, rows: Tensor) -> Tensor:
        """Router scores (B, H, rows, T_n); -inf for blocks of padding."""
        raw = router.scores(self.pooled_q[:, :, rows], self.pooled_k, self.heads)
        return raw.masked_fill(self.dead, -torch.inf)

    def soft_mask(self, router: Router, scores: Tensor, topk: float) -> Tensor:
        """SoftTop-k (Eq. 17) of scores (B, H, rows, T_n): in [0, 1], 1 for the forced blocks, of
        their shape.
        """
        soft = router.soft(scores.masked_fill(self.forced, -torch.inf), self.count(topk))
        return torch.where(self.forced & ~self.dead, 1.0, soft)

    def hard_mask(
        self, router: Router, ranking: Tensor, topk: float, rows: Tensor | None = None
    ) -> Tensor:
        """bool (B, H, rows, T_n): the blocks that the router selects by `ranking`, scores of that
        shape, and the forced ones. `rows` says which query blocks these are; None: all, in order.
        """
        if rows is not None and not router.by_row:
            pooled_k = pool(self.raw_k, self.config.block_k, self.lengths)
            every = router.scores(self.pooled_q, pooled_k, self.heads)
            return self.hard_mask(router, every, topk)[:, :, rows]
        routable = ranking.masked_fill(self.forced | self.dead, -torch.inf)
        chosen = router.hard(routable, self.count(topk))
        return chosen & ~self.dead | (self.forced & ~self.dead)

    def top_mask(self, ranking: Tensor, count: Tensor) -> Tensor:
        """bool (B, H, rows, T_n): the best `count` (B, H, rows, 1) routable blocks by `ranking`,
        and the forced ones.
        """
        routable = ranking.masked_fill(self.forced | self.dead, -torch.inf)
        rank = torch.argsort(routable, dim=-1, descending=True, stable=True).argsort(-1)
        return (rank < count) & ~self.dead | (self.forced & ~self.dead)

    def attend(
        self, rows: Tensor, scores: Tensor, mask: Tensor, parts: Parts
    ) -> tuple[Tensor, Tensor]:
        """The operator with `mask`, and full attention, of the query blocks `rows`: each
        (B, H, n, d) in fp32 (fp64 stays). `scores` and `mask` are (B, H, rows, T_n).
        """
        alpha = parts.mixing.alpha(scores, mask, rows=rows, num_rows=self.t_m, heads=self.heads)
        return soft_attend(
            self.tokens(rows),
            self.k,
            self.v,
            mask,
            alpha,
            parts,
            lengths=self.lengths,
            options=self.options,
            heads=self.heads,
        )

    def block_masses(self, rows: Tensor) -> Tensor:
        """The full-softmax probability of each key block, mean over the tokens of each query block:
        (B, H, rows, T_n).
        """
        q = self.tokens(rows).float()
        scores = (q @ self.k.float().transpose(-1, -2)) * q.shape[-1] ** -0.5
        if self.lengths is not None:
            token = torch.arange(self.k.shape[2], device=q.device)
            scores = scores.masked_fill((token >= self.lengths[:, None])[:, None, None], -torch.inf)
        probability = torch.softmax(scores, -1)
        pad = self.t_n * self.config.block_k - self.k.shape[2]
        per_token = (
            torch.nn.functional.pad(probability, (0, pad)).unflatten(-1, (self.t_n, -1)).sum(-1)
        )
        return pool(per_token, self.config.block_q)


def calls(
    captured: Captured, config: SLA2Config, num_rows: int, max_scores: int
) -> Iterator[tuple[Call, float]]:
    """The captured call in chunks of heads. The score matrix of a chunk, for `num_rows` query
    blocks, has at most `max_scores` elements, or is one head's.

    Yields (call, share of the heads in it).
    """
    b, h, n, _ = captured.q.shape
    per_head = b * min(num_rows, num_blocks(n, config.block_q)) * config.block_q * n
    size = max(1, min(h, max_scores // per_head))
    for start in range(0, h, size):
        chunk = slice(start, min(start + size, h))
        yield Call(captured, config, chunk), (chunk.stop - chunk.start) / h
