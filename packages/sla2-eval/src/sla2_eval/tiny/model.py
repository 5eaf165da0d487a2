"""The built-in tiny Wans: their transformer, their caption encoder, and their weights in diffusers'
folder format.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sla2_eval.tiny.shapes import NUM_FRAMES, SIZE, WORDS

CAPTION_LENGTH = 12
TEXT_DIM = len(WORDS) + CAPTION_LENGTH
SHIFT = 3.0  # of the noise schedule, in training and in sampling
WEIGHTS = Path(__file__).parent / "weights"
LATENT_SHAPE = (3, NUM_FRAMES, SIZE, SIZE)
# Pixels along the side of a patch, by the model's name: 1,024 tokens and 4,096.
PATCHES = {"tiny-1k": 4, "tiny-4k": 2}
DEFAULT = "tiny-1k"  # the one that is meant by "tiny"
ROTARY_STEP = 4  # pixels of height and width to one step of the rotary positions
NAMES = ("tiny", *PATCHES)


def weights_of(name: str) -> Path:
    """The folder of the weights of a built-in model, one of NAMES, whether or not it is there."""
    return WEIGHTS / (DEFAULT if name == "tiny" else name)


def build_transformer(name: str = DEFAULT) -> Any:
    """A WanTransformer3DModel of 1.2 M parameters, 4 layers and 4 heads of 32, for 16 frames of
    32 x 32 pixels: a built-in model with random weights.
    """
    from diffusers import WanTransformer3DModel

    side = PATCHES[name]
    transformer = WanTransformer3DModel(
        patch_size=(1, side, side),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=3,
        out_channels=3,
        text_dim=TEXT_DIM,
        freq_dim=64,
        ffn_dim=512,
        num_layers=4,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    )
    _count_positions_in_pixels(transformer)
    return transformer


def load_transformer(folder: Path) -> Any:
    """The transformer of a built-in model's folder, with the rotary positions that it was trained
    with. diffusers alone counts them in patches, which for patches of 4 pixels is the same.

    Raises ValueError for a transformer whose captions are not those of the built-in models.
    """
    from diffusers import WanTransformer3DModel

    transformer = WanTransformer3DModel.from_pretrained(str(folder))
    if transformer.config.text_dim != TEXT_DIM:
        raise ValueError(
            f"model: expected text_dim={TEXT_DIM} in {folder}, got {transformer.config.text_dim}"
        )
    _count_positions_in_pixels(transformer)
    return transformer


def _count_positions_in_pixels(transformer: Any) -> None:
    """Let the rotary embedding turn by the same angle over the same pixels, whatever the patch:
    ROTARY_STEP pixels of height or width to a step, one frame to a step.
    """
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    rotary = transformer.rope
    _, height, width = transformer.config.patch_size
    axes = (
        (rotary.t_dim, 1.0),
        (rotary.h_dim, height / ROTARY_STEP),
        (rotary.w_dim, width / ROTARY_STEP),
    )
    steps = torch.arange(rotary.max_seq_len)
    parts = [
        get_1d_rotary_pos_embed(
            dim,
            steps * step,
            use_real=True,
            repeat_interleave_real=True,
            freqs_dtype=torch.float64,
        )
        for dim, step in axes
    ]
    rotary.freqs_cos.copy_(torch.cat([cos for cos, _ in parts], dim=1))
    rotary.freqs_sin.copy_(torch.cat([sin for _, sin in parts], dim=1))


def with_smaller_patches(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The weights of a built-in model as a start for the model `name`, whose patches are smaller.

    A pixel of a small patch takes the place of the pixels that it would cover if the patch were
    enlarged to the old size: their weights are summed where patches are embedded, and averaged
    where pixels are predicted. All else is the same in both.
    """
    embedding = state["patch_embedding.weight"]  # (C, 3, 1, p, p)
    side = PATCHES[name]
    ratio = embedding.shape[-1] // side
    cut = (side, ratio, side, ratio)
    out = dict(state)
    found = embedding.reshape(*embedding.shape[:3], *cut)
    out["patch_embedding.weight"] = found.sum((4, 6))
    for key in ("proj_out.weight", "proj_out.bias"):  # (p p 3, ...), rows first
        rows = state[key].reshape(*cut, 3, *state[key].shape[1:])
        out[key] = rows.mean((1, 3)).flatten(0, 2)
    return out


def encode_captions(captions: list[str]) -> Tensor:
    """One-hot words beside one-hot positions: float32 (n, CAPTION_LENGTH, TEXT_DIM). The empty
    caption is all zeros.

    Raises ValueError for a word outside the vocabulary or a caption that is too long.
    """
    out = torch.zeros(len(captions), CAPTION_LENGTH, TEXT_DIM)
    for row, caption in enumerate(captions):
        words = caption.split()
        unknown = [word for word in words if word not in WORDS]
        if unknown:
            raise ValueError(
                f"caption: expected words among {', '.join(WORDS)}, got {unknown[0]!r} in"
                f" {caption!r}"
            )
        if len(words) > CAPTION_LENGTH:
            raise ValueError(
                f"caption: expected at most {CAPTION_LENGTH} words, got {len(words)} in {caption!r}"
            )
        for position, word in enumerate(words):
            out[row, position, WORDS.index(word)] = 1.0
            out[row, position, len(WORDS) + position] = 1.0
    return out


def to_latents(videos: Any) -> Tensor:
    """uint8 (n, T, H, W, 3) -> float32 (n, 3, T, H, W) in [-1, 1]: the tiny model works
    on pixels.
    """
    return torch.as_tensor(videos).permute(0, 4, 1, 2, 3).float().div(127.5).sub(1.0)


def to_frames(latents: Tensor) -> np.ndarray:
    """The inverse of to_latents, clipped and rounded: uint8 numpy (n, T, H, W, 3)."""
    scaled = latents.float().clamp(-1, 1).add(1.0).mul(127.5).round().to(torch.uint8)
    return scaled.permute(0, 2, 3, 4, 1).contiguous().numpy()
