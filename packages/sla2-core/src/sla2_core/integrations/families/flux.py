"""Flux (diffusers' FluxTransformer2DModel): joint attention of text and image tokens in double and
single blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sla2_core.integrations.families.hunyuan_video import transformer_config
from sla2_core.integrations.families.joint import block_attention, refuse_mask
from sla2_core.integrations.family import Family, TokenFlow, register_family
from sla2_core.integrations.processor import SLA2Processor
from sla2_core.integrations.tokens import moved, moved_in


class FluxSLA2Processor(SLA2Processor):
    """SLA2 for Flux's double and single blocks.

    Attributes:
        text_tokens: how many tokens at the front are text in a single block, which gives text and
            image as one tensor; a hook on the block notes it before each call.
    """

    text_tokens = 0

    def attend(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """A double block's image (B, N, C) and text (B, L, C), or a single block's tokens
        (B, L + N, C) before its output projection.

        Args:
            hidden_states: image (B, N, C) in a double block, text and image (B, L + N, C) in a
                single one.
            encoder_hidden_states: text (B, L, C) in a double block, None in a single one.
            attention_mask: None; ValueError for a mask.
            image_rotary_emb: cosines and sines (L + N, d) of text and image, or None.
        """
        from diffusers.models.embeddings import apply_rotary_emb

        refuse_mask("attention_mask", attention_mask)
        text_tokens = self.text_tokens
        if encoder_hidden_states is not None:
            text_tokens = encoder_hidden_states.shape[1]
        q, k, v = _project(attn, hidden_states, "to_qkv", ("to_q", "to_k", "to_v"))
        q, k = attn.norm_q(q), attn.norm_k(k)
        if encoder_hidden_states is not None:
            names = ("add_q_proj", "add_k_proj", "add_v_proj")
            text_q, text_k, text_v = _project(attn, encoder_hidden_states, "to_added_qkv", names)
            text_q, text_k = attn.norm_added_q(text_q), attn.norm_added_k(text_k)
            q, k, v = (torch.cat(pair, dim=1) for pair in ((text_q, q), (text_k, k), (text_v, v)))
        if image_rotary_emb is not None:
            q, k = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (q, k))
        q, k, v = (torch.cat([x[:, text_tokens:], x[:, :text_tokens]], dim=1) for x in (q, k, v))
        out = self.self_attention(q, k, v, text_tokens).to(q.dtype).flatten(2, 3)
        image, text = out.split([out.shape[1] - text_tokens, text_tokens], dim=1)
        if encoder_hidden_states is None:
            return torch.cat([text, image], dim=1)
        image = attn.to_out[1](attn.to_out[0](image.contiguous()))
        return image, attn.to_add_out(text.contiguous())


def _project(attn: Any, x: Tensor, fused: str, names: Sequence[str]) -> tuple[Tensor, ...]:
    if attn.fused_projections:
        parts = getattr(attn, fused)(x).chunk(3, dim=-1)
    else:
        parts = tuple(getattr(attn, name)(x) for name in names)
    return tuple(part.unflatten(-1, (-1, attn.head_dim)) for part in parts)


def _note_text_tokens(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    text = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[1]
    block.attn.processor.text_tokens = text.shape[1]


def _install_hooks(transformer: nn.Module, names: Sequence[str]) -> list[Any]:
    single = [name.removesuffix(".attn") for name in names if name.startswith("single_")]
    return [
        transformer.get_submodule(name).register_forward_pre_hook(
            _note_text_tokens, with_kwargs=True
        )
        for name in single
    ]


def _predict(
    transformer: nn.Module, noisy: Tensor, sigma: Tensor, conditions: Mapping[str, Tensor]
) -> Tensor:
    """Packed latents (B, N, C); `conditions`: encoder_hidden_states, pooled_projections, txt_ids,
    img_ids; guidance.
    """
    conditions = dict(conditions)
    for name in ("txt_ids", "img_ids"):
        if conditions[name].ndim == 3:
            conditions[name] = conditions[name][0]  # the same for every sample
    if transformer_config(transformer).get("guidance_embeds") and "guidance" not in conditions:
        conditions["guidance"] = torch.ones_like(sigma)
    return transformer(hidden_states=noisy, timestep=sigma, **conditions, return_dict=False)[0]


def _tokens(config: Mapping[str, Any], frames: int, height: int, width: int) -> int:
    return frames * (height // 2) * (width // 2)  # the pipeline packs 2 x 2 latents into a token


def _coordinates(transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Of `img_ids`: the number of the image, where there are several, row and column."""
    ids = kwargs["img_ids"] if "img_ids" in kwargs else args[4]
    return (ids[0] if ids.ndim == 3 else ids).long()


def _in_order(transformer: Any, given: dict[str, Any], places: Tensor) -> dict[str, Any]:
    residuals = ("controlnet_block_samples", "controlnet_single_block_samples")
    dims = {"hidden_states": 1, "img_ids": given["img_ids"].ndim - 2, **dict.fromkeys(residuals, 1)}
    return moved_in(given, places, dims)


FAMILY = Family(
    name="flux",
    attention_layers=block_attention(
        {"transformer_blocks": "attn", "single_transformer_blocks": "attn"}
    ),
    processor=FluxSLA2Processor,
    heads=lambda attn: (attn.heads, attn.head_dim),
    predict=_predict,
    tokens=_tokens,
    coordinates=_coordinates,
    token_flow=TokenFlow(
        arguments=_in_order,
        result=lambda transformer, sample, places: moved(sample, 1, places),
    ),
    latent_shape=(1, 128, 128),  # 1024 x 1024
    install_hooks=_install_hooks,
)
register_family("FluxTransformer2DModel", FAMILY)
