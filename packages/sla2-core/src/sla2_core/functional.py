"""The functions other research code calls: sla2_attention, sla_attention,
block_sparse_attention.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from sla2_core import reference
from sla2_core.backends import blocked as streamed
from sla2_core.backends import cpu as ops
from sla2_core.backends import cuda as cuda_ops
from sla2_core.block_map import BlockMap, Rows
from sla2_core.checks import (
    autocast_qkv,
    check_alpha,
    check_backend,
    check_block_map,
    check_choice,
    check_kv_lengths,
    check_precision,
    check_qkv,
)
from sla2_core.config import QAT_BACKWARDS
from sla2_core.routing.router import smooth_keys

CUDA_BACKENDS = ("cuda", "emulator")


def resolve_backend(
    backend: str, device: torch.device, unfit: Callable[[str], str | None] = lambda _: None
) -> str:
    """The backend that runs for tensors on `device`: "cpu", "cuda", "emulator" or "reference".

    "auto" takes the CPU kernels for CPU tensors and the CUDA kernels for CUDA tensors; where those
    are missing, or unfit(), called with "cuda" or "emulator", says why they cannot take the call,
    it falls back to the dense reference with one warning. For an explicit choice: RuntimeError
    naming what is missing, ValueError with what unfit() says.
    """
    check_backend(backend)
    if backend == "auto":
        if device.type == "cpu":
            return "cpu"
        reason = (
            cuda_ops.missing() if device.type == "cuda" else f"no kernels for {device.type} tensors"
        )
        if reason := reason or unfit("cuda"):
            _warn_fallback(reason)
            return "reference"
        return "cuda"
    if backend == "cuda" and (reason := cuda_ops.missing()):
        raise RuntimeError(f"backend='cuda': {reason}")
    kind = {"cpu": "cpu", "cuda": "cuda", "emulator": "cpu"}.get(backend, device.type)
    if device.type != kind:
        raise RuntimeError(
            f"backend: expected {kind.upper()} tensors for {backend!r}, got tensors on {device}"
        )
    if backend in ("cuda", "emulator") and (reason := unfit(backend)):
        raise ValueError(reason)
    return backend


@functools.cache
def _warn_fallback(reason: str) -> None:
    warnings.warn(
        f"sla2: the dense reference runs, with N x N memory: {reason}", RuntimeWarning, stacklevel=5
    )


def backend_for(q: Tensor, blocks: tuple[int, int], precision: str, backend: str) -> str:
    """resolve_backend for a call of the operator on q (B, H, N_q, d) with blocks of (block_q,
    block_k) tokens.
    """
    sizes = (q.dtype, q.shape[3], blocks, precision)
    return resolve_backend(
        backend, q.device, lambda target: cuda_ops.unfit(target, q.device.index, *sizes)
    )


def _work(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _valid_blocks(block_map: BlockMap, kv_lengths: Tensor | None) -> Tensor:
    """bool (B|1, 1, 1, T_n): blocks that hold at least one valid token."""
    start = torch.arange(block_map.shape[3], device=block_map.indices.device) * block_map.block_k
    if kv_lengths is None:
        return torch.ones_like(start, dtype=torch.bool)[None, None, None]
    return (start < kv_lengths[:, None])[:, None, None, :]


def _simulated(precision: str, qat_backward: str) -> bool:
    """Low-bit settings that no kernel has: formats beyond the kernels', and the backward that
    rounds again.
    """
    return precision not in ops.KERNEL_FORMATS or (
        precision != "full" and qat_backward == "matched"
    )


def _attention(
    q, k, v, block_map: BlockMap, alpha, lengths, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    return ops.attention(
        q,
        k,
        v,
        block_map.indices,
        block_map.counts,
        alpha,
        lengths,
        block_map.block_q,
        block_map.block_k,
        precision,
    )


def _cuda_attention(
    q,
    k,
    v,
    block_map: BlockMap,
    alpha,
    lengths,
    precision: str,
    qat_backward: str,
    smooth_k: bool,
    target: str,
) -> tuple[Tensor, Tensor]:
    save = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, alpha)
    )
    sizes = (lengths, block_map.block_q, block_map.block_k)
    out, lse, *_ = cuda_ops.attention(
        q,
        k,
        v,
        block_map.indices,
        block_map.counts,
        alpha,
        *sizes,
        precision,
        qat_backward,
        smooth_k,
        save,
        target,
    )
    return out, lse


def _linear_attention(q, k, v, block_map: BlockMap, lengths, backend: str) -> Tensor:
    """Linear attention over all blocks, in fp32 or fp64: the operator where nothing is selected."""
    nothing = BlockMap._trusted(
        Rows(torch.full_like(block_map.indices[..., :1], -1), torch.zeros_like(block_map.counts)),
        block_q=block_map.block_q,
        block_k=block_map.block_k,
        n_q=block_map.n_q,
        n_k=block_map.n_k,
    )
    alpha = torch.zeros(block_map.counts.shape, dtype=_work(q).dtype, device=q.device)
    if backend == "reference":
        inputs = (_work(x) for x in (q, k, v))
        return reference.sla2_reference(*inputs, nothing, alpha, smooth_k=False, kv_lengths=lengths)
    if backend in CUDA_BACKENDS:
        return _work(
            _cuda_attention(q, k, v, nothing, alpha, lengths, "full", "paper", False, backend)[0]
        )
    return _attention(_work(q), _work(k), _work(v), nothing, alpha, lengths, "full")[0]


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: BlockMap,
    *,
    precision: str = "full",
    qat_backward: str = "paper",
    kv_lengths=None,
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
        kv_lengths: None, or one integer in [1, N_k] per batch item.
        backend: "auto" | "reference" | "cpu" | "cuda" | "emulator".

    Returns:
        O_s (B, H, N_q, d) in q's dtype, and L (B, H, N_q), the natural log-sum-exp of the selected
        scores in fp32 (fp64 for fp64 inputs), without gradient. A row that selects nothing has 0
        and -inf.

    Raises:
        TypeError, ValueError: an argument of another type, shape, dtype or device. RuntimeError:
            the backend is missing.
    """
    q, k, v = autocast_qkv(q, k, v)
    check_qkv(q, k, v)
    check_block_map(block_map, q, k)
    check_precision(precision)
    check_choice("qat_backward", qat_backward, QAT_BACKWARDS)
    lengths = check_kv_lengths(kv_lengths, q, k)
    blocks = (block_map.block_q, block_map.block_k)
    backend = backend_for(q, blocks, precision, backend)
    with torch.autocast(q.device.type, enabled=False):
        if backend == "reference":
            options = dict(precision=precision, qat_backward=qat_backward, kv_lengths=lengths)
            out, lse = reference.block_sparse_reference(q, k, v, block_map, **options)
            return out, lse.detach()
        if backend in CUDA_BACKENDS:
            out, lse = _cuda_attention(
                q, k, v, block_map, None, lengths, precision, qat_backward, False, backend
            )
            return out, lse.detach()
        if _simulated(precision, qat_backward):
            out, lse = streamed.sparse_branch(
                _work(q), _work(k), _work(v), block_map, lengths, precision, qat_backward
            )
            return out.to(q.dtype), lse
        out, _, lse = _attention(q, k, v, block_map, None, lengths, precision)
        return out, lse.detach()


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
    kv_lengths=None,
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
        (B, H, N_q, d) in q's dtype; gradients reach q, k, v and alpha, none the block map.

    Raises:
        As block_sparse_attention.
    """
    q, k, v = autocast_qkv(q, k, v)
    check_qkv(q, k, v)
    check_block_map(block_map, q, k)
    check_precision(precision)
    check_choice("qat_backward", qat_backward, QAT_BACKWARDS)
    alpha = check_alpha(alpha, q, block_map.shape[2])
    lengths = check_kv_lengths(kv_lengths, q, k)
    blocks = (block_map.block_q, block_map.block_k)
    backend = backend_for(q, blocks, precision, backend)
    with torch.autocast(q.device.type, enabled=False):
        if backend == "reference":
            options = dict(
                precision=precision,
                qat_backward=qat_backward,
                smooth_k=smooth_k,
                kv_lengths=lengths,
            )
            return reference.sla2_reference(q, k, v, block_map, alpha, **options)
        alpha = alpha.expand(block_map.shape[:3])
        if backend in CUDA_BACKENDS:
            return _cuda_attention(
                q, k, v, block_map, alpha, lengths, precision, qat_backward, smooth_k, backend
            )[0]
        keys = smooth_keys(_work(k), lengths) if smooth_k else k
        if not _simulated(precision, qat_backward):
            return _attention(q, keys, v, block_map, alpha, lengths, precision)[0]
        queries, keys, values = _work(q), _work(keys), _work(v)
        o_s, _ = streamed.sparse_branch(
            queries, keys, values, block_map, lengths, precision, qat_backward
        )
        o_l = _attention(
            queries, keys, values, block_map, torch.zeros_like(alpha), lengths, "full"
        )[0]
        mask, valid = block_map.mask(), _valid_blocks(block_map, lengths)
        nothing, everything = ~(mask & valid).any(-1), ~(~mask & valid).any(-1)
        weight = torch.where(everything, 1.0, torch.where(nothing, 0.0, alpha.to(queries.dtype)))
        weight = weight.repeat_interleave(block_map.block_q, 2)[:, :, : q.shape[2], None]
        return torch.lerp(o_l, o_s, weight.expand(o_s.shape)).to(q.dtype)


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
    kv_lengths=None,
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
        (B, H, N_q, d) in q's dtype.

    Raises:
        As block_sparse_attention; ValueError for a projection of another shape.
    """
    q, k, v = autocast_qkv(q, k, v)
    options = dict(
        precision=precision, qat_backward=qat_backward, kv_lengths=kv_lengths, backend=backend
    )
    o_s, _ = block_sparse_attention(q, k, v, block_map, **options)
    d = q.shape[3]
    for name, x, shape in (("proj_weight", proj_weight, (d, d)), ("proj_bias", proj_bias, (d,))):
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(x.shape)}")
    lengths = check_kv_lengths(kv_lengths, q, k)
    backend = backend_for(q, (block_map.block_q, block_map.block_k), "full", backend)
    with torch.autocast(q.device.type, enabled=False):
        if proj_weight is None:
            o_l = torch.zeros_like(_work(q))
        else:
            o_l = _linear_attention(q, k, v, block_map, lengths, backend)
            o_l = o_l @ proj_weight.to(o_l.dtype).t()
        if proj_bias is not None:
            o_l = o_l + proj_bias.to(o_l.dtype)
        return (o_s.to(o_l.dtype) + o_l).to(q.dtype)
