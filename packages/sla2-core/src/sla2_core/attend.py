"""The operator on a block map: sparse branch, complement and mixing, on whichever backend.

One place composes the members of the axes; nothing is checked here. `attend` is the hard operator,
`soft_attend` its relaxation for stage 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sla2_core import reference
from sla2_core.backends import BLOCKED, ops, warn_fallback
from sla2_core.backends.base import Backend, Inputs, to_work
from sla2_core.backends.pooling import smooth_keys
from sla2_core.block_map import BlockMap
from sla2_core.complement import Branch, Complement
from sla2_core.complement.linear import Linear
from sla2_core.mixing import Mixing
from sla2_core.options import Options
from sla2_core.registry import Heads

_CHUNK_ELEMENTS = 1 << 24  # of the largest temporary of a complement in plain torch


class Parts(NamedTuple):
    """The members that the operator is made of, beside the router."""

    complement: Complement
    mixing: Mixing


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: BlockMap,
    alpha: Tensor | None,
    parts: Parts,
    *,
    lengths: Tensor | None,
    options: Options,
    backend: Backend,
    heads: Heads = None,
) -> Tensor:
    """The operator's output O (B, H, N_q, d), in q's dtype.

    Gradients reach q, k, v, alpha, and the parameters of `parts`.

    Args:
        q: (B, H, N_q, d). k, v: (B, H, N_k, d), K not smoothed. All of one floating dtype.
        alpha: (B|1, H|1, T_m|1) in [0, 1], or None for a mixing without one.
        lengths: int64 (B,), valid keys of each item, or None.
        heads: which of the members' heads these are; None means all.
    """
    if backend.name == "reference":
        return _dense(q, k, v, block_map, alpha, parts, lengths, options, heads)
    complement, mixing = parts
    keys, kernel = k, None if complement.everywhere else complement.kernel
    fused = kernel is not None and kernel == mixing.kernel
    if fused and kernel == "pooled" and not options.format.low:
        options = options.unsmoothed  # one softmax over everything: K's mean shifts it as a whole
    if options.smooth_k and not backend.smooths:
        keys, options = smooth_keys(to_work(k), lengths), options.unsmoothed
    rows = (block_map.indices, block_map.counts)
    if complement.absent:
        return ops.run(Inputs(q, keys, v, *rows, None, lengths), options, backend)[0]
    given = complement.fused(alpha, q, heads) if fused and backend.fuses(options) else None
    if given is not None:
        given = given.expand(block_map.shape[:3])
        return ops.run(Inputs(q, keys, v, *rows, given, lengths), options, backend)[0]
    learns = mixing.joins and torch.is_grad_enabled()
    chosen = BLOCKED if learns and not backend.log_sum_exp_gradient else backend
    if chosen is not backend and not isinstance(backend, type(BLOCKED)):
        warn_fallback(f"{backend.name} has no gradient of the log-sum-exp, for {mixing.name!r}")
    if chosen is not backend and options.smooth_k:
        keys, options = smooth_keys(to_work(k), lengths), options.unsmoothed
    sparse = sparse_branch(q, keys, v, block_map, lengths, options, chosen, mixing.joins)
    rest = rest_branch(q, keys, v, block_map, lengths, options, backend, complement, heads)
    return mixing.combine(sparse, rest, alpha, options.block_q).to(q.dtype)


def sparse_branch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: BlockMap,
    lengths: Tensor | None,
    options: Options,
    backend: Backend,
    joins: bool,
) -> Branch:
    """Softmax over the selected blocks of q (B, H, N_q, d), k and v (B, H, N_k, d), by a backend.

    The branch is in fp32 (fp64 for fp64 inputs). Its log-sum-exp has a gradient if `joins`, that is
    if the mixing reads it.
    """
    call = Inputs(q, k, v, block_map.indices, block_map.counts, None, lengths)
    out, lse = ops.run(call, options, backend, log_sum_exp_gradient=joins)
    nothing = block_map.counts == 0
    if lengths is not None:  # blocks may be selected that hold padding alone
        start = block_map.indices.long() * options.block_k
        inside = (block_map.indices >= 0) & (start < lengths[:, None, None, None])
        nothing = ~inside.any(-1)
    empty = nothing.repeat_interleave(options.block_q, 2)
    return Branch(to_work(out), empty[:, :, : q.shape[2], None], lse)


def rest_branch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: BlockMap,
    lengths: Tensor | None,
    options: Options,
    backend: Backend,
    complement: Complement,
    heads: Heads = None,
) -> Branch:
    """The complement's branch for q (B, H, N_q, d), k and v (B, H, N_k, d), in fp32 (fp64 for fp64
    inputs): by the backend's kernels where it is linear attention, else by the member itself.
    """
    mask = block_map.mask()
    start = torch.arange(mask.shape[3], device=mask.device) * options.block_k
    valid = torch.ones_like(mask[:1, :1, :1])
    if lengths is not None:
        valid = (start < lengths[:, None])[:, None, None]
    unselected = valid.expand_as(mask) if complement.everywhere else valid & ~mask
    if complement.kernel == "linear" and backend.fuses(options.unrounded):
        out = linear_branch(q, k, v, block_map, lengths, options, backend, complement.everywhere)
        empty = ~unselected.any(-1).repeat_interleave(options.block_q, 2)[:, :, : q.shape[2], None]
        # Where nothing is left the kernels give O_s, as their alpha is 1 there.
        return Branch(complement.finish(out.masked_fill(empty, 0.0), heads), empty)
    q, k, v = to_work(q), to_work(k), to_work(v)
    keys_valid = reference.valid_keys(k, lengths)
    if lengths is not None:
        k, v = (reference.drop_padding(x, keys_valid) for x in (k, v))
    if options.smooth_k:
        k = smooth_keys(k, lengths)
        k = k if lengths is None else reference.drop_padding(k, keys_valid)
    states = complement.states(k, v, keys_valid, options, heads)
    weights = unselected.to(q.dtype)
    return _by_rows(complement, q, states, weights, options)


def linear_branch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: BlockMap,
    lengths: Tensor | None,
    options: Options,
    backend: Backend,
    everywhere: bool,
) -> Tensor:
    """Linear attention (phi = softmax) over the unselected blocks, or over all with `everywhere`.

    The kernels' operator gives the first with alpha = 0, and the second with an empty block map.
    Returns (B, H, N_q, d) in fp32 (fp64 for fp64 inputs).
    """
    indices, counts = block_map.indices, block_map.counts
    if everywhere:
        indices, counts = torch.full_like(indices[..., :1], -1), torch.zeros_like(counts)
    if backend.takes_wide:
        q, k, v = to_work(q), to_work(k), to_work(v)
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    alpha = torch.zeros(counts.shape, dtype=work, device=q.device)
    whole = options.unrounded
    if options.smooth_k:
        k = smooth_keys(k, lengths)
    call = Inputs(q, k, v, indices, counts, alpha, lengths)
    return to_work(ops.run(call, whole, backend)[0])


class _OverAll(Linear):
    everywhere = True


def everywhere(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: BlockMap,
    lengths: Tensor | None,
    options: Options,
    backend: Backend,
) -> Tensor:
    """Linear attention (phi = softmax) over all blocks, SLA's O_l before its projection:
    (B, H, N_q, d) in fp32 (fp64 for fp64 inputs).
    """
    complement = _OverAll()
    if backend.name != "reference":
        return rest_branch(q, k, v, block_map, lengths, options, backend, complement).out
    valid = reference.valid_keys(k, lengths)
    keys, values = (reference.drop_padding(to_work(x), valid) for x in (k, v))
    shape = (*q.shape[:3], k.shape[2])
    weights = valid.expand(shape).to(keys.dtype)
    return complement.dense(to_work(q), keys, values, weights, options).out


def _by_rows(
    complement: Complement, q: Tensor, states: object, weights: Tensor, options: Options
) -> Branch:
    """complement.rows for all query blocks, a few at a time, so that nothing N x N is held; the
    backward computes each part again.
    """
    (b, h, n, d), t_n = q.shape, weights.shape[3]
    per_row = b * h * max(options.block_q * t_n, d * (d + 1))
    step = max(1, _CHUNK_ELEMENTS // per_row)
    count = weights.shape[2]
    if step >= count:
        return complement.rows(q, states, weights, options)
    found = []
    for first in range(0, count, step):
        part = q[:, :, first * options.block_q : min(n, (first + step) * options.block_q)]
        given = (part, states, weights[:, :, first : first + step], options)
        if torch.is_grad_enabled():
            found.append(checkpoint(complement.rows, *given, use_reentrant=False))
        else:
            found.append(complement.rows(*given))
    out, empty, lse = zip(*found)
    joined = None if lse[0] is None else torch.cat(lse, 2)
    return Branch(torch.cat(out, 2), torch.cat(empty, 2), joined)


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: BlockMap,
    alpha: Tensor | None,
    parts: Parts,
    lengths: Tensor | None,
    options: Options,
    heads: Heads,
) -> Tensor:
    """attend() by the dense definitions: reference.sparse_branch and the member's `dense`."""
    complement, mixing = parts
    valid = reference.valid_keys(k, lengths)
    if options.smooth_k:
        k = reference.smoothed(k, valid)
    keys, values = (reference.drop_padding(to_work(x), valid) for x in (k, v))
    queries, blocks = to_work(q), (options.block_q, options.block_k)
    chosen = reference.per_token(block_map.mask(), *blocks, q.shape[2], k.shape[2]) & valid
    o_s, lse = reference.sparse_branch(
        queries,
        keys,
        values,
        chosen,
        *blocks,
        options.precision,
        options.qat_backward,
        options.more,
    )
    sparse = Branch(o_s, ~chosen.any(-1, keepdim=True), lse)
    if complement.absent:
        return o_s.to(q.dtype)
    others = valid.expand_as(chosen) if complement.everywhere else ~chosen & valid
    rest = complement.dense(queries, keys, values, others.to(queries.dtype), options, heads)
    return mixing.combine(sparse, rest, alpha, options.block_q).to(q.dtype)


def soft_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    soft_mask: Tensor,
    alpha: Tensor | None,
    parts: Parts,
    *,
    lengths: Tensor | None,
    options: Options,
    heads: Heads = None,
) -> tuple[Tensor, Tensor]:
    """The operator with a soft mask m (stage 1) beside full attention, for any subset of the query
    blocks.

    O_s = sum_j m_j e^{s_j} v_j / sum_j m_j e^{s_j}; the complement weighs each block by 1 - m_j. A
    0/1 mask is the hard operator, unless every selected score lies so far below the row's largest
    one that its exponential is 0.

    Args:
        q: (B, H, n, d), the tokens of the query blocks at hand; all but the last block are whole.
        k, v: (B, H, N_k, d), K already smoothed.
        soft_mask: (B, H, rows, T_n) in [0, 1], rows = ceil(n / block_q). alpha: (B|1, H|1, rows|1),
            or None for a mixing without one.
        lengths: int64 (B,) or None.

    Returns:
        (O, O_full), each (B, H, n, d) in fp32 (fp64 stays); memory grows with n N_k, so stream over
        query blocks. Gradients reach q, k, v, soft_mask, alpha and the parameters of `parts`.
    """
    complement, mixing = parts
    valid = reference.valid_keys(k, lengths)
    queries = to_work(q)
    keys, values = (reference.drop_padding(to_work(x), valid) for x in (k, v))
    (b, h, n, d), n_k = q.shape, k.shape[2]
    block_q, block_k = options.block_q, options.block_k
    rows, t_n = soft_mask.shape[2:]
    soft_mask = soft_mask.to(queries.dtype)
    scores = (queries @ keys.transpose(-1, -2)) * d**-0.5
    scores = scores.masked_fill(~valid, -torch.inf)
    top = scores.detach().amax(-1, keepdim=True)
    exps = torch.exp(scores - top)
    full = (exps @ values) / exps.sum(-1, keepdim=True)
    spread = torch.nn.functional.pad(exps, (0, t_n * block_k - n_k, 0, rows * block_q - n))
    spread = spread.view(b, h, rows, block_q, t_n, block_k)
    weights = (spread * soft_mask[:, :, :, None, :, None]).flatten(4)
    weights = weights.flatten(2, 3)[:, :, :n, :n_k]
    total = weights.sum(-1, keepdim=True)
    nothing = total == 0
    divisor = torch.where(nothing, 1.0, total)
    o_s = torch.where(nothing, 0.0, (weights @ values) / divisor)
    lse = torch.where(nothing, -torch.inf, top + divisor.log()).squeeze(-1)
    sparse = Branch(o_s, nothing, lse if mixing.joins else None)
    share = torch.ones_like(soft_mask) if complement.everywhere else 1 - soft_mask
    if lengths is not None:  # blocks of padding belong to neither branch
        start = torch.arange(t_n, device=q.device) * block_k
        share = share * (start < lengths[:, None])[:, None, None]
    states = complement.states(keys, values, valid, options, heads)
    rest = complement.rows(queries, states, share, options)
    return mixing.combine(sparse, rest, alpha, block_q), full


def full_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V by torch's scaled_dot_product_attention, in q's dtype.

    Args:
        q: (B, H, N_q, d). k, v: (B, H, N_k, d).
        lengths: int64 (B,), valid keys of each item; None means all.
    """
    mask = None
    if lengths is not None:
        mask = reference.valid_keys(k, lengths)
        k, v = (reference.drop_padding(x, mask) for x in (k, v))  # which may hold anything
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
