"""apply_sla2: give every self-attention layer of a diffusers transformer sparse-linear
attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from sla2_core.attention import build_attention
from sla2_core.config import SLA2Config
from sla2_core.integrations.family import family_of, unwrapped
from sla2_core.integrations.handle import SLA2Handle
from sla2_core.integrations.processor import SLA2Processor, Switch
from sla2_core.integrations.token_order import check_order
from sla2_core.registry import ORDERS
from sla2_core.variants import build_config

__all__ = ["SLA2Handle", "apply_sla2"]


def apply_sla2(
    transformer: nn.Module,
    config: SLA2Config | Mapping[str, Any],
    *,
    skip_layers: Sequence[int] = (),
    dense_steps: int = 0,
    base_model: str | None = None,
) -> SLA2Handle:
    """Replace the self-attention of a diffusers transformer by SLA2 (or SLA), in place;
    cross-attention stays.

    Args:
        transformer: e.g. `pipe.transformer`, compiled or not; see
            integrations.families.known_classes(). The handle's is the module inside torch.compile's
            wrapper.
        config: its head_dim and num_heads are the model's. Or settings without these two: fields of
            SLA2Config by name, and "variant", as training_free() and settings files have them.
        skip_layers: self-attention layers that keep full attention; negative numbers count from the
            end.
        dense_steps: the first denoising steps of each generation keep full attention.
        base_model: hub id or folder of the weights, stored in adapters and compared on load.

    Returns:
        A handle to enable, disable, configure, save and load.

    Raises:
        ValueError: a class without an integration, other heads or head dimension than the model's,
            settings that SLA2Config does not have or refuses, a layer that does not exist, a model
            that already has SLA2, whose weights are offloaded to meta tensors, or whose processors
            have weights (an IP adapter), which SLA2's would leave out; a token order that asks for
            a grid, on a family that does not know its own. TypeError: neither a configuration nor
            settings.
    """
    transformer = unwrapped(
        transformer
    )  # names in its state_dict, and so in adapters, are those of the model itself
    family = family_of(transformer)
    found: dict[str, Any] = family.attention_layers(transformer)
    if not found:
        raise ValueError(
            "transformer: expected self-attention layers, found none in"
            f" {type(transformer).__name__}"
        )
    skipped = {_layer_number(i, len(found)) for i in skip_layers}
    if len(skipped) == len(found):
        raise ValueError(
            f"skip_layers: expected at least one of the {len(found)} layers to be left, got all of"
            " them"
        )
    if isinstance(dense_steps, bool) or not isinstance(dense_steps, int) or dense_steps < 0:
        raise ValueError(f"dense_steps: expected an integer >= 0, got {dense_steps!r}")
    names = {i: name for i, name in enumerate(found) if i not in skipped}
    if not isinstance(config, SLA2Config):
        if not isinstance(config, Mapping):
            kind = type(config).__name__
            raise TypeError(f"config: expected an SLA2Config or settings, got {kind}")
        heads, head_dim = family.heads(found[next(iter(names.values()))])
        config = build_config(config, head_dim=head_dim, num_heads=heads)
    check_order(family, ORDERS.get(config.token_order))
    for name in names.values():
        heads, head_dim = family.heads(found[name])
        for field, expected in (("num_heads", heads), ("head_dim", head_dim)):
            if getattr(config, field) != expected:
                raise ValueError(
                    f"config: expected {field}={expected} as in {name}, got"
                    f" {getattr(config, field)}"
                )
        if isinstance(found[name].processor, SLA2Processor):
            raise ValueError(
                f"transformer: expected a model without SLA2, but {name} has it; call"
                " handle.remove() first"
            )
        own = found[name].processor
        if isinstance(own, nn.Module) and any(True for _ in own.parameters()):
            raise ValueError(
                f"transformer: expected a processor without weights at {name}, got"
                f" {type(own).__name__}"
            )
    device = next(transformer.parameters()).device
    if device.type == "meta":
        raise ValueError(
            "transformer: expected weights, got meta tensors; SLA2 does not work with sequential"
            " CPU offload"
        )
    switch = Switch()
    for layer, name in names.items():
        attention = build_attention(config).to(device)
        processor = family.processor(attention, found[name].processor, layer, switch)
        processor.train(transformer.training)
        found[name].set_processor(processor)
    return SLA2Handle(
        transformer, family, names, switch, dense_steps=dense_steps, base_model=base_model
    )


def _layer_number(layer: int, count: int) -> int:
    if isinstance(layer, bool) or not isinstance(layer, int) or not -count <= layer < count:
        raise ValueError(f"skip_layers: expected layer numbers in [0, {count}), got {layer!r}")
    return layer % count
