"""The pooled complement on the cases of problems.py: launches, the oracle, and dense torch in 16
bit.
"""

import torch
from sla2_core.reference import drop_padding, per_token, pooled_branch, sparse_branch, valid_keys
from sla2_kernels import forward as operator
from sla2_kernels.problem import Alpha

from helpers import problems


def bias_of(case: problems.Case) -> torch.Tensor:
    """b of each row block, (1, H, T_m) in [-1, 1], fp32."""
    return 2 * case.alpha - 1


def forward(case, *, smooth_k=True, save=False, bias=None) -> operator.Forward:
    """What the kernels make of the case."""
    bias = bias_of(case) if bias is None else bias
    return operator.forward(
        problems.DEVICE,
        case.problem,
        *(problems.strided(x) for x in (case.q, case.k, case.v)),
        case.map,
        Alpha.of(problems.pointer(bias), tuple(bias.shape)),
        smooth_k=smooth_k,
        save=save,
        complement="pooled",
    )


def gradients(case, function, dtype):
    """dQ, dK, dV and db (1, H, T_m) of `function`, oracle() or same_dtype(), in a dtype."""
    leaves = [x.to(dtype).requires_grad_() for x in (case.q, case.k, case.v)]
    bias = bias_of(case).requires_grad_()
    q, k, v = leaves
    out = function(case._replace(q=q, k=k, v=v), bias=bias)
    out = out[0] if isinstance(out, tuple) else out
    return torch.autograd.grad(out, (*leaves, bias), case.grad.to(out.dtype))


def _selected(case) -> tuple[torch.Tensor, torch.Tensor]:
    """Valid keys (B|1, 1, 1, N_k), and which of them each query selects (B, H, N_q, N_k)."""
    block_map = case.block_map
    valid = valid_keys(case.k, None if case.lengths is None else case.lengths.long())
    sizes = (block_map.block_q, block_map.block_k, case.q.shape[2], case.k.shape[2])
    return valid, per_token(block_map.mask(), *sizes) & valid


def _of_rows(case, bias) -> torch.Tensor:
    bias = bias.expand(-1, -1, case.alpha.shape[2])
    return bias.repeat_interleave(case.block_map.block_q, 2)[:, :, : case.q.shape[2]]


def oracle(case, *, precision="full", bias=None, leaves=None):
    """O and L by the reference in fp64; `leaves`: q, k, v in place of the case's."""
    bias = bias_of(case) if bias is None else bias
    valid, selected = _selected(case)
    q, k, v = (x.double() for x in (leaves or (case.q, case.k, case.v)))
    k, v = (drop_padding(x, valid) for x in (k, v))
    blocks = case.block_map.block_q, case.block_map.block_k
    o_s, l_s = sparse_branch(q, k, v, selected, *blocks, precision)
    o_p, l_p = pooled_branch(q, k, v, (~selected & valid).double(), blocks[1])
    l_p = l_p + _of_rows(case, bias.double())
    lse = torch.logaddexp(l_s, l_p)
    out = (l_s - lse).exp()[..., None] * o_s + (l_p - lse).exp()[..., None] * o_p
    return out, lse


def same_dtype(case, *, bias=None):
    """One softmax over [K; Kbar] in the inputs' dtype, dense: what sets the tolerance."""
    bias = bias_of(case) if bias is None else bias
    valid, selected = _selected(case)
    block_k, n_k = case.block_map.block_k, case.k.shape[2]
    k, v = (drop_padding(x, valid) for x in (case.k, case.v))

    def of_blocks(x):
        return torch.nn.functional.pad(x, (0, 0, 0, -n_k % block_k)).unflatten(2, (-1, block_k))

    tokens = of_blocks(valid.transpose(-1, -2).float()).sum(3).squeeze(-1)  # (B|1, 1, T_n)
    means_k, means_v = (
        (of_blocks(x.float()).sum(3) / tokens.clamp_min(1)[..., None]).to(x.dtype) for x in (k, v)
    )
    size = tokens.log()[:, :, None] + _of_rows(case, bias)[..., None]
    rows = case.block_map.mask().repeat_interleave(case.block_map.block_q, 2)
    size = size.masked_fill(rows[:, :, : case.q.shape[2]], -torch.inf)
    mask = torch.zeros(selected.shape).masked_fill(~selected, -torch.inf)
    scores = case.q @ torch.cat([k, means_k], 2).transpose(-1, -2) * case.q.shape[3] ** -0.5
    logits = scores + torch.cat([mask, size.expand(*mask.shape[:3], -1)], 3).to(scores.dtype)
    return torch.softmax(logits, -1) @ torch.cat([v, means_v], 2)
