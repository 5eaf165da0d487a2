"""LoRA in stage 2, through peft: added before training, merged into the weights after it or kept
beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sla2_core.integrations import lora

NAME = "sla2"


def add(transformer: Any, rank: int, targets: Sequence[str], seed: int) -> None:
    """Add LoRA matrices to a diffusers transformer and freeze its own weights. Matrices that a
    stopped run left are taken out first. A LoRA that is loaded stays active, and frozen.

    Args:
        transformer: the model. rank: of the matrices; lora_alpha is the same.
        targets: the linear layers whose names end in one of these.
        seed: the initial matrices follow from it.

    Raises:
        ModuleNotFoundError: no peft. ValueError: no layer fits, or a LoRA is fused.
    """
    try:
        from peft import LoraConfig
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "peft: expected it for lora_rank, install sla2-core[train]"
        ) from None
    if NAME in getattr(transformer, "peft_config", {}):
        lora.take_out(transformer, NAME)
    lora.check_not_fused(transformer)
    others = lora.active(transformer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets))
        try:
            transformer.add_adapter(config, adapter_name=NAME)
        except ValueError as error:
            raise ValueError(
                f"lora_targets: expected names of linear layers, got {list(targets)}: {error}"
            ) from None
    if others:
        transformer.set_adapter([*others, NAME])
    lora.freeze_others(transformer, NAME)


def merge(transformer: Any) -> None:
    """Add the products of the matrices that add() made to the weights, and take the matrices
    out.
    """
    lora.fold(transformer, NAME)
