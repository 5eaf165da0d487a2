"""The sparse branch in torch, streamed over query blocks: low-bit settings that no kernel has, for
study.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from sla2_core.block_map import BlockMap
from sla2_core.formats import formats as quantize

_CHUNK_ELEMENTS = 1 << 21  # scores of one chunk: 8 MB in fp32


def _blocks(x: Tensor, block: int) -> Tensor:
    """(B, H, N, d) -> (B * H * ceil(N / block), block, d), zero-padded."""
    return pad(x, (0, 0, 0, -x.shape[2] % block)).reshape(-1, block, x.shape[3])


def _unblocks(x: Tensor, shape: torch.Size) -> Tensor:
    """Inverse of _blocks for a tensor of shape (B, H, N, d)."""
    return x.reshape(shape[0], shape[1], -1, shape[3])[:, :, : shape[2]]


class _Gather:
    """Flat numbering of the blocks: query row r of R = B H T_m rows reads key blocks `index[r]`
    where `live[r]`.
    """

    def __init__(self, block_map: BlockMap, lengths: Tensor | None):
        b, h, _, t_n = block_map.shape
        self.block_q, self.block_k = block_map.block_q, block_map.block_k
        head = torch.arange(b * h, device=block_map.indices.device).view(b, h, 1, 1) * t_n
        chosen = block_map.indices.long()
        start = chosen * block_map.block_k
        last = torch.full((b,), block_map.n_k, device=chosen.device) if lengths is None else lengths
        tokens = (last[:, None, None, None] - start).clamp(0, block_map.block_k)
        self.tokens = torch.where(chosen < 0, 0, tokens).flatten(
            0, 2
        )  # (R, K): valid tokens of each chosen block
        self.index = (chosen.clamp_min(0) + head).flatten(0, 2)
        self.rows, self.width = self.index.shape
        self.short = bool((self.tokens < block_map.block_k).any())
        row_size = block_map.block_q * block_map.block_k * self.width
        self.chunk = max(1, _CHUNK_ELEMENTS // row_size)

    def chunks(self):
        return (slice(i, min(i + self.chunk, self.rows)) for i in range(0, self.rows, self.chunk))

    def hidden(self, rows: slice) -> Tensor | None:
        """bool (rows, 1, K * b_k), True where a gathered key does not count; None if all count."""
        if not self.short:
            return None
        token = torch.arange(self.block_k, device=self.index.device)
        return (token >= self.tokens[rows, :, None]).flatten(1)[:, None]

    def keys(self, blocks: Tensor, rows: slice) -> Tensor:
        return blocks[self.index[rows]].flatten(1, 2)


class _SparseBranch(torch.autograd.Function):
    """O_s and L; backward recomputes the probabilities chunk by chunk from L (Alg. 3)."""

    @staticmethod
    def forward(ctx, q, k, v, block_map, lengths, precision, qat_backward):
        if lengths is not None:
            drop = (torch.arange(k.shape[2], device=k.device) >= lengths[:, None])[:, None, :, None]
            k, v = k.masked_fill(drop, 0.0), v.masked_fill(drop, 0.0)
        ctx.block_map, ctx.lengths, ctx.precision, ctx.qat_backward = (
            block_map,
            lengths,
            precision,
            qat_backward,
        )
        gather = _Gather(block_map, lengths)
        low = _round(q, k, v, block_map, precision)
        qs, ks, vs = (
            _blocks(low[0], gather.block_q),
            _blocks(low[1], gather.block_k),
            _blocks(low[2], gather.block_k),
        )
        out = qs.new_empty(qs.shape)
        lse = qs.new_empty(qs.shape[:2])
        scale = q.shape[-1] ** -0.5
        for rows in gather.chunks():
            scores = torch.bmm(qs[rows] * scale, gather.keys(ks, rows).transpose(1, 2))
            hidden = gather.hidden(rows)
            if hidden is not None:
                scores.masked_fill_(hidden, -torch.inf)
            top = scores.amax(-1, keepdim=True)
            top.masked_fill_(top == -torch.inf, 0.0)
            weights = scores.sub_(top).exp_()
            total = weights.sum(-1, keepdim=True)
            empty = (gather.tokens[rows].sum(-1) == 0)[:, None, None]
            weights = quantize.quantize_probabilities(
                weights, quantize.FORMATS[precision].pv, gather.block_k
            )
            acc = torch.bmm(weights, gather.keys(vs, rows)) / total.masked_fill(empty, 1.0)
            out[rows] = acc.masked_fill_(empty, 0.0)
            lse[rows] = torch.where(empty, -torch.inf, top + total.log()).squeeze(-1)
        out = _unblocks(out, q.shape)
        ctx.save_for_backward(q, k, v, out, lse)
        return out, lse.reshape(*q.shape[:2], -1)[:, :, : q.shape[2]]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, _grad_lse):
        q, k, v, out, lse = ctx.saved_tensors
        gather = _Gather(ctx.block_map, ctx.lengths)
        matched = ctx.qat_backward == "matched"
        low = _round(q, k, v, ctx.block_map, ctx.precision) if matched else (q, k, v)
        qs, ks, vs = (
            _blocks(low[0], gather.block_q),
            _blocks(low[1], gather.block_k),
            _blocks(low[2], gather.block_k),
        )
        gs = _blocks(grad_out.contiguous(), gather.block_q)
        delta = (gs * _blocks(out, gather.block_q)).sum(-1, keepdim=True)
        lse = torch.where(lse == -torch.inf, torch.inf, lse)[..., None]
        dq, dk, dv = torch.zeros_like(qs), torch.zeros_like(ks), torch.zeros_like(vs)
        scale = q.shape[-1] ** -0.5
        for rows in gather.chunks():
            keys, values, grads = gather.keys(ks, rows), gather.keys(vs, rows), gs[rows]
            scores = torch.bmm(qs[rows] * scale, keys.transpose(1, 2))
            hidden = gather.hidden(rows)
            if hidden is not None:
                scores.masked_fill_(hidden, -torch.inf)
            weights = scores.sub_(lse[rows]).exp_()  # P
            d_weights = torch.bmm(grads, values.transpose(1, 2))
            used, mean = weights, delta[rows]
            if matched:
                used = _requantize(weights, quantize.FORMATS[ctx.precision].pv, gather.block_k)
                mean = (weights * d_weights).sum(
                    -1, keepdim=True
                )  # D from the high-precision O = P V
            d_scores = d_weights.sub_(mean).mul_(weights).mul_(scale)
            dq[rows] = torch.bmm(d_scores, keys)
            index = gather.index[rows].flatten()
            shape = (-1, gather.block_k, q.shape[-1])
            dk.index_add_(0, index, torch.bmm(d_scores.transpose(1, 2), qs[rows]).reshape(shape))
            dv.index_add_(0, index, torch.bmm(used.transpose(1, 2), grads).reshape(shape))
        dq, dk, dv = _unblocks(dq, q.shape), _unblocks(dk, k.shape), _unblocks(dv, v.shape)
        return dq, dk, dv, None, None, None, None


def _round(
    q: Tensor, k: Tensor, v: Tensor, block_map: BlockMap, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K and V as the sparse branch of a low-bit forward sees them."""
    formats, block_k = quantize.FORMATS[precision], block_map.block_k
    return (
        quantize.quantize_blocks(q, block_map.block_q, formats.qk),
        quantize.quantize_blocks(k, block_k, formats.qk),
        quantize.quantize_values(v, formats.pv, block_k),
    )


def _requantize(p: Tensor, fmt: str, block_k: int) -> Tensor:
    """P = exp(S - L) with the rounding that its P~ = exp(S - rowmax) had in the forward."""
    top = p.amax(-1, keepdim=True)
    top = top.masked_fill(top == 0, 1.0)
    return quantize.quantize_probabilities(p / top, fmt, block_k) * top


def sparse_branch(
    q: Tensor, k: Tensor, v: Tensor, block_map: BlockMap, lengths, precision: str, qat_backward: str
):
    """O_s (B, H, N_q, d) and L (B, H, N_q) for fp32 or fp64 inputs; L carries no gradient."""
    out, lse = _SparseBranch.apply(q, k, v, block_map, lengths, precision, qat_backward)
    return out, lse.detach()
