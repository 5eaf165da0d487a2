"""LoRA layers that peft has put into a transformer: which tensors are theirs, and how those of the
model are called beneath them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sla2_core.adapter import read_tensors, write_tensors

FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers' load_lora_weights looks for
PREFIX = "transformer"


def layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, layer) of each layer that peft has wrapped, without importing peft."""
    for name, module in model.named_modules():
        if hasattr(module, "base_layer") and hasattr(module, "adapter_layer_names"):
            yield name, module


def plain_names(model: nn.Module) -> dict[str, str | None]:
    """{name in the state_dict: name in the model without LoRA}, None for LoRA's own tensors."""
    wrapped = tuple(f"{name}." for name, _ in layers(model))
    found: dict[str, str | None] = {}
    for name in model.state_dict(keep_vars=True):
        prefix = max((p for p in wrapped if name.startswith(p)), key=len, default=None)
        if prefix is None:
            found[name] = name
            continue
        rest = name.removeprefix(prefix)
        inner = rest.removeprefix("base_layer.")
        found[name] = None if inner == rest else prefix + inner
    return found


def freeze_others(model: nn.Module, name: str | None = None) -> None:
    """Let no LoRA but `name` require a gradient."""
    for _, layer in layers(model):
        for kind in layer.adapter_layer_names:
            for other, part in getattr(layer, kind).items():
                if other != name:
                    part.requires_grad_(False)


def active(model: Any) -> list[str]:
    """The names of the LoRAs that take part in a forward pass, by their own layers."""
    return next((list(layer.active_adapters) for _, layer in layers(model)), [])


def check_not_fused(model: nn.Module) -> None:
    """Raise ValueError if a LoRA is fused into the weights: another one beside it would be left
    out.
    """
    for name, layer in layers(model):
        if layer.merged:
            raise ValueError(
                f"transformer: expected no fused LoRA to train another one, got"
                f" {layer.merged_adapters[0]!r} fused at {name}; call pipe.unload_lora_weights()"
                " to keep it in the weights for good, or pipe.unfuse_lora()"
            )


@torch.no_grad()
def fold(model: Any, name: str) -> None:
    """Add the product of a LoRA's matrices to the weights for good, and take its matrices out."""
    for _, layer in layers(model):
        if name in layer.lora_A:
            layer.base_layer.weight += layer.get_delta_weight(name)
    take_out(model, name)


def take_out(model: Any, name: str) -> None:
    """Remove a LoRA. The others stay, as active as they were; without any the layers are plain
    ones again.
    """
    if set(model.peft_config) == {name}:
        model.unload_lora()
    else:
        model.delete_adapters(name)


def save(model: Any, name: str, folder: Path, state: dict[str, Tensor] | None = None) -> Path:
    """Write a LoRA as pipe.load_lora_weights(folder) reads it; returns the file. Its lora_alpha is
    its rank, which diffusers takes where the file names none.

    Args:
        model: the transformer. name: of the LoRA. folder: exists.
        state: the transformer's whole state_dict, where it was gathered from several processes.

    Raises:
        OSError: the file cannot be written.
    """
    from peft.utils import get_peft_model_state_dict

    found = get_peft_model_state_dict(model, state_dict=state, adapter_name=name)
    write_tensors(
        folder / FILE, {f"{PREFIX}.{key}": x for key, x in found.items()}, {"format": "pt"}
    )
    return folder / FILE


def load(model: Any, folder: Path) -> str | None:
    """Load the LoRA that save() wrote, if the folder has one, beside those that are active; its
    name in the model.

    Raises:
        ValueError: a file that cannot be read or does not fit the model, or a fused LoRA; the
            message names the file.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    check_not_fused(model)
    found, others = read_tensors(path), active(model)
    name = "sla2"
    while name in getattr(model, "peft_config", {}):
        name += "_"
    try:
        model.load_lora_adapter(found, prefix=PREFIX, adapter_name=name)
    except Exception as error:  # peft and diffusers raise many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: expected a LoRA of this model, got: {reason}") from None
    model.set_adapter([*others, name])
    return name
