"""sla2_eval's tiny model with random weights, saved as training saves it."""

from __future__ import annotations

from pathlib import Path


def save(folder: Path) -> None:
    """Write transformer/ and scheduler/ into the folder."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler
    from sla2_eval.tiny.model import SHIFT, build_transformer

    torch.manual_seed(0)
    build_transformer().save_pretrained(folder / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=SHIFT).save_pretrained(folder / "scheduler")
