"""torch.library custom ops of the operator over the CPU kernels, with fake implementations and
autograd.

cuda_ops.py has those over the CUDA kernels, which take other inputs and keep other tensors for the
backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sla2_core.formats import formats as quantize

KERNEL_FORMATS = {"full": "none", "int8": "fp8", "int8_int8": "int8", "fp8": "fp8", "int4": "fp8"}
_ALONE = (
    1 << 22
)  # multiply-adds of a product over all selected pairs below which one thread does it


def _work(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _heads(x: Tensor):
    """(B, H, ...) -> a contiguous numpy array (B * H, ...)."""
    return x.detach().flatten(0, 1).contiguous().numpy()


def _map(
    indices: Tensor, counts: Tensor, lengths: Tensor | None, block_q: int, block_k: int, n_k: int
):
    from sla2_kernels.cpu.operator import Map

    b, h = counts.shape[:2]
    lengths = torch.full((b,), n_k) if lengths is None else lengths
    lengths = lengths.repeat_interleave(h).to(torch.int64).numpy()
    return Map(_heads(indices), _heads(counts), lengths, block_q, block_k, n_k)


def _threads(q: Tensor, indices: Tensor, block_k: int) -> int:
    pairs = q.shape[0] * q.shape[1] * q.shape[2] * indices.shape[3] * block_k
    return 1 if pairs * q.shape[3] < _ALONE else torch.get_num_threads()


def _low(q, k, v, blocks, precision: str, threads: int):
    """Q, K and V (numpy arrays of heads) as the sparse branch of a low-bit forward sees them;
    padding counts in no scale.
    """
    import numpy as np
    from sla2_kernels.cpu.quantize import quantize_blocks, quantize_channels

    formats, whole = quantize.FORMATS[precision], np.full(len(q), q.shape[1])
    return (
        quantize_blocks(q, whole, blocks.block_q, formats.qk, threads),
        quantize_blocks(k, blocks.lengths, blocks.block_k, formats.qk, threads),
        quantize_channels(v, blocks.lengths, formats.pv, threads),
    )


def cpu_stages():
    """A context manager: a dict that receives the seconds of each CPU kernel that runs inside, by
    name.
    """
    from sla2_kernels.cpu.build import stages

    return stages()


def cpu_compile_seconds() -> dict[str, float]:
    """Seconds that this process spent compiling the CPU kernels it used, or loading them from the
    cache, by name.
    """
    from sla2_kernels.cpu.build import compile_seconds

    return compile_seconds()


@torch.library.custom_op("sla2::block_means", mutates_args=(), device_types="cpu")
def block_means(x: Tensor, lengths: Tensor | None, block: int) -> Tensor:
    """Mean of the valid tokens of each block in fp32 (fp64 stays); 0 for blocks without one.

    x (B, H, N, d); lengths int64 (B,) or None -> (B, H, ceil(N / block), d).
    """
    from sla2_kernels.cpu.pool import block_means as means

    b, h, n, d = x.shape
    values = _heads(x.contiguous().view(torch.uint16) if x.dtype == torch.bfloat16 else _work(x))
    lengths = torch.full((b,), n) if lengths is None else lengths
    threads = 1 if x.numel() < _ALONE else torch.get_num_threads()
    found = means(values, lengths.repeat_interleave(h).to(torch.int64).numpy(), block, threads)
    return torch.from_numpy(found).view(b, h, -1, d)


@block_means.register_fake
def _(x, lengths, block):
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((*x.shape[:2], -(-x.shape[2] // block), x.shape[3]), dtype=work)


def _save_means(ctx, inputs, output) -> None:
    x, lengths, ctx.block = inputs
    ctx.length, ctx.dtype = x.shape[2], x.dtype
    ctx.save_for_backward(lengths)


def spread_means(grad: Tensor, block: int, length: int, lengths: Tensor | None) -> Tensor:
    """The gradient of block means (B, H, T, d), on the tokens (B, H, length, d) that they are taken
    from.
    """
    start = torch.arange(grad.shape[2], device=grad.device) * block
    last = torch.full((1,), length, device=grad.device) if lengths is None else lengths
    tokens = (last[:, None] - start).clamp(0, block)[:, None, :, None]
    grad = (grad / tokens.clamp_min(1)).repeat_interleave(block, 2)[:, :, :length]
    if lengths is not None:
        grad = (
            grad * (torch.arange(length, device=grad.device) < lengths[:, None])[:, None, :, None]
        )
    return grad


def _differentiate_means(ctx, grad):
    (lengths,) = ctx.saved_tensors
    return spread_means(grad, ctx.block, ctx.length, lengths).to(ctx.dtype), None, None


block_means.register_autograd(_differentiate_means, setup_context=_save_means)


@torch.library.custom_op("sla2::top_k", mutates_args=(), device_types="cpu")
def top_k(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest of each row, ties to the lower index, NaN first, ascending:
    int32 (B, H, T_m, count).
    """
    from sla2_kernels.cpu.route import top_k as select

    threads = 1 if scores.numel() < 1 << 16 else torch.get_num_threads()
    return torch.from_numpy(select(_heads(scores), count, threads)).view(*scores.shape[:3], count)


@top_k.register_fake
def _(scores, count):
    return scores.new_empty((*scores.shape[:3], count), dtype=torch.int32)


@torch.library.custom_op("sla2::soft_top_k", mutates_args=(), device_types="cpu")
def soft_top_k(x: Tensor, k: Tensor) -> Tensor:
    """sigmoid(x + lambda), lambda such that each row sums to k: x (..., T_n) fp32 or fp64, k (...,
    1) of x's dtype.
    """
    from sla2_kernels.cpu.softtopk import soft_top_k as solve

    rows = x.detach().reshape(-1, x.shape[-1]).contiguous().numpy()
    each = k.detach().expand(*x.shape[:-1], 1).reshape(-1).contiguous().numpy()
    return torch.from_numpy(
        solve(rows, each, 1 if x.numel() < 1 << 14 else torch.get_num_threads())
    ).view(x.shape)


@soft_top_k.register_fake
def _(x, k):
    return x.new_empty(x.shape)


@torch.library.custom_op("sla2::attention", mutates_args=(), device_types="cpu")
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    alpha: Tensor | None,
    lengths: Tensor | None,
    block_q: int,
    block_k: int,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator on a block map; K already smoothed.

    Args:
        q (B, H, N_q, d), k, v (B, H, N_k, d): float64, float32, bfloat16 or float16.
        indices int32 (B, H, T_m, K), counts int32 (B, H, T_m): BlockMap's.
        alpha: (B, H, T_m), or None for the sparse branch alone.
        lengths: int64 (B,), valid keys, or None.
        precision: a key of KERNEL_FORMATS.

    Returns:
        O (B, H, N_q, d) in q's dtype; O_s, the same in fp32 (fp64 for fp64 inputs), or empty
        without alpha, where it is O up to rounding; L (B, H, N_q), natural. Only O has a gradient.
    """
    from sla2_kernels.cpu.operator import forward

    work, threads = _work(q).dtype, _threads(q, indices, block_k)
    inputs = tuple(_heads(_work(x)) for x in (q, k, v))
    blocks = _map(indices, counts, lengths, block_q, block_k, k.shape[2])
    low = None if precision == "full" else _low(*inputs, blocks, precision, threads)
    weights = None if alpha is None else _heads(alpha.to(work))
    out, o_s, lse = forward(*inputs, blocks, weights, low, KERNEL_FORMATS[precision], threads)
    out = torch.from_numpy(out).view(q.shape).to(q.dtype)
    o_s = q.new_empty(0, dtype=work) if alpha is None else torch.from_numpy(o_s).view(q.shape)
    return out, o_s, torch.from_numpy(lse).view(q.shape[:3])


@attention.register_fake
def _(q, k, v, indices, counts, alpha, lengths, block_q, block_k, precision):
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    o_s = q.new_empty(0 if alpha is None else q.shape, dtype=work)
    return q.new_empty(q.shape), o_s, q.new_empty(q.shape[:3], dtype=work)


@torch.library.custom_op("sla2::attention_backward", mutates_args=(), device_types="cpu")
def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    alpha: Tensor | None,
    lengths: Tensor | None,
    o_s: Tensor,
    lse: Tensor,
    block_q: int,
    block_k: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dQ, dK, dV in the inputs' dtypes, and d alpha (B, H, T_m) in alpha's (empty without), from
    the forward's O_s and L.
    """
    from sla2_kernels.cpu.operator import backward

    work = _work(q).dtype
    weights = None if alpha is None else _heads(alpha.to(work))
    d_q, d_k, d_v, d_alpha = backward(
        _heads(grad_out.to(work)),
        *(_heads(x.to(work)) for x in (q, k, v)),
        _map(indices, counts, lengths, block_q, block_k, k.shape[2]),
        weights,
        _heads(o_s.to(work)),
        _heads(lse),
        _threads(q, indices, block_k),
    )
    grads = (
        torch.from_numpy(d).view(x.shape).to(x.dtype) for d, x in ((d_q, q), (d_k, k), (d_v, v))
    )
    d_alpha = (
        q.new_empty(0)
        if alpha is None
        else torch.from_numpy(d_alpha).view(counts.shape).to(alpha.dtype)
    )
    return (*grads, d_alpha)


@attention_backward.register_fake
def _(grad_out, q, k, v, indices, counts, alpha, lengths, o_s, lse, block_q, block_k):
    d_alpha = q.new_empty(0) if alpha is None else alpha.new_empty(counts.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_alpha


def _save(ctx, inputs, output) -> None:
    q, k, v, indices, counts, alpha, lengths, ctx.block_q, ctx.block_k, _ = inputs
    out, o_s, lse = output
    ctx.save_for_backward(
        q, k, v, indices, counts, alpha, lengths, out if alpha is None else o_s, lse
    )
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_out, _grad_o_s, _grad_lse):
    if grad_out is None:
        return (None,) * 10
    q, k, v, indices, counts, alpha, lengths, o_s, lse = ctx.saved_tensors
    d_q, d_k, d_v, d_alpha = attention_backward(
        grad_out, q, k, v, indices, counts, alpha, lengths, o_s, lse, ctx.block_q, ctx.block_k
    )
    return d_q, d_k, d_v, None, None, None if alpha is None else d_alpha, None, None, None, None


attention.register_autograd(_differentiate, setup_context=_save)
