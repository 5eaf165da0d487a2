"""linear: linear attention over the blocks that are not selected (Eq. 14), phi = softmax over d."""

from __future__ import annotations

import torch
from torch import Tensor

from sla2_core import reference
from sla2_core.block_map import num_blocks
from sla2_core.complement.base import Branch, Complement, blocks_of
from sla2_core.options import Options
from sla2_core.registry import COMPLEMENTS, Heads


@COMPLEMENTS.register("linear")
class Linear(Complement):
    """O_l = phi(Q) H_i / (phi(Q) . Z_i), H_i and Z_i the sums of h_j = phi(K_j)^T V_j and of
    z_j = column sum of phi(K_j) over the unselected blocks j. Nothing is learned.
    """

    kernel = "linear"

    def states(
        self, k: Tensor, v: Tensor, valid: Tensor, options: Options, heads: Heads = None
    ) -> tuple[Tensor, Heads]:
        """h_j and z_j side by side, (B, H, T_n, d, d + 1), and the heads."""
        count = num_blocks(k.shape[2], options.block_k)
        phi = reference.drop_padding(torch.softmax(k, -1), valid)
        blocks_k = blocks_of(phi, options.block_k, count)
        blocks_v = blocks_of(v, options.block_k, count)
        sums = blocks_k.transpose(-1, -2) @ blocks_v
        return torch.cat([sums, blocks_k.sum(3)[..., None]], -1), heads

    def rows(
        self, q: Tensor, states: tuple[Tensor, Heads], weights: Tensor, options: Options
    ) -> Branch:
        """phi(Q) H_i / (phi(Q) . Z_i), with H_i and Z_i the weighted sums of the states."""
        n, d = q.shape[2:]
        parts, heads = states
        sums = (weights @ parts.flatten(3)).unflatten(3, (d, d + 1))
        phi = blocks_of(torch.softmax(q, -1), options.block_q, weights.shape[2])
        found = (phi @ sums).flatten(2, 3)[:, :, :n]
        below = found[..., d:]
        empty = below == 0
        out = torch.where(empty, 0.0, found[..., :d] / torch.where(empty, 1.0, below))
        return Branch(self.finish(out, heads), empty)

    def dense(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        weights: Tensor,
        options: Options,
        heads: Heads = None,
    ) -> Branch:
        """By reference.linear_branch."""
        out = reference.linear_branch(q, k, v, weights)
        return Branch(self.finish(out, heads), (weights == 0).all(-1, keepdim=True))

    @classmethod
    def flops(cls, *, n_q: int, n_k: int, t_n: int, head_dim: int) -> float:
        """2 N_k d^2 for h_j and 2 N_q d^2 for phi(Q) H_i. The masked sum over blocks, 2 T_m T_n d^2
        as a GEMM, is not in the paper's count and not in this one.
        """
        return 2.0 * (n_q + n_k) * head_dim**2

    @classmethod
    def bytes(cls, *, t_m: int, t_n: int, head_dim: int) -> float:
        """h_j, z_j and H_i, Z_i, written and read."""
        return 4.0 * 2 * (t_m + t_n) * head_dim * (head_dim + 1)
