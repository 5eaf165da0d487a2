"""SoftTop-k (Eq. 17): a differentiable relaxation of top-k whose rows sum to k, with its exact
gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sla2_core.backends import kernels

_ITERATIONS = {torch.float64: 64, torch.float32: 36}


class _SoftTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, k: Tensor, tau: float) -> Tensor:
        x = scores / tau
        ctx.tau = tau
        out = kernels.soft_top_k(x, k) if x.device.type == "cpu" else _bisect(x, k)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (out,) = ctx.saved_tensors
        weight = out * (1 - out)
        total = weight.sum(-1, keepdim=True)
        mean = (grad * weight).sum(-1, keepdim=True) / total.clamp_min(torch.finfo(out.dtype).tiny)
        return weight / ctx.tau * (grad - mean), None, None


def _bisect(x: Tensor, k: Tensor) -> Tensor:
    """sigmoid(x + lambda), lambda by bisection: the plain form, for every device; the CPU's kernel
    must agree with it.
    """
    live = x != -torch.inf
    valid = live.sum(-1, keepdim=True)
    # With every sigmoid equal to k / T_n at the row's maximum the sum is at most k, at its minimum
    # at least k.
    share = (k / valid).clamp(max=1.0)
    centre = torch.logit(share.clamp(1e-7, 1 - 1e-7))
    low = centre - x.amax(-1, keepdim=True)
    high = centre - x.masked_fill(~live, torch.inf).amin(-1, keepdim=True)
    for _ in range(_ITERATIONS[x.dtype]):
        middle = (low + high) / 2
        over = torch.sigmoid(x + middle).sum(-1, keepdim=True) > k
        high = torch.where(over, middle, high)
        low = torch.where(over, low, middle)
    out = torch.sigmoid(x + (low + high) / 2)
    out = torch.where(k >= valid, live.to(x.dtype), out)  # every block: nothing to choose
    out = torch.where(torch.isnan(x).any(-1, keepdim=True), torch.nan, out)
    return out


def soft_topk(scores: Tensor, k: int | float | Tensor, tau: float = 0.1) -> Tensor:
    """m = sigmoid(scores / tau + lambda), lambda by bisection so that each row sums to k (Eq. 17).

    Args:
        scores: floating (..., T_n); -inf marks a block that cannot be chosen. 16-bit scores are
            computed in float32.
        k: how many blocks a row chooses, 0 < k <= T_n; a number, or a tensor that broadcasts to
            (..., 1).
        tau: temperature > 0.

    Returns:
        The soft mask in [0, 1], shape of `scores`. Its gradient is exact through the constraint:
        dL/dP_j = (w_j / tau) (g_j - sum_l g_l w_l / sum_l w_l), w = m (1 - m).

    Raises:
        ValueError: scores without an axis; k (a number: a tensor's values are the caller's) or tau
            outside its range.
        TypeError: scores no floating tensor.
    """
    if not isinstance(scores, Tensor) or not scores.dtype.is_floating_point:
        raise TypeError(
            "scores: expected a floating tensor, got"
            f" {getattr(scores, 'dtype', type(scores).__name__)}"
        )
    if scores.ndim == 0:
        raise ValueError("scores: expected at least one dimension (..., T_n), got shape ()")
    if not tau > 0:
        raise ValueError(f"tau: expected a number > 0, got {tau}")
    if not isinstance(k, Tensor) and not 0 < k <= scores.shape[-1]:
        raise ValueError(f"k: expected a number in (0, {scores.shape[-1]}], got {k}")
    work = scores if scores.dtype == torch.float64 else scores.float()
    k = torch.as_tensor(k, dtype=work.dtype, device=work.device)
    return _SoftTopK.apply(work, k, tau).to(scores.dtype)
