"""Routed attention of one call: video queries over video and text keys, text queries dense, for all
heads or some.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sla2_core.attention import pooled_means
from sla2_core.block_map import BlockMap, Rows
from sla2_core.checks import autocast_qkv
from sla2_core.functional import CUDA_BACKENDS, sla2_attention, sla_attention
from sla2_core.integrations.heads import for_heads
from sla2_core.routing.router import top_k_map


def key_mask(n_k: int, kv_lengths: Tensor | None) -> Tensor | None:
    """bool (B, 1, 1, n_k), True for valid keys; None if all are."""
    if kv_lengths is None:
        return None
    return (torch.arange(n_k, device=kv_lengths.device) < kv_lengths[:, None])[:, None, None, :]


def full_attention(q: Tensor, k: Tensor, v: Tensor, kv_lengths: Tensor | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V on (B, H, N, d), keys at or past `kv_lengths` (B,) hidden."""
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=key_mask(k.shape[2], kv_lengths)
    )


def _route(
    attention: nn.Module,
    router: nn.Module,
    q: Tensor,
    k: Tensor,
    text_tokens: int,
    kv_lengths: Tensor | None,
    backend: str,
) -> tuple[Tensor, BlockMap]:
    """Router scores (B, H, T_m, T_n), -inf for padding, and the map: top-k of the blocks without
    text, and all with text.
    """
    config, (n_q, n_k) = attention.config, (q.shape[2], k.shape[2])
    sizes = dict(block_q=config.block_q, block_k=config.block_k, n_q=n_q)
    smooth = config.smooth_k or config.method == "sla"
    scores = router.scores(*pooled_means(q, k, config, kv_lengths, smooth, backend))
    start = torch.arange(scores.shape[-1], device=q.device) * config.block_k
    if kv_lengths is not None:
        scores = scores.masked_fill((start >= kv_lengths[:, None])[:, None, None], -torch.inf)
    if not text_tokens:
        return scores, top_k_map(scores, config.topk, n_k=n_k, kv_lengths=kv_lengths, **sizes)
    routable = (
        n_k - text_tokens
    ) // config.block_k  # padding is at the end of the text, which is not routed
    text = torch.arange(routable, scores.shape[-1], dtype=torch.int32, device=q.device)
    if kv_lengths is not None:
        text = torch.where(start[routable:] < kv_lengths[:, None], text, -1)[:, None, None]
    text = text.expand(*scores.shape[:3], -1)
    counts = (text >= 0).sum(-1, dtype=torch.int32)
    if routable:
        chosen = top_k_map(
            scores[..., :routable], config.topk, n_k=routable * config.block_k, **sizes
        )
        text, counts = torch.cat([chosen.indices, text], -1), counts + chosen.counts
    return scores, BlockMap._trusted(Rows(text.contiguous(), counts), n_k=n_k, **sizes)


def routed_attention(
    attention: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    text_tokens: int = 0,
    kv_lengths: Tensor | None = None,
    heads: Sequence[int] | slice = slice(None),
) -> tuple[Tensor, BlockMap, Tensor | None]:
    """SLA2 or SLA where the last tokens are text: text keys always selected, text queries dense.

    Args:
        attention: SLA2Attention or SLAAttention.
        q, k, v: (B, H, N, d), video tokens first; H counts `heads`, a part of the module's heads.
        text_tokens: how many of the N tokens are text. Key blocks with any text in them are always
            selected, k% counts the others.
        kv_lengths: int64 (B,), valid keys of each item (the end of the text is padding), or None.

    Returns:
        (B, H, N, d), and of the video queries the block map and alpha (B|1, H|1, T_m|1; None for
        SLA).
    """
    q, k, v = autocast_qkv(q, k, v)
    config = attention.config
    n_video = q.shape[2] - text_tokens
    video = q[:, :, :n_video]
    learned = config.method == "sla2"
    router = for_heads(attention.router, heads)
    backend = attention.backend_of(q)
    if backend not in CUDA_BACKENDS:  # as in the modules
        video, k, v = (x.contiguous() for x in (video, k, v))
    with torch.autocast(q.device.type, enabled=False):
        with torch.set_grad_enabled(torch.is_grad_enabled() and learned and config.alpha == "mass"):
            scores, block_map = _route(
                attention, router, video, k, text_tokens, kv_lengths, backend
            )
        mask = block_map.mask() if config.alpha == "mass" else None
        alpha = for_heads(attention.mixing, heads)(scores, mask) if learned else None
    if learned:
        out = sla2_attention(
            video,
            k,
            v,
            block_map,
            alpha,
            precision=config.precision,
            qat_backward=config.qat_backward,
            smooth_k=config.smooth_k,
            kv_lengths=kv_lengths,
            backend=backend,
        )
    else:
        out = sla_attention(
            video,
            k,
            v,
            block_map,
            attention.proj.weight,
            attention.proj.bias,
            precision=config.precision,
            qat_backward=config.qat_backward,
            kv_lengths=kv_lengths,
            backend=backend,
        )
    if text_tokens:
        out = torch.cat([out, full_attention(q[:, :, n_video:], k, v, kv_lengths)], dim=2)
    return out, block_map, alpha
