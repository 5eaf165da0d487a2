"""reference: the dense N x N oracle behind backend="reference", which "auto" never takes."""

from __future__ import annotations

from torch import Tensor

from sla2_core import reference
from sla2_core.backends.base import Backend, Grads, Inputs, Problem, to_work
from sla2_core.backends.pooling import block_means
from sla2_core.block_map import BlockMap, Rows
from sla2_core.options import Options


class ReferenceBackend(Backend):
    """The sparse branch of reference.py, for comparisons. The complement is a member's `dense`."""

    name = "reference"
    log_sum_exp_gradient = True
    by_autograd = True

    def unfit(self, problem: Problem) -> str | None:
        return None

    def pool(
        self, q: Tensor, k: Tensor, lengths: Tensor | None, options: Options
    ) -> tuple[Tensor, Tensor]:
        return block_means(q, options.block_q), block_means(k, options.block_k, lengths)

    def forward(self, call: Inputs, options: Options, save: bool) -> list[Tensor]:
        q, k = call.q, call.k
        valid = reference.valid_keys(k, call.lengths)
        blocks = (options.block_q, options.block_k)
        sizes = dict(block_q=blocks[0], block_k=blocks[1], n_q=q.shape[2], n_k=k.shape[2])
        mask = BlockMap._trusted(Rows(call.indices, call.counts), **sizes).mask()
        selected = reference.per_token(mask, *blocks, q.shape[2], k.shape[2]) & valid
        keys, values = (reference.drop_padding(to_work(x), valid) for x in (k, call.v))
        how = (options.precision, options.qat_backward, options.more)
        out, lse = reference.sparse_branch(to_work(q), keys, values, selected, *blocks, *how)
        return [out.to(q.dtype), lse]

    def saved(self, call: Inputs, options: Options) -> list[Tensor]:
        return []

    def backward(
        self,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        call: Inputs,
        results: list[Tensor],
        options: Options,
    ) -> Grads:
        raise RuntimeError("reference: torch finds the gradients of forward() by itself")
