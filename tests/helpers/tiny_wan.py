"""A tiny random Wan with its inputs and fitting settings: 2 layers, 2 heads of 12, 45 tokens."""

from __future__ import annotations

import torch
from sla2_core import SLA2Config

TEXT = 8


def model(seed: int = 0, **changes):
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    settings = dict(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        rope_max_seq_len=32,
    )
    return WanTransformer3DModel(**(settings | changes)).eval()


def inputs(batch: int = 2, seed: int = 1) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 4, 3, 6, 10, generator=rng),
        "timestep": torch.linspace(900, 100, batch),
        "encoder_hidden_states": torch.randn(batch, 5, TEXT, generator=rng),
    }


def config(**changes) -> SLA2Config:
    return SLA2Config(
        **(dict(head_dim=12, num_heads=2, topk=0.3, block_q=8, block_k=5, alpha_knots=3) | changes)
    )
