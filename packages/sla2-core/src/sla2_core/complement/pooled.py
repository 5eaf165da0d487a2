"""pooled: each block that is not selected as one key, its mean, in the softmax of the selected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from sla2_core import reference
from sla2_core.backends.base import to_work
from sla2_core.block_map import num_blocks
from sla2_core.complement.base import Branch, Complement, blocks_of
from sla2_core.config import SLA2Config
from sla2_core.options import Options
from sla2_core.registry import COMPLEMENTS, Heads, of_heads


class Means(NamedTuple):
    """What all query blocks share.

    Attributes:
        k, v: (B, H, T_n, d), the mean of K and of V over each block's valid tokens.
        tokens: (B|1, 1, T_n), how many those are.
        bias: (H,), b of each head, or None for 0.
    """

    k: Tensor
    v: Tensor
    tokens: Tensor
    bias: Tensor | None


@COMPLEMENTS.register("pooled")
class Pooled(Complement):
    """Softmax over one key a block: O_t = sum_j e^{l_tj} vbar_j / sum_j e^{l_tj} over the blocks j
    that are not selected, l_tj = q_t . kbar_j / sqrt(d) + log n_j + b_h.

    kbar_j and vbar_j are the means over the n_j valid tokens of the block, so the pooled key counts
    for all of them: were they equal, the branch would be exact. The mixing "joint" puts it and the
    selected tokens into one softmax. There is no alpha, no feature map and no state of d x d, and a
    shift of K changes nothing.

    By convexity a block's mean score is at most the log of its mean exponential. `bias`, b_h, fp32
    (H,), makes up for that on average. It starts at 0 and both stages train it. With the option
    pooled_bias=False it does not exist and is 0: then nothing is learned.
    """

    group: ClassVar[str] = "pooled"
    per_topk: ClassVar[bool] = True  # which blocks are left to it follows from k%
    kernel = "pooled"
    mixing = "joint"
    joins = True
    options: ClassVar[Mapping[str, Any]] = {"pooled_bias": True}
    bias: nn.Parameter

    def __init__(self, config: SLA2Config):
        super().__init__(config)
        self.num_heads, self.learns = config.num_heads, config.options["pooled_bias"]
        self.make_parameters()

    def start(self) -> Mapping[str, Tensor]:
        """b = 0 for every head, or nothing."""
        return {"bias": torch.zeros(self.num_heads)} if self.learns else {}

    def bias_of(self, heads: Heads = None) -> Tensor | None:
        """b (H,) of some heads, fp32 (fp64 in an fp64 module); None for 0."""
        return of_heads(self.bias, heads) if self.learns else None

    def fused(self, alpha: Tensor | None, q: Tensor, heads: Heads = None) -> Tensor:
        """b of each head, (1, H|1, 1)."""
        bias = self.bias_of(heads)
        return to_work(q.new_zeros((1, 1, 1))) if bias is None else bias[None, :, None]

    def states(
        self, k: Tensor, v: Tensor, valid: Tensor, options: Options, heads: Heads = None
    ) -> Means:
        """The means, the tokens they count for, and b."""
        block, count = options.block_k, num_blocks(k.shape[2], options.block_k)
        inside = valid.transpose(-1, -2).to(k.dtype)
        tokens = blocks_of(inside, block, count).sum(3)
        means_k, means_v = (blocks_of(x, block, count).sum(3) / tokens.clamp_min(1) for x in (k, v))
        return Means(means_k, means_v, tokens.squeeze(-1), self.bias_of(heads))

    def rows(self, q: Tensor, states: Means, weights: Tensor, options: Options) -> Branch:
        """As the class says, each e^{l_tj} times the block's weight."""
        means_k, means_v, tokens, bias = states
        logits = (q @ means_k.transpose(-1, -2)) * q.shape[3] ** -0.5 + tokens.log()[:, :, None]
        if bias is not None:
            logits = logits + bias.to(q.dtype)[:, None, None]
        weights = weights.repeat_interleave(options.block_q, 2)[:, :, : q.shape[2]]
        # Not "> 0": a NaN in the weights must come out.
        live = (weights != 0) & (tokens > 0)[:, :, None]
        logits = logits.masked_fill(~live, -torch.inf)
        empty = ~live.any(-1, keepdim=True)
        top = logits.detach().amax(-1, keepdim=True)
        top = torch.where(top == -torch.inf, 0.0, top)
        # The weight is a factor, not a summand of the logit, whose gradient at 0 would be infinite.
        shares = torch.exp(logits - top) * weights
        total = torch.where(empty, 1.0, shares.sum(-1, keepdim=True))
        out = torch.where(empty, 0.0, (shares @ means_v) / total)
        lse = torch.where(empty, -torch.inf, top + total.log())
        return Branch(out, empty, lse.squeeze(-1))

    def dense(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        weights: Tensor,
        options: Options,
        heads: Heads = None,
    ) -> Branch:
        """By reference.pooled_branch."""
        out, lse = reference.pooled_branch(q, k, v, weights, options.block_k, self.bias_of(heads))
        return Branch(out, (weights == 0).all(-1, keepdim=True), lse)

    @classmethod
    def flops(cls, *, n_q: int, n_k: int, t_n: int, head_dim: int) -> float:
        """4 N_q T_n d: every query token against the mean of every block."""
        return 4.0 * n_q * t_n * head_dim

    @classmethod
    def bytes(cls, *, t_m: int, t_n: int, head_dim: int) -> float:
        """The means of V, written and read, and those of K, which the router has too, read."""
        return 4.0 * 3 * t_n * head_dim
