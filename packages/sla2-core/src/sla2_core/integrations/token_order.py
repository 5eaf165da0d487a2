"""The token order of a whole model: its tokens are put in order once in a forward pass, where they
are made, and put back where they leave. What stands between works token by token, or is attention.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sla2_core.integrations.family import Family
from sla2_core.integrations.processor import Switch
from sla2_core.order import Order


def check_order(family: Family, order: type[Order]) -> None:
    """Raise ValueError for an order that a family cannot have: one beside the raster's, where it
    does not say where its tokens lie, or says it in a form that the order does not read.
    """
    known = family.grid is not None
    known = known or (family.coordinates is not None and order.reads_coordinates)
    if not order.identity and not known:
        raise ValueError(
            f"token_order: expected 'raster' for {family.name}, whose grid of tokens is not known,"
            f" got {order.name!r}"
        )


class TokenOrder:
    """Hooks that keep a transformer's tokens in order during each forward pass that goes through
    SLA2 or is recorded.

    For a family without a TokenFlow, a model that does not fit its family's, and one whose tokens
    diffusers' context parallelism spreads over ranks, the processors do it: they permute Q, K, V
    and the output of every layer, under Ulysses all tokens of this rank's heads.

    Args:
        transformer: of the family. order: that check_order lets pass, beside the raster's.
        switch: of its processors.

    Attributes:
        hooks: their handles.

    """

    def __init__(self, transformer: nn.Module, family: Family, order: Order, switch: Switch):
        self.family, self.order, self.switch, self.flow = family, order, switch, family.token_flow
        self.names = tuple(inspect.signature(transformer.forward).parameters)
        self.places: Tensor | None = None  # while the tokens of a forward pass are in order
        self.hooks: list[Any] = [
            transformer.register_forward_pre_hook(self.begin, with_kwargs=True)
        ]
        if self.flow is not None:
            for name, change in self.flow.modules.items():
                hook = functools.partial(self.inside, change)
                self.hooks.append(transformer.get_submodule(name).register_forward_hook(hook))
            self.hooks.append(transformer.register_forward_hook(self.end))

    def begin(
        self, transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """A pre-hook of the transformer: its arguments with the tokens in order."""
        self.places = self.switch.places = None
        if not self.switch.routed and self.switch.recorder is None:
            return None
        places = self._places(transformer, args, kwargs)
        parallel = getattr(transformer, "_parallel_config", None)
        if self.flow is None or parallel is not None or not self.flow.fits(transformer):
            self.switch.places = places
            return None
        if places is None:
            return None
        self.places = places
        first = self.names[: len(args)]
        given = {**dict(zip(first, args)), **kwargs}
        given = self.flow.arguments(transformer, given, places)
        return tuple(given.pop(name) for name in first), given

    def _places(
        self, transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor | None:
        if self.family.grid is None:
            assert self.family.coordinates is not None  # see __init__
            coordinates = self.family.coordinates(transformer, args, kwargs)
            return self.order.arrange(coordinates, image=self.family.latent_shape[0] == 1)
        first = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        return self.order.places(self.family.grid(transformer, args, kwargs), first.device)

    def inside(
        self, change: Callable[[Any, Tensor], Any], module: nn.Module, args: Any, output: Any
    ) -> Any:
        """A hook of a module that makes tokens, or what belongs to them."""
        return None if self.places is None else change(output, self.places)

    def end(self, transformer: Any, args: Any, output: Any) -> Any:
        """A hook of the transformer: its output with the tokens where they were."""
        places, self.places = self.places, None
        if places is None:
            return None
        assert self.flow is not None  # begin() sets no places without
        sample = self.flow.result(transformer, output[0], torch.argsort(places))
        if isinstance(output, tuple):
            return (sample, *output[1:])
        output.sample = sample  # of diffusers' output classes
        return output
