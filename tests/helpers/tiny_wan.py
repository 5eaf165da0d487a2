"""A tiny random Wan with its inputs and fitting settings: 2 layers, 2 heads of 12, 45 tokens."""

from __future__ import annotations

import torch
from sla2_core import SLA2Config

from helpers import models


def model(seed: int = 0, **changes):
    """In eval mode, its weights fixed by `seed`."""
    torch.manual_seed(seed)
    return models.wan(**changes).eval()


def inputs(batch: int = 2, seed: int = 1) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 4, 3, 6, 10, generator=rng),
        "timestep": torch.linspace(900, 100, batch),
        "encoder_hidden_states": torch.randn(batch, 5, 8, generator=rng),
    }


def config(**changes) -> SLA2Config:
    return SLA2Config(
        **dict(head_dim=12, num_heads=2, topk=0.3, block_q=8, block_k=5)
        | dict(alpha="position", alpha_knots=3)
        | changes
    )


# What the variant `sla` changes.
SLA = {"router": "heuristic", "complement": "projected", "alpha": "sum", "smooth_k": False}


def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (7, 4, 3, 6, 10) and text (7, 5, 8) to train on."""
    rng = torch.Generator().manual_seed(3)
    return torch.randn(7, 4, 3, 6, 10, generator=rng), torch.randn(7, 5, 8, generator=rng)


def weights(handle) -> dict[str, torch.Tensor]:
    """Copies of all of the model's tensors, the adapter's among them."""
    return {name: value.detach().clone() for name, value in handle.transformer.state_dict().items()}
