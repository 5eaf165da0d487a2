"""The torch.library operators: shapes for torch.compile, and autograd, over every backend.

`attention` is the operator on a block map by any backend; the others are CPU kernels that routing
and stage 1 use.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sla2_core.backends.base import Backend, Inputs, to_work, work_dtype
from sla2_core.backends.cpu import heads_of
from sla2_core.backends.pooling import spread_means
from sla2_core.block_map import num_blocks
from sla2_core.checks import without_autocast
from sla2_core.options import Options

BACKENDS: dict[str, Backend] = {}
_ALONE = 1 << 22  # elements below which one thread does it


def register_backend(backend: Backend) -> Backend:
    """Make a backend known by its name, in place of one that had it; returns it."""
    BACKENDS[backend.name] = backend
    return backend


@torch.library.custom_op("sla2::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    alpha: Tensor | None,
    lengths: Tensor | None,
    options: str,
    backend: str,
    save: bool,
) -> list[Tensor]:
    """The operator on a block map: see Backend.forward for what goes in and comes out.

    `options` is Options.text, `backend` a name in BACKENDS. O has a gradient, and L where the
    backend says so.
    """
    call = Inputs(q, k, v, indices, counts, alpha, lengths)
    with without_autocast(q):
        return BACKENDS[backend].forward(call, Options.read(options), save)


@attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    alpha: Tensor | None,
    lengths: Tensor | None,
    options: str,
    backend: str,
    save: bool,
) -> list[Tensor]:
    chosen = BACKENDS[backend]
    lse = q.new_empty(q.shape[:3], dtype=work_dtype(q))
    call = Inputs(q, k, v, indices, counts, alpha, lengths)
    kept = chosen.saved(call, Options.read(options)) if save else []
    return [chosen.empty_out(q), lse, *kept]


@torch.library.custom_op("sla2::attention_backward", mutates_args=())
def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    alpha: Tensor | None,
    lengths: Tensor | None,
    results: list[Tensor],
    options: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dQ, dK, dV in the inputs' dtypes, and d alpha (B, H, T_m) in alpha's (empty without)."""
    call = Inputs(q, k, v, indices, counts, alpha, lengths)
    chosen = BACKENDS[backend]
    with without_autocast(q):  # which may be on where backward() is called
        found = chosen.backward(grad_out, grad_lse, call, results, Options.read(options))
    d_alpha = q.new_empty(0) if found.alpha is None else found.alpha
    return found.q, found.k, found.v, d_alpha


@attention_backward.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    alpha: Tensor | None,
    lengths: Tensor | None,
    results: list[Tensor],
    options: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_alpha = q.new_empty(0) if alpha is None else alpha.new_empty(counts.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_alpha


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.options, ctx.backend, save = inputs
    if not save:
        raise RuntimeError("sla2::attention: expected save=True where a gradient is wanted")
    ctx.save_for_backward(*tensors, *output)
    first = 2 if BACKENDS[ctx.backend].log_sum_exp_gradient else 1
    ctx.mark_non_differentiable(*output[first:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    grad_out, grad_lse = grads[:2]
    if grad_out is None and grad_lse is None:
        return (None,) * 10
    saved = ctx.saved_tensors  # read once: gradient checkpointing allows no more
    (*call, alpha, lengths), results = saved[:7], list(saved[7:])
    if grad_out is None:
        grad_out = torch.zeros_like(results[0])
    d_q, d_k, d_v, d_alpha = attention_backward(
        grad_out, grad_lse, *call, alpha, lengths, results, ctx.options, ctx.backend
    )
    return d_q, d_k, d_v, None, None, None if alpha is None else d_alpha, *(None,) * 4


attention.register_autograd(_differentiate, setup_context=_save)


def run(
    call: Inputs, options: Options, backend: Backend, log_sum_exp_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """O (B, H, N_q, d) and L (B, H, N_q) of a call by a backend, see Backend.forward.

    O has gradients for q, k, v and alpha; L has them with `log_sum_exp_gradient`, which asks for a
    backend that gives them.
    """
    if backend.by_autograd:
        out, lse = backend.forward(call, options, save=False)
        return out, lse if log_sum_exp_gradient else lse.detach()
    differentiable = (call.q, call.k, call.v, call.alpha)
    save = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in differentiable
    )
    out, lse, *_ = attention(*call, options.text, backend.name, save)
    return out, lse if log_sum_exp_gradient else lse.detach()


@torch.library.custom_op("sla2::block_means", mutates_args=(), device_types="cpu")
def block_means(x: Tensor, lengths: Tensor | None, block: int) -> Tensor:
    """pooling.block_means by the CPU kernel.

    x (B, H, N, d); lengths int64 (B,) or None -> (B, H, ceil(N / block), d).
    """
    from sla2_kernels.cpu.pool import block_means as means

    b, h, n, d = x.shape
    values = x.contiguous().view(torch.uint16) if x.dtype == torch.bfloat16 else to_work(x)
    lengths = torch.full((b,), n) if lengths is None else lengths
    threads = 1 if x.numel() < _ALONE else torch.get_num_threads()
    valid = lengths.repeat_interleave(h).to(torch.int64).numpy()
    return torch.from_numpy(means(heads_of(values), valid, block, threads)).view(b, h, -1, d)


@block_means.register_fake
def _(x: Tensor, lengths: Tensor | None, block: int) -> Tensor:
    return x.new_empty(
        (*x.shape[:2], num_blocks(x.shape[2], block), x.shape[3]), dtype=work_dtype(x)
    )


def _save_means(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, lengths, ctx.block = inputs
    ctx.length, ctx.dtype = x.shape[2], x.dtype
    ctx.save_for_backward(lengths)


def _differentiate_means(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
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
    found = select(heads_of(scores), count, threads)
    return torch.from_numpy(found).view(*scores.shape[:3], count)


@top_k.register_fake
def _(scores: Tensor, count: int) -> Tensor:
    return scores.new_empty((*scores.shape[:3], count), dtype=torch.int32)


@torch.library.custom_op("sla2::soft_top_k", mutates_args=(), device_types="cpu")
def soft_top_k(x: Tensor, k: Tensor) -> Tensor:
    """sigmoid(x + lambda), lambda such that each row sums to k: x (..., T_n) fp32 or fp64, k
    (..., 1) of x's dtype.
    """
    from sla2_kernels.cpu.softtopk import soft_top_k as solve

    rows = x.detach().reshape(-1, x.shape[-1]).contiguous().numpy()
    each = k.detach().expand(*x.shape[:-1], 1).reshape(-1).contiguous().numpy()
    threads = 1 if x.numel() < 1 << 14 else torch.get_num_threads()
    return torch.from_numpy(solve(rows, each, threads)).view(x.shape)


@soft_top_k.register_fake
def _(x: Tensor, k: Tensor) -> Tensor:
    return x.new_empty(x.shape)
