"""What a token order is: the order in which the tokens of a grid are cut into blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from sla2_core.config import SLA2Config
from sla2_core.registry import Described

Grid = tuple[int, int, int]  # frames, height, width, in tokens


class Order(Described, ABC):
    """A permutation of a grid of tokens. Text tokens keep their place behind the grid's."""

    def __init__(self, config: SLA2Config):
        self.config = config

    @abstractmethod
    def permutation(self, grid: Grid) -> Tensor | None:
        """int64 (t * h * w,): which token of the raster order stands at each place; None for the
        raster order itself.
        """
