"""The torch.library operator on a block map, by any backend: shapes for torch.compile, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sla2_core.backends.base import Backend, Inputs, work_dtype
from sla2_core.checks import without_autocast
from sla2_core.options import Options
from sla2_core.registry import BACKENDS


def register_backend(backend: Backend) -> Backend:
    """Make a backend known by its name, in place of one that had it; returns it.

    `backend=NAME` then chooses it everywhere; "auto" never does.
    """
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
