"""HunyuanVideo (diffusers' HunyuanVideoTransformer3DModel): joint attention of video and text, text
last, padding masked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sla2_core.integrations.families.joint import (
    QKV,
    JointSLA2Processor,
    block_attention,
    heads_of,
    join,
    normed,
    split_heads,
)
from sla2_core.integrations.family import Family, TokenFlow, register_family
from sla2_core.integrations.tokens import moved, moved_patches
from sla2_core.order import Grid


def project(attn: Any, video: Tensor, text: Tensor, rotary: tuple[Tensor, Tensor] | None) -> QKV:
    """q, k, v (B, N + L, H, d), text last, after the norms and the rotary embedding.

    Args:
        attn: diffusers' attention module.
        video: (B, N, C). text: (B, L, C).
        rotary: cosines and sines (N, d), of the video tokens alone; None for none.
    """
    from diffusers.models.embeddings import apply_rotary_emb

    own = (attn.to_q, attn.to_k, attn.to_v)
    added = own if attn.add_q_proj is None else (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    norms = (attn.norm_q, attn.norm_k)
    added_norms = norms if attn.add_q_proj is None else (attn.norm_added_q, attn.norm_added_k)
    q, k, v = split_heads(own, video, attn.heads)
    q, k = normed(norms[0], q), normed(norms[1], k)
    if rotary is not None:
        q, k = (
            apply_rotary_emb(q, rotary, sequence_dim=1),
            apply_rotary_emb(k, rotary, sequence_dim=1),
        )
    text_q, text_k, text_v = split_heads(added, text, attn.heads)
    text_q, text_k = normed(added_norms[0], text_q), normed(added_norms[1], text_k)
    return join((q, k, v), (text_q, text_k, text_v))


def finish(attn: Any, out: Tensor, text_tokens: int) -> tuple[Tensor, Tensor]:
    """Video (B, N, C) and text (B, L, C) after their output projections, from out (B, N + L, H, d),
    whose last L = `text_tokens` are text.
    """
    video, text = out.flatten(2, 3).split([out.shape[1] - text_tokens, text_tokens], dim=1)
    if getattr(attn, "to_out", None) is not None:
        video = attn.to_out[1](attn.to_out[0](video))
    if getattr(attn, "to_add_out", None) is not None:
        text = attn.to_add_out(text)
    return video, text


class HunyuanVideoSLA2Processor(JointSLA2Processor):
    """SLA2 for the joint attention of HunyuanVideo's double and single blocks."""

    def attend(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None,
        image_rotary_emb: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """Video (B, N, C) and text (B, L, C) after the layer.

        Args:
            hidden_states: video, (B, N, C). encoder_hidden_states: text, (B, L, C).
            attention_mask: bool (B, 1, 1, N + L) over video and text keys, padding at the end of
                the text; or None.
            image_rotary_emb: cosines and sines of the video tokens, or None.
        """
        text_tokens = encoder_hidden_states.shape[1]
        q, k, v = project(attn, hidden_states, encoder_hidden_states, image_rotary_emb)
        lengths = (
            None if attention_mask is None else attention_mask.flatten(1).sum(-1, dtype=torch.int64)
        )
        out = self.self_attention(q, k, v, text_tokens, lengths).to(q.dtype)
        return finish(attn, out, text_tokens)


def _predict(
    transformer: nn.Module, noisy: Tensor, sigma: Tensor, conditions: Mapping[str, Tensor]
) -> Tensor:
    """`conditions`: encoder_hidden_states, encoder_attention_mask, pooled_projections; guidance
    (1,000 times the scale).
    """
    conditions = dict(conditions)
    if transformer_config(transformer).get("guidance_embeds") and "guidance" not in conditions:
        conditions["guidance"] = torch.full_like(sigma, 1000.0)
    return transformer(hidden_states=noisy, timestep=sigma * 1000, **conditions, return_dict=False)[
        0
    ]


def transformer_config(transformer: Any) -> Mapping[str, Any]:
    """The configuration of a transformer, also inside DistributedDataParallel."""
    return getattr(transformer, "module", transformer).config


def _tokens(config: Mapping[str, Any], frames: int, height: int, width: int) -> int:
    patch = config["patch_size"]
    return (frames // config["patch_size_t"]) * (height // patch) * (width // patch)


def patch_of(config: Mapping[str, Any]) -> Grid:
    """(frames, height, width) of the patch of latents that becomes a token."""
    return config["patch_size_t"], config["patch_size"], config["patch_size"]


def latents_grid(transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Grid:
    """A Family's grid for a forward whose first argument is latents (B, C, F, H, W)."""
    latents = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    frames, height, width = (
        n // p for n, p in zip(latents.shape[2:], patch_of(transformer.config))
    )
    return frames, height, width


def _in_order(transformer: Any, given: dict[str, Any], places: Tensor) -> dict[str, Any]:
    patch = patch_of(transformer.config)
    return given | {"hidden_states": moved_patches(given["hidden_states"], patch, places)}


def _result(transformer: Any, sample: Tensor, places: Tensor) -> Tensor:
    return moved_patches(sample, patch_of(transformer.config), places)


FLOW = TokenFlow(
    arguments=_in_order,
    result=_result,
    modules={"rope": lambda rotary, places: moved(rotary, 0, places)},
    # The layers of an image-to-video model treat the tokens of the first frame in their own way.
    fits=lambda transformer: transformer.config.get("image_condition_type") != "token_replace",
)
FAMILY = Family(
    name="hunyuan_video",
    attention_layers=block_attention(
        {"transformer_blocks": "attn", "single_transformer_blocks": "attn"}
    ),
    processor=HunyuanVideoSLA2Processor,
    heads=heads_of,
    predict=_predict,
    tokens=_tokens,
    grid=latents_grid,
    token_flow=FLOW,
    latent_shape=(33, 90, 160),  # 129 frames of 720 x 1280
)
register_family("HunyuanVideoTransformer3DModel", FAMILY)
