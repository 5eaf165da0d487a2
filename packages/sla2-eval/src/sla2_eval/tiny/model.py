"""The built-in tiny Wan: its transformer, its caption encoder, and its weights in diffusers' folder
format.
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


def build_transformer() -> Any:
    """A WanTransformer3DModel of 1.2 M parameters: 4 layers, 4 heads of 32, 1,024 tokens for 16
    frames of 32 x 32 pixels.
    """
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 4, 4),
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
