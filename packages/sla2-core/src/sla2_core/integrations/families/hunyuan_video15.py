"""HunyuanVideo 1.5 (diffusers' HunyuanVideo15Transformer3DModel): joint attention, padded text
neither asks nor answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sla2_core.integrations.families.hunyuan_video import FLOW, finish, latents_grid, project
from sla2_core.integrations.families.joint import JointSLA2Processor, block_attention, heads_of
from sla2_core.integrations.family import Family, register_family


class HunyuanVideo15SLA2Processor(JointSLA2Processor):
    """SLA2 for the joint attention of HunyuanVideo 1.5."""

    def attend(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None,
        image_rotary_emb: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """Video (B, N, C) and text (B, L, C) after the layer; before the output projection, padded
        text has 0.

        Args:
            hidden_states: video, (B, N, C). encoder_hidden_states: text, (B, L, C).
            attention_mask: (B, L) over the text, 1 for valid tokens, which come first; or None.
            image_rotary_emb: cosines and sines of the video tokens, or None.
        """
        video_tokens, text_tokens = hidden_states.shape[1], encoder_hidden_states.shape[1]
        q, k, v = project(attn, hidden_states, encoder_hidden_states, image_rotary_emb)
        lengths = (
            None
            if attention_mask is None
            else video_tokens + attention_mask.sum(-1, dtype=torch.int64)
        )
        out = self.self_attention(q, k, v, text_tokens, lengths).to(q.dtype)
        if lengths is not None:
            token = torch.arange(out.shape[1], device=out.device)
            out = out.masked_fill((token >= lengths[:, None])[:, :, None, None], 0.0)
        return finish(attn, out, text_tokens)


def _predict(
    transformer: nn.Module, noisy: Tensor, sigma: Tensor, conditions: Mapping[str, Tensor]
) -> Tensor:
    """`conditions`: the text arguments of the model and image_embeds; condition_latents go on the
    channels.
    """
    conditions = dict(conditions)
    image = conditions.pop("condition_latents", None)
    if image is not None:
        noisy = torch.cat([noisy, image.to(noisy.dtype)], dim=1)
    timestep = (sigma * 1000).to(noisy.dtype)  # the model casts its embedding to this dtype
    return transformer(hidden_states=noisy, timestep=timestep, **conditions, return_dict=False)[0]


def _tokens(config: Mapping[str, Any], frames: int, height: int, width: int) -> int:
    patch = config["patch_size"]
    return (frames // config["patch_size_t"]) * (height // patch) * (width // patch)


FAMILY = Family(
    name="hunyuan_video15",
    attention_layers=block_attention({"transformer_blocks": "attn"}),
    processor=HunyuanVideo15SLA2Processor,
    heads=heads_of,
    predict=_predict,
    tokens=_tokens,
    grid=latents_grid,
    token_flow=FLOW,
    latent_shape=(31, 30, 53),  # 121 frames of 480 x 848
)
register_family("HunyuanVideo15Transformer3DModel", FAMILY)
