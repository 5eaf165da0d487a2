"""blocked: the sparse branch in plain torch, a few query blocks at a time, over the blocks they
select.

Never N x N. It has every number format, dtype, block size and device, and the gradient of the
log-sum-exp: it is what "auto" falls back to, and where a new idea runs first.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from sla2_core.backends.base import Backend, Grads, Inputs, Problem, to_work, work_dtype
from sla2_core.backends.pooling import pool
from sla2_core.formats import Format
from sla2_core.options import Options

_CHUNK_ELEMENTS = 1 << 21  # scores of one chunk: 8 MB in fp32


def _blocks_and_a_spare(x: Tensor, block: int) -> Tensor:
    """_blocks with a block of zeros behind them, which the gaps of short rows read."""
    b, h, n, d = x.shape
    count = -(-n // block)
    out = x.new_zeros((b * h * count + 1, block, d))
    out[:-1].view(b, h, count * block, d)[:, :, :n] = x
    return out


def _blocks(x: Tensor, block: int) -> Tensor:
    """(B, H, N, d) -> (B * H * ceil(N / block), block, d), zero-padded."""
    return pad(x, (0, 0, 0, -x.shape[2] % block)).reshape(-1, block, x.shape[3])


def _unblocks(x: Tensor, shape: torch.Size) -> Tensor:
    """Inverse of _blocks for a tensor of shape (B, H, N, d)."""
    return x.reshape(shape[0], shape[1], -1, shape[3])[:, :, : shape[2]]


class _Gather:
    """Flat numbering of the blocks: query row r of R = B H T_m rows reads key blocks `index[r]`, of
    which `tokens[r]` (R, K) keys count; 0 past the row's count.
    """

    def __init__(self, call: Inputs, options: Options):
        self.block_q, self.block_k = options.block_q, options.block_k
        b, h = call.counts.shape[:2]
        n_k = call.k.shape[2]
        t_n = -(-n_k // self.block_k)
        device = call.indices.device
        head = torch.arange(b * h, device=device).view(b, h, 1, 1) * t_n
        chosen = call.indices.long()
        start = chosen * self.block_k
        last = torch.full((b,), n_k, device=device) if call.lengths is None else call.lengths
        tokens = (last[:, None, None, None] - start).clamp(0, self.block_k)
        self.tokens = torch.where(chosen < 0, 0, tokens).flatten(0, 2)
        self.index = torch.where(chosen < 0, b * h * t_n, chosen + head).flatten(0, 2)
        self.rows, self.width = self.index.shape
        row_size = self.block_q * self.block_k * self.width
        self.chunk = max(1, _CHUNK_ELEMENTS // row_size)

    def chunks(self) -> Iterator[slice]:
        """Slices of the rows that are worked on together."""
        return (slice(i, min(i + self.chunk, self.rows)) for i in range(0, self.rows, self.chunk))

    def hidden(self, rows: slice) -> Tensor:
        """bool (rows, 1, K * b_k), True where a gathered key does not count."""
        token = torch.arange(self.block_k, device=self.index.device)
        return (token >= self.tokens[rows, :, None]).flatten(1)[:, None]

    def keys(self, blocks: Tensor, rows: slice) -> Tensor:
        """The selected blocks of each row, one after the other: (rows, K * b_k, d)."""
        return blocks[self.index[rows]].flatten(1, 2)


def _inputs(call: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K, V in fp32 or fp64, with 0 in place of padding, which may hold anything."""
    q, k, v = to_work(call.q), to_work(call.k), to_work(call.v)
    if call.lengths is not None:
        token = torch.arange(k.shape[2], device=k.device)
        drop = (token >= call.lengths[:, None])[:, None, :, None]
        k, v = k.masked_fill(drop, 0.0), v.masked_fill(drop, 0.0)
    return q, k, v


def _rounded(
    tensors: tuple[Tensor, Tensor, Tensor], form: Format, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K and V as the sparse branch of a low-bit forward sees them."""
    q, k, v = tensors
    return (
        form.round_blocks(q, options.block_q),
        form.round_blocks(k, options.block_k),
        form.round_values(v, options.block_k),
    )


def _requantized(p: Tensor, form: Format, block_k: int) -> Tensor:
    """P = exp(S - L) with the rounding that its P~ = exp(S - rowmax) had in the forward."""
    top = p.amax(-1, keepdim=True)
    top = top.masked_fill(top == 0, 1.0)
    return form.round_probabilities(p / top, block_k) * top


class BlockedBackend(Backend):
    """Plain torch on any device. It takes no alpha: the complement is the caller's."""

    name = "blocked"
    log_sum_exp_gradient = True

    def unfit(self, problem: Problem) -> str | None:
        """None: it takes every call."""
        return None

    def pool(
        self, q: Tensor, k: Tensor, lengths: Tensor | None, options: Options
    ) -> tuple[Tensor, Tensor]:
        """By pooling.pool: the CPU kernel for CPU tensors, plain torch for the others."""
        return pool(q, options.block_q), pool(k, options.block_k, lengths)

    def forward(self, call: Inputs, options: Options, save: bool) -> list[Tensor]:
        """As Backend.forward. Saved: O (B, H, N_q, d) in fp32, where the inputs have 16 bits."""
        gather, form = _Gather(call, options), options.format
        q, k, v = _rounded(_inputs(call), form, options)
        qs, ks = _blocks(q, gather.block_q), _blocks_and_a_spare(k, gather.block_k)
        vs = _blocks_and_a_spare(v, gather.block_k)
        out, lse = qs.new_empty(qs.shape), qs.new_empty(qs.shape[:2])
        scale = q.shape[-1] ** -0.5
        for rows in gather.chunks():
            scores = torch.bmm(qs[rows] * scale, gather.keys(ks, rows).transpose(1, 2))
            scores.masked_fill_(gather.hidden(rows), -torch.inf)
            top = scores.amax(-1, keepdim=True)
            top.masked_fill_(top == -torch.inf, 0.0)
            weights = scores.sub_(top).exp_()
            total = weights.sum(-1, keepdim=True)
            empty = (gather.tokens[rows].sum(-1) == 0)[:, None, None]
            weights = form.round_probabilities(weights, gather.block_k)
            acc = torch.bmm(weights, gather.keys(vs, rows)) / total.masked_fill(empty, 1.0)
            out[rows] = acc.masked_fill_(empty, 0.0)
            lse[rows] = torch.where(empty, -torch.inf, top + total.log()).squeeze(-1)
        whole = _unblocks(out, q.shape)
        lse = lse.reshape(*q.shape[:2], -1)[:, :, : q.shape[2]].contiguous()
        if call.q.dtype == q.dtype:
            return [whole.contiguous(), lse]
        found = [whole.to(call.q.dtype).contiguous(), lse]
        return [*found, whole.contiguous()] if save else found

    def saved(self, call: Inputs, options: Options) -> list[Tensor]:
        """An empty O in fp32 for inputs of 16 bits, nothing for the others."""
        q, work = call.q, work_dtype(call.q)
        return [] if q.dtype == work else [q.new_empty(q.shape, dtype=work)]

    def backward(
        self,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        call: Inputs,
        results: list[Tensor],
        options: Options,
    ) -> Grads:
        """Alg. 3: P = exp(S - L) from the original Q, K, V, or from the rounded ones ("matched").

        With dS = P (dP - D), D = rowsum(dO O). A gradient of L adds P dL to dS, which is D - dL.
        """
        gather, form = _Gather(call, options), options.format
        matched = form.low and options.qat_backward == "matched"
        tensors = _inputs(call)
        q, k, v = _rounded(tensors, form, options) if matched else tensors
        lse = results[1]
        out = results[2] if len(results) > 2 else results[0]
        qs, ks = _blocks(q, gather.block_q), _blocks_and_a_spare(k, gather.block_k)
        vs = _blocks_and_a_spare(v, gather.block_k)
        gs = _blocks(to_work(grad_out).contiguous(), gather.block_q)
        delta = (gs * _blocks(out, gather.block_q)).sum(-1, keepdim=True)
        shift = torch.zeros_like(delta)
        if grad_lse is not None:
            shift = _blocks(grad_lse.to(q.dtype)[..., None], gather.block_q)
        # A row without a key has L = -inf, and P = exp(-inf) = 0 is what it must have.
        limits = torch.where(lse == -torch.inf, torch.inf, lse)[..., None]
        limits = _blocks(limits, gather.block_q)
        dq, dk, dv = torch.zeros_like(qs), torch.zeros_like(ks), torch.zeros_like(vs)
        scale = q.shape[-1] ** -0.5
        for rows in gather.chunks():
            keys, values, grads = gather.keys(ks, rows), gather.keys(vs, rows), gs[rows]
            scores = torch.bmm(qs[rows] * scale, keys.transpose(1, 2))
            scores.masked_fill_(gather.hidden(rows), -torch.inf)
            weights = scores.sub_(limits[rows]).exp_()  # P
            d_weights = torch.bmm(grads, values.transpose(1, 2))
            used, mean = weights, delta[rows]
            if matched:
                used = _requantized(weights, form, gather.block_k)
                # D from the high-precision O = P V (Attn-QAT, arXiv 2603.00040)
                mean = (weights * d_weights).sum(-1, keepdim=True)
            d_scores = d_weights.sub_(mean - shift[rows]).mul_(weights).mul_(scale)
            dq[rows] = torch.bmm(d_scores, keys)
            index = gather.index[rows].flatten()
            shape = (-1, gather.block_k, q.shape[-1])
            part = torch.bmm(d_scores.transpose(1, 2), qs[rows]).reshape(shape)
            dk.index_add_(0, index, part)
            part = torch.bmm(used.transpose(1, 2), grads).reshape(shape)
            dv.index_add_(0, index, part)
        found = ((dq, call.q), (dk[:-1], call.k), (dv[:-1], call.v))
        d_q, d_k, d_v = (_unblocks(d, x.shape).to(x.dtype).contiguous() for d, x in found)
        return Grads(d_q, d_k, d_v, None)
