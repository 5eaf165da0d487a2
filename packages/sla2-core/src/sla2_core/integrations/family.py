"""The model families apply_sla2 knows: which attention layers a transformer has, and how its
forward is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sla2_core.integrations.processor import SLA2Processor
from sla2_core.order import Grid
from sla2_core.order.base import coordinates_of

_FAMILIES: dict[str, Family] = {}  # by the class of the transformer


@dataclass(frozen=True, kw_only=True)
class TokenFlow:
    """Where the tokens of a model are made and where they leave: what changes if they stand in
    another order between. Module names are of modules that make something of their own; a hook on a
    linear layer or a convolution would stand apart from the LoRA that peft puts around it.

    Args:
        arguments: (transformer, arguments of its forward by name, places) -> the arguments with
            place i of the tokens holding what belongs to token places[i]; places is int64 (N,).
        result: (transformer, its prediction, places) -> the prediction moved in the same way.
        modules: {module name: (its output, places) -> the output moved in the same way}.
        fits: transformer -> whether its layers work token by token beside attention.
    """

    arguments: Callable[[Any, dict[str, Any], Tensor], dict[str, Any]]
    result: Callable[[Any, Tensor, Tensor], Tensor]
    modules: Mapping[str, Callable[[Any, Tensor], Any]] = field(default_factory=dict)
    fits: Callable[[Any], bool] = lambda transformer: True


@dataclass(frozen=True, kw_only=True)
class Family:
    """What the rest of the package needs to know of one model family.

    Args:
        name: short name, for messages and adapters.
        attention_layers: transformer -> {name: self-attention module}, in the order of the forward
            pass.
        processor: the SLA2Processor class of these layers.
        heads: an attention module -> (number of heads, head dimension).
        predict: (transformer, noisy latents (B, ...), sigma (B,) in [0, 1], conditions by name)
            -> the model's prediction, of the latents' shape.
        tokens: (transformer config, latent frames, height, width) -> number of video tokens.
        latent_shape: (frames, height, width) of the latents in the model's usual setting, for
            reports.
        alphas_cumprod: transformer config -> fp32 (T,) for models that predict v on a
            variance-preserving schedule of T timesteps; None for flow matching.
        grid: (transformer, positional, keyword arguments of its forward) -> (frames, height, width)
            of its tokens; None if that is not known.
        coordinates: the same arguments -> int64 (N, 3), frame, row and column of each token, for a
            model that is not told its grid. No value of a tensor may be read.
        token_flow: where tokens are made and leave, for a token order that is applied once; None
            leaves it to the processors.
        install_hooks: (transformer, layer names) -> hook handles, where a processor needs to see
            more than its arguments.
    """

    name: str
    attention_layers: Callable[[nn.Module], dict[str, nn.Module]]
    processor: type[SLA2Processor]
    heads: Callable[[Any], tuple[int, int]]
    predict: Callable[[nn.Module, Tensor, Tensor, Mapping[str, Tensor]], Tensor]
    tokens: Callable[[Mapping[str, Any], int, int, int], int]
    latent_shape: tuple[int, int, int]
    alphas_cumprod: Callable[[Mapping[str, Any]], Tensor] | None = None
    grid: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Grid] | None = None
    coordinates: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Tensor] | None = None
    token_flow: TokenFlow | None = None
    install_hooks: Callable[[nn.Module, Sequence[str]], list[Any]] | None = None


def register_family(class_name: str, family: Family) -> None:
    """Make a family known for the transformers of a class, of diffusers or of your own.

    Args:
        class_name: the class's `__name__`; subclasses are found too.

    Raises:
        ValueError: the class has another family.
    """
    if _FAMILIES.setdefault(class_name, family) is not family:
        raise ValueError(f"class_name: expected a class without a family, got {class_name!r}")


def known_classes() -> tuple[str, ...]:
    """Names of the transformer classes with an integration."""
    return tuple(_FAMILIES)


def transformer_class(name: Any, where: str) -> Any:
    """The transformer class that diffusers has under this name.

    Raises ValueError, which begins with `where`, for a class without an integration, or one of your
    own, which is not in diffusers: make such a model yourself and call apply_sla2.
    """
    import diffusers

    if name not in known_classes():
        raise ValueError(f"{where}: expected one of {', '.join(known_classes())}, got {name!r}")
    if not hasattr(diffusers, name):
        raise ValueError(f"{where}: expected a class of diffusers, got {name!r}")
    return getattr(diffusers, name)


def family_of(transformer: nn.Module) -> Family:
    """The family of a transformer. Raises ValueError for a class without an integration."""
    return _FAMILIES[class_name(transformer)]


def class_name(transformer: nn.Module) -> str:
    """The name of a transformer's diffusers class, also for a subclass, such as FSDP2 makes.

    Raises ValueError for a class without an integration.
    """
    own = type(unwrapped(transformer))
    for cls in own.__mro__:
        if cls.__name__ in _FAMILIES:
            return cls.__name__
    raise ValueError(f"transformer: expected one of {', '.join(_FAMILIES)}, got {own.__name__}")


def grid_of(
    family: Family, transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Grid | None:
    """(frames, height, width) of the tokens in a call of the transformer's forward, with these
    arguments; None where it is not known, or where the tokens are not one whole grid in raster
    order. Coordinates are read, which waits for their device.
    """
    if family.grid is not None:
        return family.grid(transformer, args, kwargs)
    if family.coordinates is None:
        return None
    found = family.coordinates(transformer, args, kwargs).cpu()
    frames, height, width = (int(n) + 1 for n in found.amax(0))
    if not torch.equal(found, coordinates_of((frames, height, width), found.device)):
        return None
    return frames, height, width


def unwrapped(transformer: nn.Module) -> nn.Module:
    """The module inside torch.compile's or DistributedDataParallel's wrapper."""
    while True:
        inner = getattr(transformer, "_orig_mod", None)
        if inner is None and isinstance(transformer, torch.nn.parallel.DistributedDataParallel):
            inner = transformer.module
        if inner is None:
            return transformer
        transformer = inner
