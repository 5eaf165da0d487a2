"""What a complement is: what a query block takes from the key blocks that it does not select."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from sla2_core.config import SLA2Config
from sla2_core.options import Options
from sla2_core.registry import Heads, Member


class Branch(NamedTuple):
    """One branch of the operator, for n query tokens.

    Attributes:
        out: (B, H, n, d), fp32 or fp64.
        empty: bool (B|1, H|1, n, 1), True for tokens to which the branch gives nothing; there out
            is 0.
        lse: (B, H, n), the natural log-sum-exp of the branch's logits where it joins the softmax;
            None for a branch that is normalised by itself.
    """

    out: Tensor
    empty: Tensor
    lse: Tensor | None = None


class Complement(Member):
    """Base of the members: plain, differentiable torch over a few query blocks, never N x N.

    Attributes:
        kernel: what the kernels call it, "linear" for linear attention with phi = softmax,
            "pooled" for one key a block in the softmax; None if they do not have it.
        mixing: the member of mixing/ that a configuration takes for it if it names none.
        joins: rows() gives a log-sum-exp, for a mixing that joins both branches in one softmax.
        everywhere: it is summed over all blocks, not over the unselected ones.
        absent: there is no complement: the operator is the sparse branch alone.
    """

    group: ClassVar[str] = "complement"
    kernel: ClassVar[str | None] = None
    mixing: ClassVar[str] = "mass"
    joins: ClassVar[bool] = False
    everywhere: ClassVar[bool] = False
    absent: ClassVar[bool] = False

    def __init__(self, config: SLA2Config | None = None):
        super().__init__()

    @abstractmethod
    def states(
        self, k: Tensor, v: Tensor, valid: Tensor, options: Options, heads: Heads = None
    ) -> Any:
        """What all query blocks share: a summary of each key block.

        Args:
            k, v: (B, H, N_k, d), fp32 or fp64, K smoothed, padding 0.
            valid: bool (B|1, 1, 1, N_k), the tokens that count.
            heads: which of the module's heads these are; None means all.
        """

    @abstractmethod
    def rows(self, q: Tensor, states: Any, weights: Tensor, options: Options) -> Branch:
        """The branch of some query blocks.

        Args:
            q: (B, H, n, d), the tokens of these blocks; all but the last block are whole.
            states: of states().
            weights: (B, H, rows, T_n) in [0, 1], how much of each key block is the complement's: 0
                or 1 in the operator, 1 - m with the soft mask m of stage 1.
        """

    @abstractmethod
    def dense(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        weights: Tensor,
        options: Options,
        heads: Heads = None,
    ) -> Branch:
        """The definition of rows() on whole matrices: the oracle. weights (B, H, N_q, N_k)."""

    @classmethod
    @abstractmethod
    def flops(cls, *, n_q: int, n_k: int, t_n: int, head_dim: int) -> float:
        """FLOPs of one head's forward pass; a multiply-add counts as two. `t_n`: key blocks."""

    @classmethod
    def block_flops(cls, *, t_m: int, t_n: int, head_dim: int) -> float:
        """FLOPs of one head's forward pass between query blocks and key blocks, beside flops();
        0 for a member that computes on tokens alone.
        """
        return 0.0

    @classmethod
    def bytes(cls, *, t_m: int, t_n: int, head_dim: int) -> float:
        """Bytes of one head's forward pass beside Q, K, V, O and the pooled Q and K of the router:
        what summarises the blocks, in fp32, each time that it is written or read. `t_m`, `t_n`:
        blocks of queries and of keys.
        """
        return 0.0

    def fused(self, alpha: Tensor | None, q: Tensor, heads: Heads = None) -> Tensor | None:
        """What a kernel reads for each query block, Inputs.alpha: (B|1, H|1, T_m|1); None where
        there is nothing that it could take.

        Args:
            alpha: the mixing's, (B|1, H|1, T_m|1), or None. q: (B, H, N_q, d), for its device.
            heads: which of the module's heads these are; None means all.
        """
        return alpha

    def finish(self, out: Tensor, heads: Heads = None) -> Tensor:
        """What follows the kernel, for members that have one: (B, H, n, d) -> (B, H, n, d), fp32 or
        fp64.
        """
        return out


def blocks_of(x: Tensor, block: int, count: int) -> Tensor:
    """x (B, H, N, d) cut into `count` blocks, zero-padded: (B, H, count, block, d)."""
    lack = count * block - x.shape[2]
    return torch.nn.functional.pad(x, (0, 0, 0, lack)).unflatten(2, (count, block))
