"""LoRA in stage 2, through peft: added before training, merged into the weights after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_NAME = "sla2"


def add(transformer: Any, rank: int, targets: Sequence[str], seed: int) -> None:
    """Add LoRA matrices to a diffusers transformer and freeze its own weights. Matrices that a
    stopped run left are taken out first.

    Args:
        transformer: the model. rank: of the matrices; lora_alpha is the same.
        targets: the linear layers whose names end in one of these.
        seed: the initial matrices follow from it.

    Raises:
        ModuleNotFoundError: no peft. ValueError: no layer fits.
    """
    try:
        from peft import LoraConfig
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "peft: expected it for lora_rank, install sla2-core[train]"
        ) from None
    if _NAME in getattr(transformer, "peft_config", {}):
        transformer.unload_lora()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets))
        try:
            transformer.add_adapter(config, adapter_name=_NAME)
        except ValueError as error:
            raise ValueError(
                f"lora_targets: expected names of linear layers, got {list(targets)}: {error}"
            ) from None


def merge(transformer: Any) -> None:
    """Add the products of the matrices that add() made to the weights, and take the matrices
    out.
    """
    transformer.fuse_lora(adapter_names=[_NAME])
    transformer.unload_lora()
