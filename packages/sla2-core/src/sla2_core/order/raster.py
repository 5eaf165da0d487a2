"""raster: tokens as the model has them, frame by frame and row by row."""

from __future__ import annotations

from sla2_core.order.base import Grid, Order
from sla2_core.registry import ORDERS


@ORDERS.register("raster")
class Raster(Order):
    """The identity."""

    identity = True

    def permutation(self, grid: Grid) -> None:
        """None: tokens stay where they are."""
        return None
