"""What a token order is: the order in which the tokens of a grid are cut into blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from sla2_core.config import SLA2Config
from sla2_core.registry import Described

Grid = tuple[int, int, int]  # frames, height, width, in tokens


class Order(Described, ABC):
    """A permutation of a grid of tokens. Text tokens keep their place behind the grid's."""

    identity: ClassVar[bool] = False  # the raster order itself, for which no grid is needed

    def __init__(self, config: SLA2Config):
        self.configure(config)

    def configure(self, config: SLA2Config) -> None:
        """Take over what may change of a configuration, see config.CHANGEABLE."""
        self.config = config

    @abstractmethod
    def permutation(self, grid: Grid) -> Tensor | None:
        """int64 (t * h * w,): which token of the raster order stands at each place; None for the
        raster order itself.
        """
