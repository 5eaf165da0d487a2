"""The router: block means of Q and K, a learnable projection of each, scores, and the top-k block
map.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sla2_core.backends import cpu as ops
from sla2_core.block_map import BlockMap, Rows, num_blocks
from sla2_core.config import SLA2Config

_MEAN_BLOCK = 256  # tokens that one partial sum of the mean over tokens holds


class Float32Module(nn.Module):
    """A module whose parameters stay in fp32 under `.to(bfloat16)` and `.half()`; `.double()` and
    devices go through.
    """

    def _apply(self, fn, recurse: bool = True):
        def keep(t: Tensor) -> Tensor:
            out = fn(t)
            if t.dtype.is_floating_point and out.dtype in (torch.bfloat16, torch.float16):
                return t.to(out.device)
            return out

        return super()._apply(keep, recurse)


def pool(x: Tensor, block: int, lengths: Tensor | None = None) -> Tensor:
    """Mean over the valid tokens of each block, in fp32 (fp64 stays).

    Args:
        x: (B, H, N, d).
        block: tokens in a block; the last one may be short.
        lengths: int64 (B,), valid tokens of each batch item; None means all N. Blocks without a
            valid token are 0.

    Returns:
        (B, H, ceil(N / block), d).
    """
    if x.device.type == "cpu":
        return ops.block_means(x, lengths, block)
    work = x if x.dtype == torch.float64 else x.float()
    b, _, n, _ = x.shape
    count = num_blocks(n, block)
    if lengths is not None:
        valid = torch.arange(n, device=x.device) < lengths[:, None]
        work = work.masked_fill(~valid[:, None, :, None], 0.0)
    whole = n // block
    sums = (
        work[:, :, : whole * block].unflatten(2, (whole, block)).sum(3) if whole else work[:, :, :0]
    )
    if whole < count:
        sums = torch.cat([sums, work[:, :, whole * block :].sum(2, keepdim=True)], dim=2)
    start = torch.arange(count, device=x.device) * block
    last = torch.full((b, 1), n, device=x.device) if lengths is None else lengths[:, None]
    tokens = (last - start).clamp(0, block).clamp_min(1)
    return sums / tokens[:, None, :, None]


def smooth_keys(k: Tensor, lengths: Tensor | None = None) -> Tensor:
    """K minus its mean over the valid tokens (Alg. 2, step 1), in k's dtype: (B, H, N_k, d).

    The sparse branch and the top-k are unchanged by it, up to rounding; phi(K) and low-bit K are
    not.
    """
    return (k - _mean_of_means(pool(k, _MEAN_BLOCK, lengths), k.shape[2], _MEAN_BLOCK, lengths)).to(
        k.dtype
    )


def smooth_pooled(pooled: Tensor, n: int, block: int, lengths: Tensor | None = None) -> Tensor:
    """The block means (B, H, T_n, d) of smooth_keys(K) from those of K (N = n): the mean over
    tokens is theirs, weighted.
    """
    return pooled - _mean_of_means(pooled, n, block, lengths)


def _mean_of_means(means: Tensor, n: int, block: int, lengths: Tensor | None) -> Tensor:
    start = torch.arange(0, n, block, device=means.device)
    last = torch.full((1,), n, device=means.device) if lengths is None else lengths
    tokens = (last[:, None] - start).clamp(0, block)
    share = (tokens / last[:, None]).to(means.dtype)[:, None, :, None]
    return (means * share).sum(2, keepdim=True)


def blocks_to_select(topk: float, t_n: int) -> int:
    """K = max(1, round(k% * T_n))."""
    return max(1, round(topk * t_n))


def _best(scores: Tensor, count: int) -> Tensor:
    """Ascending indices of the `count` best of each row, ties to the lower index."""
    if scores.device.type == "cpu":
        return ops.top_k(scores, count)
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return order[..., :count].sort(-1).values


def top_k_map(
    scores: Tensor,
    topk: float,
    *,
    block_q: int,
    block_k: int,
    n_q: int,
    n_k: int,
    kv_lengths: Tensor | None = None,
) -> BlockMap:
    """The K best key blocks of every row, ties to the lower index, indices ascending; no gradient.

    Args:
        scores: (B, H, T_m, T_n) fp32 or fp64.
        topk: k% in (0, 1]; K = max(1, round(k% * T_n)), T_n counted from the item's own kv_lengths.
        kv_lengths: int64 (B,) or None.
    """
    scores = scores.detach()
    t_n = scores.shape[-1]
    most = blocks_to_select(topk, t_n)
    if kv_lengths is None:
        indices = _best(scores, most)
        counts = torch.full(scores.shape[:3], most, dtype=torch.int32, device=scores.device)
    else:
        blocks = num_blocks(kv_lengths, block_k)
        count = (
            (topk * blocks.double()).round().clamp_min(1)
        )  # blocks_to_select; ties to even, as Python's round
        dead = torch.arange(t_n, device=scores.device) >= blocks[:, None]
        scores = scores.masked_fill(dead[:, None, None], -torch.inf)
        best = _best(
            scores, most
        ).long()  # of these the item's own `count`, the others' places go last
        order = torch.sort(scores.gather(-1, best), dim=-1, descending=True, stable=True).indices
        kept = (torch.arange(most, device=scores.device) < count[:, None])[:, None, None].expand_as(
            order
        )
        best = (
            torch.where(torch.zeros_like(kept).scatter(-1, order, kept), best, t_n).sort(-1).values
        )
        indices = torch.where(best == t_n, -1, best)
        counts = count.to(torch.int32)[:, None, None].expand(scores.shape[:3]).contiguous()
    rows = Rows(indices.to(torch.int32).contiguous(), counts)
    return BlockMap._trusted(rows, block_q=block_q, block_k=block_k, n_q=n_q, n_k=n_k)


class Router(Float32Module):
    """P_c = (q W_q)(k W_k)^T / sqrt(d) per head, in fp32 (Eq. 16).

    `weight_q` and `weight_k` are (1, d, d), or (H, d, d) with `per_head_router`, and start as the
    identity, which is SLA's heuristic router; with router="heuristic" they are buffers that stay
    so.
    """

    def __init__(self, config: SLA2Config):
        super().__init__()
        self.head_dim = config.head_dim
        heads = config.num_heads if config.per_head_router else 1
        for name in ("weight_q", "weight_k"):
            value = torch.eye(config.head_dim).repeat(heads, 1, 1)
            if config.router == "learned":
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value, persistent=False)

    def scores(self, pooled_q: Tensor, pooled_k: Tensor) -> Tensor:
        """Pooled q (B, H, rows, d) and k (B, H, T_n, d), fp32 -> scores (B, H, rows, T_n), fp32."""
        with torch.autocast(pooled_q.device.type, enabled=False):
            q = pooled_q.to(self.weight_q.dtype) @ self.weight_q
            k = pooled_k.to(self.weight_k.dtype) @ self.weight_k
            return (q @ k.transpose(-1, -2)) * self.head_dim**-0.5
