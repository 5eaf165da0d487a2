"""LTX-2 (diffusers' LTX2VideoTransformer3DModel): the video's self-attention; audio and
cross-attention stay dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sla2_core.integrations.families.joint import block_attention, refuse_mask
from sla2_core.integrations.family import Family, TokenFlow, register_family
from sla2_core.integrations.processor import SLA2Processor
from sla2_core.integrations.tokens import moved, moved_in
from sla2_core.order import Grid
from sla2_core.order.base import with_text


class LTX2SLA2Processor(SLA2Processor):
    """SLA2 for LTX-2's `attn1`, with its output gates and perturbation (spatio-temporal
    guidance).
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        query_rotary_emb: tuple[Tensor, Tensor] | None = None,
        key_rotary_emb: tuple[Tensor, Tensor] | None = None,
        perturbation_mask: Tensor | None = None,
        all_perturbed: bool | Tensor | None = None,
    ) -> Tensor:
        # LTX2Attention reads the signature.
        perturbed: dict[str, Any] = {}
        if perturbation_mask is not None or all_perturbed is not None:
            perturbed = {"perturbation_mask": perturbation_mask, "all_perturbed": all_perturbed}
        return super().__call__(
            attn,
            hidden_states,
            encoder_hidden_states,
            attention_mask,
            query_rotary_emb,
            key_rotary_emb,
            **perturbed,
        )

    def attend(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        attention_mask: Tensor | None,
        query_rotary_emb: tuple[Tensor, Tensor] | None,
        key_rotary_emb: tuple[Tensor, Tensor] | None,
        perturbation_mask: Tensor | None = None,
        all_perturbed: bool | Tensor | None = None,
    ) -> Tensor:
        """The video tokens after the layer, (B, N, C).

        Args:
            hidden_states: (B, N, C). encoder_hidden_states: not read, for self-attention has none.
            attention_mask: None; ValueError for a mask.
            query_rotary_emb: cosines and sines, or None. key_rotary_emb: the same of the keys, None
                for the queries'.
            perturbation_mask: broadcasts to (B, N, C); 0 takes V in place of the attention output,
                1 the output.
            all_perturbed: whether all of it is 0; None reads the mask.
        """
        from diffusers.models.transformers.transformer_ltx2 import (
            apply_interleaved_rotary_emb,
            apply_split_rotary_emb,
        )

        refuse_mask("video_self_attention_mask", attention_mask)
        value = attn.to_v(hidden_states)
        if all_perturbed is None and perturbation_mask is not None:
            all_perturbed = bool((perturbation_mask == 0).all())
        if all_perturbed:
            out = value
        else:
            q, k = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
            if query_rotary_emb is not None:
                rotate = (
                    apply_interleaved_rotary_emb
                    if attn.rope_type == "interleaved"
                    else apply_split_rotary_emb
                )
                q, k = (
                    rotate(q, query_rotary_emb),
                    rotate(k, query_rotary_emb if key_rotary_emb is None else key_rotary_emb),
                )
            q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, value))
            out = self.self_attention(q, k, v).flatten(2, 3).to(q.dtype)
            if perturbation_mask is not None:
                out = torch.lerp(value, out, perturbation_mask)
        if attn.to_gate_logits is not None:
            gates = 2.0 * torch.sigmoid(attn.to_gate_logits(hidden_states))
            out = (out.unflatten(2, (attn.heads, -1)) * gates.unsqueeze(-1)).flatten(2, 3)
        return attn.to_out[1](attn.to_out[0](out))


_SIZES = ("num_frames", "height", "width", "audio_num_frames")


def _predict(
    transformer: nn.Module, noisy: Tensor, sigma: Tensor, conditions: Mapping[str, Tensor]
) -> Tensor:
    """Packed video latents (B, N, C) beside clean audio (audio_hidden_states, at timestep 0): the
    video's velocity.

    `conditions`: the model's text arguments, audio_hidden_states, and num_frames, height, width,
    audio_num_frames as integers, the same for every sample.
    """
    given: dict[str, Any] = {
        name: int(x.flatten()[0]) if name in _SIZES else x for name, x in conditions.items()
    }
    return transformer(
        hidden_states=noisy,
        timestep=sigma * 1000,
        sigma=sigma * 1000,
        audio_timestep=torch.zeros_like(sigma),
        audio_sigma=torch.zeros_like(sigma),
        **given,
        return_dict=False,
    )[0]


def _tokens(config: Mapping[str, Any], frames: int, height: int, width: int) -> int:
    patch = config["patch_size"]
    return (frames // config["patch_size_t"]) * (height // patch) * (width // patch)


_PLACES = {"hidden_states": 0, "num_frames": 10, "height": 11, "width": 12}  # in the forward
_PLACES |= {"video_coords": 15}


def _grid(transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Grid:
    """Of the video's own tokens. Those of keyframes, such as a last frame, follow them and have
    coordinates of their own; ValueError for other tokens beside the grid's.
    """
    given = {name: args[i] for name, i in _PLACES.items() if i < len(args)} | kwargs
    tokens, patch = given["hidden_states"].shape[1], transformer.config.patch_size
    sizes = [given.get(name) for name in ("num_frames", "height", "width")]
    steps = (transformer.config.patch_size_t, patch, patch)
    frames, height, width = (-(-(size or 0) // step) for size, step in zip(sizes, steps))
    own, coordinates = frames * height * width, given.get("video_coords")
    keyframes = 0 < own < tokens and coordinates is not None and coordinates.shape[2] == tokens
    if own != tokens and not keyframes:
        raise ValueError(
            f"num_frames, height, width: expected a grid of the {tokens} tokens for a token order,"
            f" got {sizes}; SLA2Config(token_order='raster') needs none"
        )
    return frames, height, width


def _with_keyframes(places: Tensor, tokens: Tensor) -> Tensor:
    """Places of all tokens (B, N, C), of which the first are the grid's and the rest stay."""
    return with_text(places, tokens.shape[1], tokens.shape[1] - len(places))


def _in_order(transformer: Any, given: dict[str, Any], places: Tensor) -> dict[str, Any]:
    tokens = given["hidden_states"]
    places = _with_keyframes(places, tokens)
    if given.get("video_coords") is None:
        sizes = (given[name] for name in ("num_frames", "height", "width"))
        fps = {"fps": given["fps"]} if "fps" in given else {}
        made = transformer.rope.prepare_video_coords(len(tokens), *sizes, tokens.device, **fps)
        given = given | {"video_coords": made}
    dims = {"hidden_states": 1, "video_coords": 2, "video_keyframes_mask": 1}
    if given["timestep"].ndim == 2 and given["timestep"].shape[1] > 1:
        dims["timestep"] = 1
    return moved_in(given, places, dims)


FAMILY = Family(
    name="ltx2",
    attention_layers=block_attention({"transformer_blocks": "attn1"}),
    processor=LTX2SLA2Processor,
    heads=lambda attn: (attn.heads, attn.head_dim),
    predict=_predict,
    tokens=_tokens,
    grid=_grid,
    token_flow=TokenFlow(
        arguments=_in_order,
        result=lambda transformer, sample, places: moved(
            sample, 1, _with_keyframes(places, sample)
        ),
    ),
    latent_shape=(16, 16, 24),  # 121 frames of 512 x 768
)
register_family("LTX2VideoTransformer3DModel", FAMILY)
