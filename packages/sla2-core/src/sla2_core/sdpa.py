"""SLA2 in place of torch's scaled_dot_product_attention: the same arguments, on a module that holds
the parameters.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sla2_core.attention import build_attention
from sla2_core.config import SLA2Config
from sla2_core.order import Grid


class ScaledDotProductSLA2(nn.Module):
    """A module to call in place of torch.nn.functional.scaled_dot_product_attention, in
    self-attention over long sequences.

    Args:
        config: fixes the layer, SLA2 or another variant.

    Attributes:
        attention: the SLA2Attention inside, the part to train and to save.
    """

    def __init__(self, config: SLA2Config):
        super().__init__()
        self.attention = build_attention(config)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        *,
        text_tokens: int = 0,
        grid: Grid | None = None,
    ) -> Tensor:
        """Attention output (B, H, N, d) in the dtype of `query` (autocast's under autocast).

        Args:
            query: (B, H, N, d) in float64, float32, bfloat16 or float16. key, value: the same, or
                with fewer heads and enable_gqa=True.
            attn_mask: None, or a bool mask of keys (B, 1, 1, N) whose valid tokens come first (on a
                GPU that is not checked, for it would wait for the device).
            dropout_p, is_causal, scale: 0, False, and None or 1 / sqrt(d): nothing else has a
                block-sparse form here.
            text_tokens: how many tokens at the end are text (keys always selected, queries dense).
            grid: (frames, height, width) of the others, if they are to be put into the configured
                token order; see SLA2Attention.forward.

        Raises:
            ValueError: an argument outside of these. TypeError: no tensor, or another dtype. The
                message names the argument.
        """
        for name, x in (("query", query), ("key", key), ("value", value)):
            if not isinstance(x, Tensor):
                raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
            if x.ndim != 4:
                raise ValueError(
                    f"{name}: expected 4 dimensions (B, H, N, d), got shape {tuple(x.shape)}"
                )
        if dropout_p:
            raise ValueError(f"dropout_p: expected 0.0 with SLA2, got {dropout_p}")
        if is_causal:
            raise ValueError("is_causal: expected False with SLA2, got True")
        if scale is not None and not math.isclose(scale, query.shape[-1] ** -0.5):
            raise ValueError(
                f"scale: expected None or 1 / sqrt(d) = {query.shape[-1] ** -0.5:g} with SLA2, got"
                f" {scale}"
            )
        if enable_gqa:
            if query.shape[1] % key.shape[1]:
                raise ValueError(
                    f"key: expected heads that divide the query's {query.shape[1]}, got"
                    f" {key.shape[1]}"
                )
            share = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
        lengths = None if attn_mask is None else _lengths(attn_mask, query.shape[0], key.shape[2])
        return self.attention(
            query, key, value, kv_lengths=lengths, text_tokens=text_tokens, grid=grid
        )


def _lengths(mask: Tensor, batch: int, n_k: int) -> Tensor:
    """Valid keys of each item, int64 (B,)."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"attn_mask: expected a torch.Tensor or None, got {type(mask).__name__}")
    shapes = ((batch, 1, 1, n_k), (1, 1, 1, n_k))
    if mask.dtype != torch.bool or tuple(mask.shape) not in shapes:
        raise ValueError(
            f"attn_mask: expected a bool mask of keys {shapes[0]} with SLA2, got {mask.dtype}"
            f" {tuple(mask.shape)}"
        )
    valid = mask[:, 0, 0].expand(batch, n_k)
    lengths = valid.sum(-1)
    if mask.device.type == "cpu" and not bool(lengths.all()):
        raise ValueError("attn_mask: expected a valid key for each item with SLA2, got none")
    if mask.device.type == "cpu" and not torch.equal(
        valid, torch.arange(n_k, device=mask.device) < lengths[:, None]
    ):
        raise ValueError(
            "attn_mask: expected the valid keys first and padding at the end with SLA2, got holes"
        )
    return lengths
