"""What a diffusers pipeline makes of a video and its caption: the latents its transformer trains
on, and the conditions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

Sample = dict[str, Tensor]


class Encoder(NamedTuple):
    """How a pipeline encodes a video and its caption: {name: tensor} without a batch dimension, in
    fp32 or int64, named as the transformer's arguments are.

    Attributes:
        video: (pipe, pixels (1, 3, T, H, W) in [-1, 1]) -> "latents", and the conditions that
            follow from the latents or their shape.
        text: (pipe, caption) -> the other conditions.

    Both raise ValueError for a part of the pipeline that they need and that is missing.
    """

    video: Callable[[Any, Tensor], Sample]
    text: Callable[[Any, str], Sample]


def encoder_of(pipe: Any) -> Encoder:
    """The encoder of a diffusers pipeline.

    Raises ValueError for a class without one, or for a pipeline without a transformer that its
    encoder needs.
    """
    name = type(pipe).__name__
    if name in _MISSING:
        raise ValueError(
            f"pipe: expected one of {', '.join(_ENCODERS)}, got {name}, {_MISSING[name]}"
        )
    if name not in _ENCODERS:
        raise ValueError(f"pipe: expected one of {', '.join(_ENCODERS)}, got {name}")
    if name in _NEEDS_TRANSFORMER and pipe.transformer is None:
        raise ValueError(
            f"pipe: expected a {name} with its transformer, {_NEEDS_TRANSFORMER[name]}, got none"
        )
    return _ENCODERS[name]


def _part(pipe: Any, name: str) -> Any:
    part = getattr(pipe, name)
    if part is None:
        raise ValueError(f"pipe: expected a {type(pipe).__name__} with its {name}, got none")
    return part


@torch.no_grad()
def _mode(pipe: Any, pixels: Tensor) -> Tensor:
    """The mode of the VAE's posterior, fp32."""
    vae = _part(pipe, "vae")
    return vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode().float()


def _scaled(pipe: Any, pixels: Tensor) -> Tensor:
    return _mode(pipe, pixels)[0] * pipe.vae.config.scaling_factor


def _wan_video(pipe: Any, pixels: Tensor) -> Sample:
    """(C, t, h, w), by the mean and the standard deviation of each channel."""
    latents, config = _mode(pipe, pixels)[0], pipe.vae.config
    mean, std = (
        torch.tensor(x, device=latents.device).view(-1, 1, 1, 1)
        for x in (config.latents_mean, config.latents_std)
    )
    return {"latents": (latents - mean) / std}


@torch.no_grad()
def _wan_image_video(pipe: Any, pixels: Tensor) -> Sample:
    """(C, t, h, w), with the latents of the given frames and their mask as `image_latents`: the
    first frame, and the last one too for a model that takes both; for Wan2.1 also their CLIP
    embedding.
    """
    if pipe.config.expand_timesteps:
        raise ValueError(
            "pipe: expected an image to video pipeline that takes the first frame as channels, got"
            " one with expand_timesteps"
        )
    sample, config = _wan_video(pipe, pixels), pipe.transformer.config
    both = config.pos_embed_seq_len is not None
    latents = sample["latents"]
    frames = [pixels[:, :, i].to(latents) for i in ((0, -1) if both else (0,))]
    _, given = pipe.prepare_latents(
        frames[0],
        1,
        len(latents),
        *pixels.shape[3:],
        pixels.shape[2],
        torch.float32,
        latents.device,
        None,
        latents[None],
        frames[1] if both else None,
    )
    sample["image_latents"] = given[0]
    if config.image_dim is not None:
        _part(pipe, "image_encoder")
        images = [((frame[0] + 1) / 2).clamp(0, 1).cpu().numpy() for frame in frames]
        pictures = [(image * 255).round().astype("uint8").transpose(1, 2, 0) for image in images]
        embeds = pipe.encode_image(pictures, device=latents.device)
        sample["encoder_hidden_states_image"] = embeds.float().flatten(0, 1)
    return sample


def _hunyuan_video15_video(pipe: Any, pixels: Tensor) -> Sample:
    """(C, t, h, w); no first frame is given: its latents, its mask and the image embeddings are 0,
    as in text to video.
    """
    latents = _scaled(pipe, pixels)
    given = pipe.prepare_cond_latents_and_mask(latents[None], latents.dtype, latents.device)
    images = torch.zeros(pipe.vision_num_semantic_tokens, pipe.vision_states_dim)
    return {
        "latents": latents,
        "condition_latents": torch.cat(given, dim=1)[0],
        "image_embeds": images,
    }


def _cogvideox_video(pipe: Any, pixels: Tensor) -> Sample:
    """(t, C, h, w), with the rotary embedding of its size."""
    latents = _scaled(pipe, pixels).transpose(0, 1).contiguous()
    config = pipe.transformer.config
    if len(latents) % (config.patch_size_t or 1):
        raise ValueError(
            f"num_frames: expected latent frames that {config.patch_size_t} divides, as in the"
            f" model's patches, got {len(latents)} from {pixels.shape[2]} frames"
        )
    if not config.use_rotary_positional_embeddings:
        return {"latents": latents}
    height, width = pixels.shape[3:]
    cos, sin = pipe._prepare_rotary_positional_embeddings(
        height, width, len(latents), latents.device
    )
    return {"latents": latents, "rotary_cos": cos, "rotary_sin": sin}


def _flux_video(pipe: Any, pixels: Tensor) -> Sample:
    """(N, 4 C), packed 2 x 2, of the only frame."""
    if pixels.shape[2] != 1:
        raise ValueError(
            f"num_frames: expected 1 for FluxPipeline, a model of images, got {pixels.shape[2]}"
        )
    config = pipe.vae.config
    latents = (_mode(pipe, pixels[:, :, 0]) - config.shift_factor) * config.scaling_factor
    _, channels, height, width = latents.shape
    ids = pipe._prepare_latent_image_ids(1, height // 2, width // 2, latents.device, latents.dtype)
    return {"latents": pipe._pack_latents(latents, 1, channels, height, width)[0], "img_ids": ids}


def _text(names: tuple[str | None, ...], **options: Any) -> Callable[[Any, str], Sample]:
    """encode_prompt's results under the transformer's names; None leaves one out. Masks become
    int64.
    """

    @torch.no_grad()
    def encode(pipe: Any, caption: str) -> Sample:
        found = pipe.encode_prompt(
            caption, device=_part(pipe, "text_encoder").device, **options, **_length(pipe)
        )
        return {
            name: value[0].long() if "mask" in name else value[0].float()
            for name, value in zip(names, found, strict=True)
            if name is not None
        }

    return encode


def _length(pipe: Any) -> dict[str, int]:
    """How many text tokens generation pads to; encode_prompt's own default is another for Wan."""
    found = inspect.signature(type(pipe).__call__).parameters.get("max_sequence_length")
    return {} if found is None else {found.name: found.default}


def _flux_text(pipe: Any, caption: str) -> Sample:
    with torch.no_grad():
        text, pooled, ids = pipe.encode_prompt(
            caption, None, device=_part(pipe, "text_encoder").device, **_length(pipe)
        )
    return {
        "encoder_hidden_states": text[0].float(),
        "pooled_projections": pooled[0].float(),
        "txt_ids": ids.float(),
    }


_ENCODERS: Mapping[str, Encoder] = {
    "WanPipeline": Encoder(
        _wan_video, _text(("encoder_hidden_states", None), do_classifier_free_guidance=False)
    ),
    "WanImageToVideoPipeline": Encoder(
        _wan_image_video, _text(("encoder_hidden_states", None), do_classifier_free_guidance=False)
    ),
    "HunyuanVideoPipeline": Encoder(
        lambda pipe, pixels: {"latents": _scaled(pipe, pixels)},
        _text(("encoder_hidden_states", "pooled_projections", "encoder_attention_mask")),
    ),
    "HunyuanVideo15Pipeline": Encoder(
        _hunyuan_video15_video,
        _text(
            (
                "encoder_hidden_states",
                "encoder_attention_mask",
                "encoder_hidden_states_2",
                "encoder_attention_mask_2",
            )
        ),
    ),
    "CogVideoXPipeline": Encoder(
        _cogvideox_video, _text(("encoder_hidden_states", None), do_classifier_free_guidance=False)
    ),
    "FluxPipeline": Encoder(_flux_video, _flux_text),
}
_NEEDS_TRANSFORMER = {
    "CogVideoXPipeline": "whose configuration gives the rotary embedding",
    "HunyuanVideo15Pipeline": "whose configuration gives the size of the image embeddings",
    "WanImageToVideoPipeline": "whose configuration says which frames it takes",
}
_MISSING = {
    "LTX2Pipeline": (
        "whose transformer also takes the latents of a sound track, which is not read here"
    ),
}
