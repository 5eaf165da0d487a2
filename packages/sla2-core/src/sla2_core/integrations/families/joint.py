"""What the processors of joint text and video attention share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sla2_core.integrations.processor import SLA2Processor

QKV = tuple[Tensor, Tensor, Tensor]


class JointSLA2Processor(SLA2Processor):
    """Base of the processors whose layers give video and text tokens as two tensors, (B, N, C) and
    (B, L, C), and take two back.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        # diffusers' Attention reads the signature.
        return super().__call__(
            attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
        )


def join(video: QKV, text: QKV) -> QKV:
    """q, k, v (B, N + L, H, d) of video (B, N, H, d) and text (B, L, H, d), text last."""
    q, k, v = (torch.cat(pair, dim=1) for pair in zip(video, text))
    return q, k, v


def split_heads(projections: Sequence[Callable[[Tensor], Tensor]], x: Tensor, heads: int) -> QKV:
    """x (B, N, C) through the projections of q, k and v, each split into heads: (B, N, H, d)."""
    q, k, v = (projection(x).unflatten(2, (heads, -1)) for projection in projections)
    return q, k, v


def normed(norm: nn.Module | None, x: Tensor) -> Tensor:
    """x (B, N, H, d) through a norm that the model may lack."""
    return x if norm is None else norm(x)


def refuse_mask(name: str, mask: Tensor | None) -> None:
    """Raise ValueError for a mask of token pairs, which has no block form; `name` is the
    argument's. None passes.
    """
    if mask is not None:
        raise ValueError(
            f"{name}: expected None with SLA2, got a mask; handle.disable() runs the model's own"
            " attention"
        )


def heads_of(attn: Any) -> tuple[int, int]:
    """(number of heads, head dimension) of diffusers' attention modules."""
    return attn.heads, attn.to_q.out_features // attn.heads


def block_attention(groups: Mapping[str, str]) -> Callable[[nn.Module], dict[str, nn.Module]]:
    """A Family's attention_layers from attribute names: {of the transformer, for a list of blocks:
    of a block, for its attention}.
    """

    def layers(transformer: nn.Module) -> dict[str, nn.Module]:
        return {
            f"{group}.{i}.{name}": getattr(block, name)
            for group, name in groups.items()
            for i, block in enumerate(getattr(transformer, group))
        }

    return layers
