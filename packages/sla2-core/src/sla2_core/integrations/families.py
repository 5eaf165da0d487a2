"""The model families apply_sla2 knows: which attention layers a transformer has, and how its forward is called."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Class of the transformer in diffusers -> the module of this package that defines its FAMILY.
_MODULES = {
    "WanTransformer3DModel": "wan",
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """What the rest of the package needs to know of one model family.

    Args:
        name: short name, for messages and adapters.
        attention_layers: transformer -> {name: self-attention module}, in the order of the forward pass.
        processor: the SLA2Processor class of these layers.
        heads: an attention module -> (number of heads, head dimension).
        predict: (transformer, noisy latents, sigma (B,) in [0, 1], conditions) -> the model's prediction, a tensor.
        objective: "flow" (velocity noise - clean) or "v_prediction" (diffusion with a cosine-like alpha schedule).
        tokens: (transformer config, frames, height, width in latent units) -> (video tokens, text tokens).
    """

    name: str
    attention_layers: Callable[[nn.Module], dict[str, nn.Module]]
    processor: type[nn.Module]
    heads: Callable[[nn.Module], tuple[int, int]]
    predict: Callable[[nn.Module, Tensor, Tensor, Mapping[str, Tensor]], Tensor]
    tokens: Callable[[Mapping, int, int, int], tuple[int, int]]
    objective: str = "flow"


def known_classes() -> tuple[str, ...]:
    """Names of the transformer classes with an integration."""
    return tuple(_MODULES)


def family_of(transformer: nn.Module) -> Family:
    """The family of a diffusers transformer. Raises ValueError for a class without an integration."""
    for cls in type(unwrapped(transformer)).__mro__:
        if cls.__name__ in _MODULES:
            return importlib.import_module(f"sla2_core.integrations.{_MODULES[cls.__name__]}").FAMILY
    raise ValueError(f"transformer: expected one of {', '.join(_MODULES)}, got {type(unwrapped(transformer)).__name__}")


def unwrapped(transformer: nn.Module) -> nn.Module:
    """The module inside torch.compile's or DistributedDataParallel's wrapper."""
    while True:
        inner = getattr(transformer, "_orig_mod", None)
        if inner is None and isinstance(transformer, torch.nn.parallel.DistributedDataParallel):
            inner = transformer.module
        if inner is None:
            return transformer
        transformer = inner
