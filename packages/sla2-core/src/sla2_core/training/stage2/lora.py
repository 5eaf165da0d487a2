"""LoRA in stage 2, through peft: added before training, merged into the weights after it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

_NAME = "sla2"


def add(transformer: nn.Module, rank: int, targets: Sequence[str], seed: int) -> None:
    """Add LoRA matrices to the linear layers whose names end in one of `targets`; the base weights
    are frozen.

    The initial matrices follow from `seed`; those of a run that was stopped are taken out first.
    Raises ModuleNotFoundError without peft, ValueError if no layer fits.
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


def merge(transformer: nn.Module) -> None:
    """Add the products of the matrices to the weights and take the matrices out."""
    transformer.fuse_lora(adapter_names=[_NAME])
    transformer.unload_lora()
