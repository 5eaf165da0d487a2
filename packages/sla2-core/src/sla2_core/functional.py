"""The functions other research code calls: sla2_attention, pooled_attention, sla_attention and
block_sparse_attention.

They check their arguments and hand over to attend.py, which checks nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sla2_core.attend import Parts, attend, everywhere
from sla2_core.backends import backend_for, ops
from sla2_core.backends.base import Inputs, to_work
from sla2_core.block_map import BlockMap
from sla2_core.checks import (
    autocast_qkv,
    check_alpha,
    check_backend,
    check_block_map,
    check_choice,
    check_kv_lengths,
    check_precision,
    check_qkv,
    without_autocast,
)
from sla2_core.complement.linear import Linear
from sla2_core.complement.pooled import Pooled
from sla2_core.complement.projected import project
from sla2_core.config import QAT_BACKWARDS
from sla2_core.mixing import Mixing
from sla2_core.mixing.joint import Joint
from sla2_core.options import Options, make_options
from sla2_core.registry import Heads

Lengths = Tensor | Sequence[int] | None


class _Given(Mixing):
    """An alpha that the caller gives."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)


class _GivenBias(Pooled):
    """A b that the caller gives."""

    def __init__(self, bias: Tensor | None) -> None:
        torch.nn.Module.__init__(self)
        self.given = bias

    def bias_of(self, heads: Heads = None) -> Tensor | None:
        return self.given


class _OneSoftmax(Joint):
    def __init__(self) -> None:
        torch.nn.Module.__init__(self)


_PARTS, _JOINT = Parts(Linear(), _Given()), _OneSoftmax()


def _checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: BlockMap,
    precision: str,
    qat_backward: str,
    smooth_k: bool,
    kv_lengths: Lengths,
    backend: str,
    complement: str = "linear",
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Options]:
    """q, k, v in the dtype of the call, the lengths, and the options."""
    q, k, v = autocast_qkv(q, k, v)
    check_qkv(q, k, v)
    check_block_map(block_map, q, k)
    check_precision(precision)
    check_choice("qat_backward", qat_backward, QAT_BACKWARDS)
    check_backend(backend)
    lengths = check_kv_lengths(kv_lengths, q, k)
    sizes = (block_map.block_q, block_map.block_k)
    options = make_options(*sizes, precision, qat_backward, smooth_k, complement)
    return q, k, v, lengths, options


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: BlockMap,
    *,
    precision: str = "full",
    qat_backward: str = "paper",
    kv_lengths: Lengths = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Exact softmax attention over the selected blocks only (Alg. 2, sparse branch).

    Args:
        q: (B, H, N_q, d) float64, float32, bfloat16 or float16. k, v: (B, H, N_k, d), same dtype
            and device. Under autocast they are taken in its dtype, as by
            scaled_dot_product_attention.
        block_map: the selected blocks, made for these lengths.
        precision: "full" | "int8" | "int8_int8" | "fp8" | "int4" | "nvfp4", of the forward.
        qat_backward: "paper" or "matched", what the backward of a low-bit forward recomputes.
        kv_lengths: None, or one integer in [1, N_k] per batch item. On a GPU the values are not
            read and not checked.
        backend: "auto" | "reference" | "blocked" | "cpu" | "cuda" | "emulator", or one that
            backends.register_backend made known. "auto" takes the kernels of the tensors' device,
            and `blocked` with one warning where they cannot.

    Returns:
        O_s (B, H, N_q, d) in q's dtype (autocast's under autocast), and L (B, H, N_q), the natural
        log-sum-exp of the selected scores in fp32 (fp64 for fp64 inputs), without gradient. A row
        that selects nothing has 0 and -inf.

    Raises:
        TypeError, ValueError: an argument of another type, shape, dtype or device. RuntimeError:
            the backend is missing.
    """
    q, k, v, lengths, options = _checked(
        q, k, v, block_map, precision, qat_backward, False, kv_lengths, backend
    )
    chosen = backend_for(q, options, backend)
    with without_autocast(q):
        call = Inputs(q, k, v, block_map.indices, block_map.counts, None, lengths)
        return ops.run(call, options, chosen)


def sla2_attention(
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
    backend: str = "auto",
) -> Tensor:
    """O = alpha O_s + (1 - alpha) O_l: softmax over the selected blocks, linear attention over the
    others (Eq. 13-16).

    Args:
        q, k, v, block_map, precision, qat_backward, kv_lengths, backend: as for
            block_sparse_attention.
        alpha: a number, or a tensor (B|1, H|1, T_m|1) with values in [0, 1]. Query blocks that
            select nothing count as 0, those that select every block as 1.
        smooth_k: subtract the mean over tokens from K first.

    Returns:
        (B, H, N_q, d) in q's dtype (autocast's under autocast); gradients reach q, k, v and alpha,
        none the block map.

    Raises:
        As block_sparse_attention.
    """
    q, k, v, lengths, options = _checked(
        q, k, v, block_map, precision, qat_backward, smooth_k, kv_lengths, backend
    )
    alpha = check_alpha(alpha, q, block_map.shape[2])
    chosen = backend_for(q, options, backend)
    with without_autocast(q):
        return attend(
            q, k, v, block_map, alpha, _PARTS, lengths=lengths, options=options, backend=chosen
        )


def pooled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: BlockMap,
    bias: Tensor | None = None,
    *,
    precision: str = "full",
    qat_backward: str = "paper",
    smooth_k: bool = True,
    kv_lengths: Lengths = None,
    backend: str = "auto",
) -> Tensor:
    """One softmax over the tokens of the selected blocks and one pooled key for each other block,
    with log(tokens of the block) + bias added to its logit; see complement.pooled.Pooled.

    Args:
        q, k, v, block_map, precision, qat_backward, kv_lengths, backend: as for
            block_sparse_attention. `precision` rounds the selected part.
        bias: floating (H,), b of each head; None is 0.
        smooth_k: subtract the mean over tokens from K first, which matters to low bit alone.

    Returns:
        (B, H, N_q, d) in q's dtype (autocast's under autocast); gradients reach q, k, v and bias,
        none the block map.

    Raises:
        As block_sparse_attention; TypeError, ValueError for another bias.
    """
    q, k, v, lengths, options = _checked(
        q, k, v, block_map, precision, qat_backward, smooth_k, kv_lengths, backend, "pooled"
    )
    if bias is not None:
        if not isinstance(bias, Tensor) or not bias.dtype.is_floating_point:
            kind = bias.dtype if isinstance(bias, Tensor) else type(bias).__name__
            raise TypeError(f"bias: expected a floating torch.Tensor, got {kind}")
        if tuple(bias.shape) != (q.shape[1],) or bias.device != q.device:
            raise ValueError(
                f"bias: expected shape {(q.shape[1],)} on {q.device}, got {tuple(bias.shape)} on"
                f" {bias.device}"
            )
    chosen = backend_for(q, options, backend)
    parts = Parts(_GivenBias(bias), _JOINT)
    with without_autocast(q):
        return attend(
            q, k, v, block_map, None, parts, lengths=lengths, options=options, backend=chosen
        )


def sla_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: BlockMap,
    proj_weight: Tensor | None = None,
    proj_bias: Tensor | None = None,
    *,
    precision: str = "full",
    qat_backward: str = "paper",
    kv_lengths: Lengths = None,
    backend: str = "auto",
) -> Tensor:
    """SLA as published (arXiv 2509.24006): O = O_s + proj(O_l), O_l over all blocks, not the
    complement; K not smoothed.

    Args:
        q, k, v, block_map, precision, qat_backward, kv_lengths, backend: as for
            block_sparse_attention.
        proj_weight: (d, d) as of nn.Linear, shared by the heads; None is the zero matrix it starts
            from.
        proj_bias: (d,) or None.

    Returns:
        (B, H, N_q, d) in q's dtype (autocast's under autocast).

    Raises:
        As block_sparse_attention; ValueError for a projection of another shape.
    """
    q, k, v, lengths, options = _checked(
        q, k, v, block_map, precision, qat_backward, False, kv_lengths, backend
    )
    d = q.shape[3]
    for name, x, shape in (("proj_weight", proj_weight, (d, d)), ("proj_bias", proj_bias, (d,))):
        if x is not None and not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(x.shape)}")
    chosen = backend_for(q, options, backend)
    with without_autocast(q):
        call = Inputs(q, k, v, block_map.indices, block_map.counts, None, lengths)
        o_s = to_work(ops.run(call, options, chosen)[0])
        if proj_weight is None:
            return project(torch.zeros_like(o_s), None, proj_bias).add(o_s).to(q.dtype)
        rest = everywhere(q, k, v, block_map, lengths, options, chosen)
        return (o_s + project(rest, proj_weight, proj_bias)).to(q.dtype)
