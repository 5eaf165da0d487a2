"""coarse: VSA's coarse branch, full attention between block means, through a gate (2505.13389)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from sla2_core.block_map import num_blocks
from sla2_core.complement.base import Branch, Complement, blocks_of
from sla2_core.config import SLA2Config
from sla2_core.options import Options
from sla2_core.registry import COMPLEMENTS, Heads, of_heads


class _Means(NamedTuple):
    """Block means of K and V, (B, H, T_n, d) each, and the gate of these heads."""

    keys: Tensor
    values: Tensor
    weight: Tensor
    bias: Tensor


@COMPLEMENTS.register("coarse")
class Coarse(Complement):
    """G O_c: softmax(Q' K'^T / sqrt(d)) V' over all blocks, with Q', K', V' the block means, which
    all tokens of a query block receive; times a gate for each token and channel.

    G = q W_h + b_h for each head: `weight` (H, d, d) and `bias` (H, d) start at zero, as VSA's gate
    does where it adapts a trained model, so that the operator begins as the sparse branch alone.
    With the mixing "sum", O = O_f + G O_c: in that adaptation the fine branch has no gate. Stage 2
    trains the gate with the model.

    What differs from VSA: its gate is a linear map of the layer's input, over all heads at once.
    An attention module here sees q, which is a linear map of that input after the model's own norm
    and rotary embedding, so the gate of a head reads that head's q. And VSA's blocks are cubes of
    4 x 4 x 4 tokens for queries and keys alike; here they are the configuration's.
    """

    group: ClassVar[str] = "gate"
    stages: ClassVar[tuple[str, ...]] = ("stage2",)
    everywhere = True
    mixing = "sum"
    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, config: SLA2Config):
        super().__init__(config)
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.make_parameters()

    def start(self) -> Mapping[str, Tensor]:
        """Zeros."""
        h, d = self.num_heads, self.head_dim
        return {"weight": torch.zeros(h, d, d), "bias": torch.zeros(h, d)}

    def states(
        self, k: Tensor, v: Tensor, valid: Tensor, options: Options, heads: Heads = None
    ) -> _Means:
        """The means of K and V over each block's valid tokens, 0 for blocks without one."""
        count = num_blocks(k.shape[2], options.block_k)
        tokens = valid.transpose(-1, -2).to(k.dtype)
        tokens = blocks_of(tokens, options.block_k, count).sum(3).clamp_min(1)
        keys, values = (blocks_of(x, options.block_k, count).sum(3) / tokens for x in (k, v))
        return _Means(keys, values, of_heads(self.weight, heads), of_heads(self.bias, heads))

    def rows(self, q: Tensor, states: _Means, weights: Tensor, options: Options) -> Branch:
        """As Complement.rows; a block j counts with w_j e^{q' k'_j / sqrt(d)}."""
        n, d, rows = q.shape[2], q.shape[3], weights.shape[2]
        start = torch.arange(rows, device=q.device) * options.block_q
        tokens = (n - start).clamp(max=options.block_q)[:, None]
        means = blocks_of(q, options.block_q, rows).sum(3) / tokens
        logits = means @ states.keys.transpose(-1, -2) * d**-0.5 + weights.log()
        empty = (weights == 0).all(-1, keepdim=True)
        found = torch.softmax(logits.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
        out, empty = (
            x.repeat_interleave(options.block_q, 2)[:, :, :n]
            for x in (found @ states.values, empty)
        )
        return Branch(_gate(q, states.weight, states.bias) * out, empty)

    def dense(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        weights: Tensor,
        options: Options,
        heads: Heads = None,
    ) -> Branch:
        """By matrices that average over blocks. The weights are those of `everywhere`: the valid
        keys, the same for every query.
        """
        every = torch.ones_like(q[:, :, None, :, 0])
        pool_q = _averages(every, options.block_q)
        pool_k = _averages((weights[:, :, :1] > 0).to(q.dtype), options.block_k)
        scores = (pool_q @ q) @ (pool_k @ k).transpose(-1, -2) * q.shape[3] ** -0.5
        some = pool_k.sum(-1)[:, :, None] > 0
        coarse = torch.softmax(scores.masked_fill(~some, -torch.inf), -1) @ (pool_k @ v)
        out = (pool_q > 0).to(q.dtype).transpose(-1, -2) @ coarse
        gate = _gate(q, of_heads(self.weight, heads), of_heads(self.bias, heads))
        return Branch(gate * out, torch.zeros_like(q[..., :1], dtype=torch.bool))

    @classmethod
    def flops(cls, *, n_q: int, n_k: int, t_n: int, head_dim: int) -> float:
        """2 N_q d^2 for the gate. The source's, which reads all heads, takes H times as many."""
        return 2.0 * n_q * head_dim**2

    @classmethod
    def block_flops(cls, *, t_m: int, t_n: int, head_dim: int) -> float:
        """4 T_m T_n d for the attention between block means."""
        return 4.0 * t_m * t_n * head_dim


def _gate(q: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return q @ weight.to(q.dtype) + bias.to(q.dtype)[:, None]


def _averages(valid: Tensor, block: int) -> Tensor:
    """(B, H, blocks, N) that takes N tokens to the means of their blocks' valid ones: those where
    `valid` (B, H, 1, N) is 1, not 0.
    """
    token = torch.arange(valid.shape[3], device=valid.device)
    start = token[::block, None]
    inside = ((token >= start) & (token < start + block)) * valid
    return inside / inside.sum(-1, keepdim=True).clamp_min(1)
