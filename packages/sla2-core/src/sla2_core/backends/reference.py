"""reference: the dense N x N oracle behind backend="reference", which "auto" never takes."""

from __future__ import annotations

from torch import Tensor

from sla2_core import reference
from sla2_core.backends.base import Backend, Grads, Inputs, Problem, to_work
from sla2_core.backends.means import block_means
from sla2_core.block_map import BlockMap, Rows
from sla2_core.options import Options


class ReferenceBackend(Backend):
    """The sparse branch of reference.py, for comparisons. The complement is a member's `dense`."""

    name = "reference"
    log_sum_exp_gradient = True
    by_autograd = True

    def unfit(self, problem: Problem) -> str | None:
        """None: it takes every call."""
        return None

    def pool(
        self, q: Tensor, k: Tensor, lengths: Tensor | None, options: Options
    ) -> tuple[Tensor, Tensor]:
        """By means.block_means on every device."""
        return block_means(q, options.block_q), block_means(k, options.block_k, lengths)

    def forward(self, call: Inputs, options: Options, save: bool) -> list[Tensor]:
        """O and L by reference.sparse_branch on N_q x N_k matrices. Nothing is saved."""
        q, k = call.q, call.k
        valid = reference.valid_keys(k, call.lengths)
        blocks = (options.block_q, options.block_k)
        block_map = BlockMap._trusted(
            Rows(call.indices, call.counts),
            block_q=options.block_q,
            block_k=options.block_k,
            n_q=q.shape[2],
            n_k=k.shape[2],
        )
        mask = block_map.mask()
        selected = reference.per_token(mask, *blocks, q.shape[2], k.shape[2]) & valid
        keys, values = (reference.drop_padding(to_work(x), valid) for x in (k, call.v))
        out, lse = reference.sparse_branch(
            to_work(q),
            keys,
            values,
            selected,
            *blocks,
            options.precision,
            options.qat_backward,
            options.more,
        )
        return [out.to(q.dtype), lse]

    def saved(self, call: Inputs, options: Options) -> list[Tensor]:
        """Nothing."""
        return []

    def backward(
        self,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        call: Inputs,
        results: list[Tensor],
        options: Options,
    ) -> Grads:
        """Raises RuntimeError: by_autograd says that it is not called."""
        raise RuntimeError("reference: torch finds the gradients of forward() by itself")
