"""CogVideoX (diffusers' CogVideoXTransformer3DModel): joint attention of text and video through one
set of projections.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sla2_core.integrations.families.joint import (
    JointSLA2Processor,
    block_attention,
    heads_of,
    normed,
    refuse_mask,
    split_heads,
)
from sla2_core.integrations.family import Family, TokenFlow, register_family
from sla2_core.integrations.tokens import moved, moved_in, moved_patches
from sla2_core.order import Grid

_TIMESTEPS = 1000


class CogVideoXSLA2Processor(JointSLA2Processor):
    """SLA2 for CogVideoX's `attn1`."""

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
            attention_mask: None; ValueError for a mask.
            image_rotary_emb: cosines and sines (N, d) of the video tokens, or None.
        """
        from diffusers.models.embeddings import apply_rotary_emb

        refuse_mask("attention_mask", attention_mask)
        video_tokens, text_tokens = hidden_states.shape[1], encoder_hidden_states.shape[1]
        tokens = torch.cat(
            [hidden_states, encoder_hidden_states], dim=1
        )  # the model's own order is text first
        if attn.fused_projections:
            q, k, v = (
                x.unflatten(2, (attn.heads, -1)) for x in attn.to_qkv(tokens).chunk(3, dim=-1)
            )
        else:
            q, k, v = split_heads((attn.to_q, attn.to_k, attn.to_v), tokens, attn.heads)
        q, k = normed(attn.norm_q, q), normed(attn.norm_k, k)
        if image_rotary_emb is not None:
            q, k = (
                torch.cat(
                    [
                        apply_rotary_emb(x[:, :video_tokens], image_rotary_emb, sequence_dim=1),
                        x[:, video_tokens:],
                    ],
                    dim=1,
                )
                for x in (q, k)
            )
        out = self.self_attention(q, k, v, text_tokens).to(q.dtype).flatten(2, 3)
        out = attn.to_out[1](attn.to_out[0](out))
        return out[:, :video_tokens], out[:, video_tokens:]


def _predict(
    transformer: nn.Module, noisy: Tensor, sigma: Tensor, conditions: Mapping[str, Tensor]
) -> Tensor:
    """Latents (B, F, C, H, W); `conditions`: encoder_hidden_states, image_latents (on the
    channels), and the rotary embedding as rotary_cos and rotary_sin, (N, d) for every sample.
    """
    given: dict[str, Any] = dict(conditions)
    image = given.pop("image_latents", None)
    if image is not None:
        noisy = torch.cat([noisy, image.to(noisy.dtype)], dim=2)
    if "rotary_cos" in given:
        given["image_rotary_emb"] = (given.pop("rotary_cos")[0], given.pop("rotary_sin")[0])
    timestep = (sigma * (_TIMESTEPS - 1)).round().long()
    return transformer(hidden_states=noisy, timestep=timestep, **given, return_dict=False)[0]


def _alphas_cumprod(config: Mapping[str, Any]) -> Tensor:
    """Of the released checkpoints: 2B (no rotary embedding) shifts its signal-to-noise ratio by 3,
    5B does not.
    """
    from diffusers import CogVideoXDDIMScheduler

    shift = 1.0 if config["use_rotary_positional_embeddings"] else 3.0
    scheduler = CogVideoXDDIMScheduler(
        num_train_timesteps=_TIMESTEPS,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=shift,
    )
    return scheduler.alphas_cumprod


def _tokens(config: Mapping[str, Any], frames: int, height: int, width: int) -> int:
    patch = config["patch_size"]
    return (frames // (config.get("patch_size_t") or 1)) * (height // patch) * (width // patch)


def _patch(config: Mapping[str, Any]) -> Grid:
    return config.get("patch_size_t") or 1, config["patch_size"], config["patch_size"]


def _grid(transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Grid:
    latents = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    size = (latents.shape[1], *latents.shape[3:])
    frames, height, width = (n // p for n, p in zip(size, _patch(transformer.config)))
    return frames, height, width


def _in_order(transformer: Any, given: dict[str, Any], places: Tensor) -> dict[str, Any]:
    return moved_in(given, places, {"image_rotary_emb": 0})


def _embedded(tokens: Tensor, places: Tensor) -> Tensor:
    """Text and video tokens (B, L + N, C), after the absolute positions of the 2B model."""
    text, video = tokens.split([tokens.shape[1] - len(places), len(places)], dim=1)
    return torch.cat([text, moved(video, 1, places)], dim=1)


def _result(transformer: Any, sample: Tensor, places: Tensor) -> Tensor:
    latents = moved_patches(sample.transpose(1, 2), _patch(transformer.config), places)
    return latents.transpose(1, 2)


FAMILY = Family(
    name="cogvideox",
    attention_layers=block_attention({"transformer_blocks": "attn1"}),
    processor=CogVideoXSLA2Processor,
    heads=heads_of,
    predict=_predict,
    tokens=_tokens,
    grid=_grid,
    token_flow=TokenFlow(arguments=_in_order, result=_result, modules={"patch_embed": _embedded}),
    latent_shape=(13, 60, 90),  # 49 frames of 480 x 720
    alphas_cumprod=_alphas_cumprod,
)
register_family("CogVideoXTransformer3DModel", FAMILY)
