"""The axis of token orders, one member a file. Importing this folder registers them."""

from sla2_core.order import raster, tiles
from sla2_core.order.base import Grid, Order

__all__ = ["Grid", "Order", "raster", "tiles"]
