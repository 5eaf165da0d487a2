"""The operator in plain torch on N_q x N_k matrices, for any float dtype: what every fast path is
compared with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sla2_core.block_map import BlockMap
from sla2_core.checks import (
    check_alpha,
    check_block_map,
    check_choice,
    check_kv_lengths,
    check_precision,
    check_qkv,
)
from sla2_core.config import QAT_BACKWARDS
from sla2_core.formats import format_of

Lengths = Tensor | Sequence[int] | None


def _work(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def valid_keys(k: Tensor, kv_lengths: Tensor | None) -> Tensor:
    """Which tokens of k (B, H, N_k, d) count, bool (B|1, 1, 1, N_k), from int64 (B,) lengths."""
    token = torch.arange(k.shape[2], device=k.device)
    if kv_lengths is None:
        return torch.ones((1, 1, 1, k.shape[2]), dtype=torch.bool, device=k.device)
    return (token < kv_lengths[:, None])[:, None, None, :]


def drop_padding(x: Tensor, valid: Tensor) -> Tensor:
    """x (B, H, N_k, d) with 0 at the tokens that `valid`, bool (B|1, 1, 1, N_k), leaves out."""
    return x.masked_fill(~valid.transpose(-1, -2), 0.0)


def smoothed(k: Tensor, valid: Tensor) -> Tensor:
    """k (B, H, N_k, d) minus its mean over the valid tokens (Alg. 2, step 1), in k's dtype; `valid`
    is bool (B|1, 1, 1, N_k).
    """
    sums = drop_padding(_work(k), valid).sum(2, keepdim=True)
    return (k - sums / valid.sum(-1)[..., None]).to(k.dtype)


def per_token(blocks: Tensor, block_q: int, block_k: int, n_q: int, n_k: int) -> Tensor:
    """Values of block pairs (B, H, T_m, T_n) as values of token pairs (B, H, n_q, n_k)."""
    return blocks.repeat_interleave(block_q, 2)[:, :, :n_q].repeat_interleave(block_k, 3)[..., :n_k]


def full_attention(q: Tensor, k: Tensor, v: Tensor, kv_lengths: Lengths = None) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V on the N_q x N_k matrix: (B, H, N_q, d) in q's dtype.

    Args:
        q: (B, H, N_q, d) of a floating dtype. k, v: (B, H, N_k, d) of the same.
        kv_lengths: None, or one integer in [1, N_k] per batch item.

    Raises:
        TypeError, ValueError: as checks.check_qkv and check_kv_lengths.
    """
    check_qkv(q, k, v)
    kv_lengths = check_kv_lengths(kv_lengths, q, k)
    valid = valid_keys(k, kv_lengths)
    keys, values = drop_padding(_work(k), valid), drop_padding(_work(v), valid)
    scores = (_work(q) @ keys.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return (torch.softmax(scores.masked_fill(~valid, -torch.inf), -1) @ values).to(q.dtype)


def _round_trip(x: Tensor, rounded: Tensor) -> Tensor:
    """The rounded value with the gradient of the identity (straight-through estimator)."""
    return x + (rounded - x).detach()


class _Alg3(torch.autograd.Function):
    """The values of a low-bit O_s and L with the gradients of Alg. 3: P = exp(S - L) from q, k and
    v as they are.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, selected: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, v, selected, out, lse)
        return out.clone(), lse.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, selected, out, lse = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        scores = ((q @ k.transpose(-1, -2)) * scale).masked_fill(~selected, -torch.inf)
        p = torch.exp(scores - torch.where(lse == -torch.inf, torch.inf, lse)[..., None])
        mean = (grad * out).sum(-1, keepdim=True) - grad_lse[..., None]  # D, and what L adds
        d_scores = p * (grad @ v.transpose(-1, -2) - mean) * scale
        d_q, d_k, d_v = d_scores @ k, d_scores.transpose(-1, -2) @ q, p.transpose(-1, -2) @ grad
        return d_q, d_k, d_v, None, None, None


def sparse_branch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected: Tensor,
    block_q: int,
    block_k: int,
    precision: str,
    qat_backward: str = "paper",
    options: Mapping[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax over the selected pairs only, times V (Alg. 2, sparse branch).

    Args:
        q: (B, H, N_q, d) in fp32 or fp64. k, v: (B, H, N_k, d) of the same dtype, padding 0.
        selected: bool (B, H, N_q, N_k), by token.
        block_q, block_k: tokens in a block; a low-bit format has scales by block.
        precision: a member of formats/, which defines the rounding.
        qat_backward: of a low-bit precision, "paper" for the gradients of Alg. 3 or "matched" for
            the rounding as the identity (straight-through).
        options: the format's own, see SLA2Config.options.

    Returns:
        O_s (B, H, N_q, d) and L (B, H, N_q), the natural log-sum-exp of the selected scores. A row
        that selects nothing has 0 and -inf.
    """
    form = format_of(precision, options)
    if form.low and qat_backward == "paper":
        with torch.no_grad():
            matched = (block_q, block_k, precision, "matched", options)
            out, lse = sparse_branch(q, k, v, selected, *matched)
        return _Alg3.apply(q, k, v, selected, out, lse)
    if form.low:
        q = _round_trip(q, form.round_blocks(q, block_q))
        k = _round_trip(k, form.round_blocks(k, block_k))
    scores = ((q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5).masked_fill(~selected, -torch.inf)
    top = scores.detach().amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    empty = ~selected.any(-1, keepdim=True)
    divisor = torch.where(empty, 1.0, total)
    probabilities = weights / divisor
    if form.low:
        rounded = form.round_probabilities(weights, block_k) / divisor
        probabilities = _round_trip(probabilities, rounded)
        v = _round_trip(v, form.round_values(v, block_k))
    out = torch.where(empty, 0.0, probabilities @ v)
    lse = torch.where(empty, -torch.inf, top + total.clamp_min(torch.finfo(total.dtype).tiny).log())
    return out, lse.squeeze(-1)


def linear_branch(q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> Tensor:
    """sum_j w_j (phi(q) . phi(k_j)) v_j / sum_j w_j (phi(q) . phi(k_j)), phi the softmax over d
    (Eq. 14 with 0/1 weights): (B, H, N_q, d).

    Args:
        q: (B, H, N_q, d) in fp32 or fp64. k, v: (B, H, N_k, d).
        weights: w, (B, H, N_q, N_k) in [0, 1]. A row whose weights are all 0 has 0.
    """
    pairs = (torch.softmax(q, -1) @ torch.softmax(k, -1).transpose(-1, -2)) * weights
    total = pairs.sum(-1, keepdim=True)
    return torch.where(total == 0, 0.0, (pairs @ v) / torch.where(total == 0, 1.0, total))


def pooled_branch(
    q: Tensor, k: Tensor, v: Tensor, weights: Tensor, block_k: int, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax over one pooled key for each block that is not selected: logits
    l_tj = q_t . kbar_j / sqrt(d) + log n_j + b_h, values vbar_j, with kbar_j and vbar_j the means
    of K and V over the n_j tokens of block j that count.

    Args:
        q: (B, H, N_q, d) in fp32 or fp64. k, v: (B, H, N_k, d).
        weights: (B, H, N_q, N_k), 1 for the tokens that count, 0 for the others.
        block_k: tokens in a key block. bias: b, (H,), or None for 0.

    Returns:
        (B, H, N_q, d) and the natural log-sum-exp of the logits (B, H, N_q). A row whose weights
        are all 0 has 0 and -inf.
    """
    n_k = k.shape[2]

    def of_blocks(x: Tensor) -> Tensor:  # sums over the tokens of each block
        padded = torch.nn.functional.pad(x, (0, -n_k % block_k))
        return padded.unflatten(-1, (-1, block_k)).sum(-1)

    scores = torch.where(weights == 0, 0.0, q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5)
    tokens = of_blocks(weights)
    logits = of_blocks(scores) / tokens.clamp_min(1) + tokens.log()  # the mean score is q . kbar_j
    if bias is not None:
        logits = logits + bias.to(q.dtype)[:, None, None]
    empty = (weights == 0).all(-1, keepdim=True)
    logits = logits.masked_fill(tokens == 0, -torch.inf)
    share = torch.softmax(logits.masked_fill(empty, 0.0), -1) / tokens.clamp_min(1)
    out = (share.repeat_interleave(block_k, -1)[..., :n_k] * weights) @ v
    lse = torch.logsumexp(logits.masked_fill(empty, 0.0), -1)
    return torch.where(empty, 0.0, out), lse.masked_fill(empty.squeeze(-1), -torch.inf)


def mix(
    o_s: Tensor, o_l: Tensor, alpha: Tensor, block_q: int, nothing: Tensor, everything: Tensor
) -> Tensor:
    """alpha O_s + (1 - alpha) O_l (Eq. 13): (B, H, N_q, d).

    Args:
        o_s, o_l: (B, H, N_q, d).
        alpha: (B|1, H|1, T_m|1), one value for each query block of `block_q` tokens.
        nothing: bool (B, H, N_q, 1), rows that select nothing: alpha counts as 0.
        everything: bool (B, H, N_q, 1), rows without a complement: alpha counts as 1.
    """
    n_q = o_s.shape[2]
    per_token = (
        alpha[..., None]
        if alpha.shape[2] == 1
        else alpha.repeat_interleave(block_q, 2)[:, :, :n_q, None]
    )
    per_token = torch.where(everything, 1.0, torch.where(nothing, 0.0, per_token.to(o_s.dtype)))
    return per_token * o_s + (1 - per_token) * o_l


def sla2_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: BlockMap,
    alpha: Tensor | float,
    *,
    precision: str = "full",
    qat_backward: str = "paper",
    smooth_k: bool = True,
    kv_lengths: Lengths = None,
    complement: str = "linear",
) -> Tensor:
    """SLA2 (Eq. 13-16) on dense N_q x N_k matrices: the oracle of functional.sla2_attention.

    Args, Raises:
        as functional.sla2_attention, and
        complement: "linear", or "exact" for softmax attention over the unselected pairs. With
            "exact", and alpha the full-softmax probability of the selected blocks (Eq. 7, see
            routed_mass), the result is full attention.

    Returns:
        (B, H, N_q, d) in q's dtype.
    """
    check_qkv(q, k, v)
    check_block_map(block_map, q, k)
    check_precision(precision)
    check_choice("qat_backward", qat_backward, QAT_BACKWARDS)
    check_choice("complement", complement, ("linear", "exact"))
    alpha = check_alpha(alpha, q, block_map.shape[2])
    kv_lengths = check_kv_lengths(kv_lengths, q, k)
    valid = valid_keys(k, kv_lengths)
    if smooth_k:
        k = smoothed(k, valid)
    keys, values, queries = drop_padding(_work(k), valid), drop_padding(_work(v), valid), _work(q)
    selected = (
        per_token(block_map.mask(), block_map.block_q, block_map.block_k, q.shape[2], k.shape[2])
        & valid
    )
    others = ~selected & valid
    blocks = (block_map.block_q, block_map.block_k)
    o_s, _ = sparse_branch(queries, keys, values, selected, *blocks, precision, qat_backward)
    if complement == "linear":
        o_l = linear_branch(queries, keys, values, others.to(queries.dtype))
    else:
        o_l, _ = sparse_branch(queries, keys, values, others, *blocks, "full")
    nothing, everything = ~selected.any(-1, keepdim=True), ~others.any(-1, keepdim=True)
    return mix(o_s, o_l, alpha, block_map.block_q, nothing, everything).to(q.dtype)


def block_sparse_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: BlockMap,
    *,
    precision: str = "full",
    qat_backward: str = "paper",
    kv_lengths: Lengths = None,
) -> tuple[Tensor, Tensor]:
    """The sparse branch alone: the oracle of functional.block_sparse_attention, whose arguments and
    errors it has.

    Returns O_s (B, H, N_q, d) in q's dtype and the natural log-sum-exp L (B, H, N_q) in fp32 (fp64
    for fp64 inputs).
    """
    check_qkv(q, k, v)
    check_block_map(block_map, q, k)
    check_precision(precision)
    check_choice("qat_backward", qat_backward, QAT_BACKWARDS)
    valid = valid_keys(k, check_kv_lengths(kv_lengths, q, k))
    keys, values = drop_padding(_work(k), valid), drop_padding(_work(v), valid)
    selected = (
        per_token(block_map.mask(), block_map.block_q, block_map.block_k, q.shape[2], k.shape[2])
        & valid
    )
    blocks = (block_map.block_q, block_map.block_k)
    out, lse = sparse_branch(_work(q), keys, values, selected, *blocks, precision, qat_backward)
    return out.to(q.dtype), lse


def routed_mass(q: Tensor, k: Tensor, block_map: BlockMap, kv_lengths: Lengths = None) -> Tensor:
    """The full-softmax probability that each query token's selected blocks hold (Eq. 7).

    Args:
        q: (B, H, N_q, d). k: (B, H, N_k, d). block_map: made for these lengths.
        kv_lengths: None, or one integer in [1, N_k] per batch item.

    Returns:
        (B, H, N_q) in fp32 (fp64 for fp64 inputs).
    """
    valid = valid_keys(k, check_kv_lengths(kv_lengths, q, k))
    scores = (_work(q) @ drop_padding(_work(k), valid).transpose(-1, -2)) * q.shape[-1] ** -0.5
    selected = per_token(
        block_map.mask(), block_map.block_q, block_map.block_k, q.shape[2], k.shape[2]
    )
    return (torch.softmax(scores.masked_fill(~valid, -torch.inf), -1) * selected).sum(-1)
