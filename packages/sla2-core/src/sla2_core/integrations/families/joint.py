"""What the processors of joint text and video attention share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sla2_core.integrations.processor import SLA2Processor


class JointSLA2Processor(SLA2Processor):
    """Base of the processors whose layers hand over video and text tokens apart and take them back
    so.
    """

    def __call__(
        self,
        attn,
        hidden_states,
        encoder_hidden_states=None,
        attention_mask=None,
        image_rotary_emb=None,
    ) -> tuple[Tensor, Tensor]:  # diffusers' Attention reads the signature
        return super().__call__(
            attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
        )


def join(video: tuple[Tensor, ...], text: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Concatenate video and text tokens of q, k, v, text last."""
    return tuple(torch.cat(pair, dim=1) for pair in zip(video, text))


def split_heads(projections, x: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Project (B, N, C) and split the channels: a tuple of (B, N, H, d)."""
    return tuple(projection(x).unflatten(2, (heads, -1)) for projection in projections)


def normed(norm: nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def refuse_mask(name: str, mask: Tensor | None) -> None:
    """A mask per token pair has no block form. Raises ValueError for one."""
    if mask is not None:
        raise ValueError(
            f"{name}: expected None with SLA2, got a mask; handle.disable() runs the model's own"
            " attention"
        )


def heads_of(attn: nn.Module) -> tuple[int, int]:
    """(heads, head dimension) of diffusers' attention modules."""
    return attn.heads, attn.to_q.out_features // attn.heads


def block_attention(groups: Mapping[str, str]):
    """A Family's attention_layers for {list of blocks: name of the attention in a block}."""

    def layers(transformer: nn.Module) -> dict[str, nn.Module]:
        return {
            f"{group}.{i}.{name}": getattr(block, name)
            for group, name in groups.items()
            for i, block in enumerate(getattr(transformer, group))
        }

    return layers
