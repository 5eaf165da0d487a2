"""SLA2Attention and SLAAttention: q, k, v in, attention output out, with the router and the mixing
ratio inside.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sla2_core.backends import cuda as cuda_ops
from sla2_core.block_map import BlockMap, Rows
from sla2_core.checks import autocast_qkv, check_choice, check_kv_lengths, check_qkv
from sla2_core.config import SLA2Config, heuristic_router
from sla2_core.functional import CUDA_BACKENDS, backend_for, sla2_attention, sla_attention
from sla2_core.mixing.mixing import Mixing
from sla2_core.routing.router import Float32Module, Router, pool, smooth_pooled, top_k_map

LAYOUTS = ("bhnd", "bnhd")


@dataclass(frozen=True)
class AttentionInfo:
    """What a call did: its block map, alpha (B|1, H|1, T_m|1), and the measured sparsity of the
    map.
    """

    block_map: BlockMap
    alpha: Tensor | None
    sparsity: float


def pooled_means(
    q: Tensor, k: Tensor, config: SLA2Config, lengths: Tensor | None, smooth: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """What the router sees: block means of q (B, H, T_m, d) and, with `smooth`, of K minus its mean
    (B, H, T_n, d).
    """
    if backend in CUDA_BACKENDS:
        pooled_q, pooled_k = cuda_ops.pool(q, k, lengths, config.block_q, config.block_k, backend)
    else:
        pooled_q, pooled_k = pool(q, config.block_q), pool(k, config.block_k, lengths)
    if smooth:
        pooled_k = smooth_pooled(pooled_k, k.shape[2], config.block_k, lengths)
    return pooled_q, pooled_k


class _RoutedAttention(nn.Module):
    """Layouts, checks and routing that both modules share."""

    config: SLA2Config
    router: Router

    def _enter(self, q: Tensor, k: Tensor, v: Tensor, layout: str, kv_lengths):
        check_choice("layout", layout, LAYOUTS)
        if layout == "bnhd":
            shapes = [
                tuple(x.shape) for x in (q, k, v) if isinstance(x, Tensor)
            ]  # check_qkv names what is no tensor
            if any(len(shape) != 4 for shape in shapes):
                raise ValueError(
                    f"q, k, v: expected 4 dimensions (B, N, H, d), got shapes {shapes}"
                )
            q, k, v = (x.transpose(1, 2) if isinstance(x, Tensor) else x for x in (q, k, v))
        q, k, v = autocast_qkv(q, k, v)
        check_qkv(q, k, v)
        for name, index, expected in (
            ("num_heads", 1, self.config.num_heads),
            ("head_dim", 3, self.config.head_dim),
        ):
            if q.shape[index] != expected:
                raise ValueError(
                    f"q: expected {name}={expected} as in the configuration, got {q.shape[index]}"
                )
        lengths, backend = check_kv_lengths(kv_lengths, q, k), self.backend_of(q)
        if (
            backend not in CUDA_BACKENDS
        ):  # whose kernels take any layout; here pooling and attention would both copy
            q, k, v = (x.contiguous() for x in (q, k, v))
        return q, k, v, lengths, backend

    def _route(
        self, q: Tensor, k: Tensor, lengths: Tensor | None, smooth: bool, backend: str
    ) -> tuple[Tensor, BlockMap]:
        config, router = self.config, self.router
        sizes = dict(block_q=config.block_q, block_k=config.block_k, n_q=q.shape[2], n_k=k.shape[2])
        pooled_q, pooled_k = pooled_means(q, k, config, lengths, smooth, backend)
        if backend in CUDA_BACKENDS:
            scores, indices, counts = cuda_ops.route(
                pooled_q,
                pooled_k,
                router.weight_q,
                router.weight_k,
                lengths,
                *sizes.values(),
                config.topk,
                backend,
            )
            return scores, BlockMap._trusted(Rows(indices, counts), **sizes)
        scores = router.scores(pooled_q, pooled_k)
        block_map = top_k_map(scores, config.topk, kv_lengths=lengths, **sizes)
        if lengths is not None:
            start = torch.arange(scores.shape[-1], device=q.device) * config.block_k
            scores = scores.masked_fill((start >= lengths[:, None])[:, None, None], -torch.inf)
        return scores, block_map

    def backend_of(self, q: Tensor) -> str:
        """The backend that a call with this q runs on; errors as of sla2_attention."""
        c = self.config
        return backend_for(q, (c.block_q, c.block_k), c.precision, c.backend)

    def extra_repr(self) -> str:
        c = self.config
        return (
            f"topk={c.topk}, blocks={c.block_q}x{c.block_k}, alpha={c.alpha}, router={c.router},"
            f" precision={c.precision}"
        )


class SLA2Attention(_RoutedAttention):
    """SLA2 (arXiv 2602.12675) as a drop-in for scaled_dot_product_attention.

    Its parameters (`router.weight_q`, `router.weight_k`, and `mixing`'s logits) are made here and
    stay in fp32 under `.to(bfloat16)`. `config` may be replaced between calls as long as no
    parameter's shape depends on the change.

    Args:
        config: an SLA2Config with method="sla2".
    """

    def __init__(self, config: SLA2Config):
        super().__init__()
        if config.method != "sla2":
            raise ValueError(f"method: expected 'sla2', got {config.method!r}")
        self.config = config
        self.router = Router(config)
        self.mixing = Mixing(config)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        layout: str = "bhnd",
        kv_lengths=None,
        return_info: bool = False,
    ):
        """Attention output in q's dtype and layout; with `return_info` also an AttentionInfo.

        Args:
            q: (B, H, N_q, d), or (B, N_q, H, d) with layout="bnhd". k, v: the same with N_k. Under
                autocast they are taken in its dtype, as by scaled_dot_product_attention.
            kv_lengths: None, or one integer in [1, N_k] per batch item.

        Raises:
            TypeError, ValueError: an argument of another shape, dtype or device than the
                configuration or q's.
        """
        q, k, v, lengths, backend = self._enter(q, k, v, layout, kv_lengths)
        config = self.config
        with torch.autocast(q.device.type, enabled=False):
            with torch.set_grad_enabled(torch.is_grad_enabled() and config.alpha == "mass"):
                scores, block_map = self._route(q, k, lengths, config.smooth_k, backend)
            alpha = self.mixing(scores, block_map.mask() if config.alpha == "mass" else None)
        out = sla2_attention(
            q,
            k,
            v,
            block_map,
            alpha,
            precision=config.precision,
            qat_backward=config.qat_backward,
            smooth_k=config.smooth_k,
            kv_lengths=lengths,
            backend=backend,
        )
        out = out.transpose(1, 2) if layout == "bnhd" else out
        return (
            (out, AttentionInfo(block_map, alpha.detach(), block_map.sparsity))
            if return_info
            else out
        )


class _Projection(Float32Module):
    """A zero-initialised d x d linear map shared by the heads, kept in fp32."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(head_dim, head_dim))
        self.bias = nn.Parameter(torch.zeros(head_dim))


class SLAAttention(_RoutedAttention):
    """SLA as published (arXiv 2509.24006), the baseline: heuristic router, O = O_s + proj(O_l over
    all blocks).

    Args:
        config: an SLA2Config with method="sla"; its router, alpha and smooth_k fields do not apply.
    """

    def __init__(self, config: SLA2Config):
        super().__init__()
        if config.method != "sla":
            raise ValueError(f"method: expected 'sla', got {config.method!r}")
        self.config = config
        self.router = Router(heuristic_router(config))
        self.proj = _Projection(config.head_dim)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        layout: str = "bhnd",
        kv_lengths=None,
        return_info: bool = False,
    ):
        """As SLA2Attention.forward; the info's alpha is None."""
        q, k, v, lengths, backend = self._enter(q, k, v, layout, kv_lengths)
        with torch.no_grad():
            _, block_map = self._route(q, k, lengths, True, backend)
        out = sla_attention(
            q,
            k,
            v,
            block_map,
            self.proj.weight,
            self.proj.bias,
            precision=self.config.precision,
            qat_backward=self.config.qat_backward,
            kv_lengths=lengths,
            backend=backend,
        )
        out = out.transpose(1, 2) if layout == "bnhd" else out
        return (out, AttentionInfo(block_map, None, block_map.sparsity)) if return_info else out


def build_attention(config: SLA2Config) -> SLA2Attention | SLAAttention:
    """The module of `config.method`."""
    return SLA2Attention(config) if config.method == "sla2" else SLAAttention(config)
