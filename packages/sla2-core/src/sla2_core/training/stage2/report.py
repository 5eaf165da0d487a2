"""What stage 2 did: losses and gradient norms by step, and where the adapter lies."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(kw_only=True)
class Stage2Report:
    """What stage 2 did.

    Attributes:
        steps: optimiser steps done. loss, grad_norm: of each of them, the norm before clipping.
        adapter: the adapter's folder.
    """

    steps: int = 0
    loss: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    adapter: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values; Stage2Report(**values) reads them."""
        return asdict(self)
