"""What attention costs while videos are generated: sparsity and FLOPs of its calls."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sla2_core.block_map import BlockMap, Geometry
    from sla2_core.config import SLA2Config
    from sla2_core.integrations.handle import SLA2Handle


@dataclass
class _Calls:
    """Those of one geometry: how many, their block pairs, and the selected ones as a tensor."""

    calls: int = 0
    pairs: int = 0
    selected: Any = 0


class CallCosts:
    """Watches the layers that SLA2 has taken over, of one model or of several, as a context
    manager.

    A layer's call counts once, whatever its batch. Steps that an adapter leaves to full attention
    count as that. Nothing waits for the device before summary().
    """

    def __init__(self, handles: Sequence[SLA2Handle]):
        self._handles = handles
        self._routed: dict[tuple[SLA2Config, Geometry], _Calls] = {}
        self._calls = 0  # of all layers, dense steps included
        self._stack = ExitStack()

    def __enter__(self) -> CallCosts:
        for handle in self._handles:
            observer = functools.partial(self._note, handle.config)
            self._stack.enter_context(handle.observing(observer))
            count = functools.partial(self._count, len(handle.layers))
            self._stack.callback(handle.transformer.register_forward_pre_hook(count).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _count(self, layers: int, *_: Any) -> None:
        self._calls += layers

    def _note(self, config: SLA2Config, layer: int, block_map: BlockMap) -> None:
        from sla2_core.block_map import Geometry

        geometry = Geometry(**{name: getattr(block_map, name) for name in Geometry._fields})
        found = self._routed.setdefault((config, geometry), _Calls())
        b, h, t_m, t_n = block_map.shape
        found.calls += 1
        found.pairs += b * h * t_m * t_n
        found.selected = found.selected + block_map.counts.sum()

    def summary(self) -> dict[str, float]:
        """{"sparsity", "flops"}: means over calls of the share of block pairs that are not attended
        exactly, and of attention's FLOPs as a share of full attention's. Empty without calls.
        """
        from sla2_core.cost import share_at

        if not self._calls:
            return {}
        dense = self._calls - sum(found.calls for found in self._routed.values())
        sparsity, flops = 0.0, float(dense)
        for (config, geometry), found in self._routed.items():
            topk = int(found.selected) / found.pairs
            text = max(0, geometry.n_k - geometry.n_q)
            sparsity += found.calls * (1 - topk)
            flops += found.calls * share_at(topk, geometry, config, text)
        return {"sparsity": sparsity / self._calls, "flops": flops / self._calls}
