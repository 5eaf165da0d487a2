"""Wan2.1 and Wan2.2 (diffusers' WanTransformer3DModel): self-attention with a replaceable attention
operator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sla2_core.integrations.family import Family, TokenFlow, register_family
from sla2_core.integrations.processor import SLA2Processor
from sla2_core.integrations.tokens import moved, moved_in, moved_patches
from sla2_core.order import Grid


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring channel pairs by the angles that diffusers' Wan model gives its
    processors: (B, N, H, d) in x's dtype.

    Args:
        x: (B, N, H, d).
        cos, sin: (1, N, 1, d), each value repeated for both channels of a pair.
    """
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return (
        torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)
    )


def _attend(
    attn: Any,
    attention: Callable[[Tensor, Tensor, Tensor], Tensor],
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    rotary_emb: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Projections, norms and rotary embedding of Wan's `attn1` on (B, N, C), then
    `attention(q, k, v)` on (B, N, H, d), and the output projection: (B, N, C).
    """
    for name, given in (
        ("encoder_hidden_states", encoder_hidden_states),
        ("attention_mask", attention_mask),
    ):
        if given is not None:
            raise ValueError(
                f"{name}: expected None (Wan's self-attention has neither text nor mask), got a"
                " tensor"
            )
    if attn.fused_projections:
        query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
    else:
        query, key, value = (
            attn.to_q(hidden_states),
            attn.to_k(hidden_states),
            attn.to_v(hidden_states),
        )
    query, key = attn.norm_q(query), attn.norm_k(key)
    query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
    if rotary_emb is not None:
        query, key = apply_rotary(query, *rotary_emb), apply_rotary(key, *rotary_emb)
    out = attention(query, key, value).flatten(2, 3).type_as(query)
    return attn.to_out[1](attn.to_out[0](out))


class WanSelfAttnProcessor(nn.Module):
    """Wan's self-attention with another attention operator in the middle.

    Args:
        attention: attention(q, k, v) on (B, N, H, d) tensors, returns (B, N, H, d).
    """

    def __init__(self, attention: Callable[[Tensor, Tensor, Tensor], Tensor]):
        super().__init__()
        self.attention = attention

    def forward(self, attn: Any, hidden_states: Tensor, *rest: Any, **named: Any) -> Tensor:
        """(B, N, C) after the layer; arguments as of diffusers' WanAttnProcessor. Raises ValueError
        for text or a mask, which self-attention does not have.
        """
        return _attend(attn, self.attention, hidden_states, *rest, **named)


class WanSLA2Processor(SLA2Processor):
    """SLA2 for Wan's `attn1`."""

    def attend(self, attn: Any, hidden_states: Tensor, *rest: Any, **named: Any) -> Tensor:
        """(B, N, C) after the layer, as WanSelfAttnProcessor.forward."""
        return _attend(attn, self.self_attention, hidden_states, *rest, **named)


def _layers(transformer: Any) -> dict[str, nn.Module]:
    return {f"blocks.{i}.attn1": block.attn1 for i, block in enumerate(transformer.blocks)}


def _heads(attn: Any) -> tuple[int, int]:
    return attn.heads, attn.inner_dim // attn.heads


def _predict(
    transformer: Any, noisy: Tensor, sigma: Tensor, conditions: Mapping[str, Tensor]
) -> Tensor:
    """`conditions`: encoder_hidden_states; for image to video also image_latents, concatenated on
    the channels, and in Wan2.1 encoder_hidden_states_image (B, n, C), of both images where the
    model takes the first and the last frame.
    """
    conditions = dict(conditions)
    image = conditions.pop("image_latents", None)
    if image is not None:
        noisy = torch.cat([noisy, image.to(noisy.dtype)], dim=1)
    embeds = conditions.get("encoder_hidden_states_image")
    if embeds is not None and transformer.config.pos_embed_seq_len is not None:
        # (B, 2 n, C) of two images each, which the model takes as (2 B, n, C).
        conditions["encoder_hidden_states_image"] = embeds.unflatten(1, (2, -1)).flatten(0, 1)
    return transformer(hidden_states=noisy, timestep=sigma * 1000, **conditions, return_dict=False)[
        0
    ]


def _tokens(config: Mapping[str, Any], frames: int, height: int, width: int) -> int:
    p_t, p_h, p_w = config["patch_size"]
    return (frames // p_t) * (height // p_h) * (width // p_w)


def _grid(transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Grid:
    latents = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    frames, height, width = (
        n // p for n, p in zip(latents.shape[2:], transformer.config.patch_size)
    )
    return frames, height, width


def _in_order(transformer: Any, given: dict[str, Any], places: Tensor) -> dict[str, Any]:
    latents = moved_patches(given["hidden_states"], transformer.config.patch_size, places)
    # Wan2.2 5B has a timestep for each token.
    dims = {"timestep": 1} if given["timestep"].ndim == 2 else {}
    return moved_in(given, places, dims) | {"hidden_states": latents}


def _result(transformer: Any, sample: Tensor, places: Tensor) -> Tensor:
    return moved_patches(sample, transformer.config.patch_size, places)


FAMILY = Family(
    name="wan",
    attention_layers=_layers,
    processor=WanSLA2Processor,
    heads=_heads,
    predict=_predict,
    tokens=_tokens,
    grid=_grid,
    token_flow=TokenFlow(
        arguments=_in_order,
        result=_result,
        modules={"rope": lambda rotary, places: moved(rotary, 1, places)},
    ),
    latent_shape=(21, 60, 104),  # 81 frames of 480 x 832
)
register_family("WanTransformer3DModel", FAMILY)
