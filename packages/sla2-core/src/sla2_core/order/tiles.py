"""tiles: the grid is cut into tiles, and a walk goes back and forth over the tiles and inside each.

A block of consecutive tokens is then compact in time, height and width, so that its tokens have
more in common and their mean says more about them. Mean squared distance of a token to the centre
of its block, for blocks of 64 tokens on Wan's grid of 21 x 30 x 52: 226 in raster order; 30 for
tiles of 4 x 4 x 4 one after the other, where a block that a cut tile leaves unfinished goes on in
a tile far away; 5.0 on this walk, on which it goes on in the next tile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from sla2_core.order.base import Grid, Order, coordinates_of
from sla2_core.registry import ORDERS


@ORDERS.register("tiles")
class Tiles(Order):
    """Tiles in boustrophedon order: each axis is walked back and forth, by tiles and inside them.

    Any grid will do, and nothing is padded: the last tiles of an axis are smaller. The option
    `tile` is (frames, height, width) in tokens; None takes one of as many tokens as a key block,
    as near to a cube as powers of two come: 4 x 4 x 4 for blocks of 64, in an image 1 x 8 x 8.
    """

    settings = ("block_k",)  # gives the tile where the option does not
    options: ClassVar = {"tile": None}
    reads_coordinates = True

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Raises ValueError for a `tile` that is neither None nor three integers >= 1."""
        tile = options["tile"]
        whole = isinstance(tile, tuple) and len(tile) == 3
        if tile is not None and not (whole and all(type(n) is int and n >= 1 for n in tile)):
            raise ValueError(
                "options.tile: expected None or (frames, height, width), integers >= 1, got"
                f" {tile!r}"
            )

    def permutation(self, grid: Grid) -> Tensor:
        """As Order.permutation."""
        return self.arrange(coordinates_of(grid, torch.device("cpu")), image=grid[0] == 1)

    def arrange(self, coordinates: Tensor, *, image: bool) -> Tensor:
        """As Order.arrange. Reads no value, and so never waits for a device."""
        tile = self.config.options["tile"] or tile_of(self.config.block_k, image)
        outer, inner, sizes = [], [], []
        for axis, side in zip(coordinates.unbind(1), tile):
            outer.append(axis // side)
            inner.append(axis % side)
            sizes.append((axis.amax() + 1 - outer[-1] * side).clamp(max=side))
        back = _backwards(outer)
        # Each tile is entered at the side that the walk comes from, on every axis.
        inner = [torch.where(b, n - 1 - x, x) for x, n, b in zip(inner, sizes, back)]
        return _lexsort([*_signed(outer, back), *_signed(inner, _backwards(inner))])


def tile_of(tokens: int, image: bool) -> Grid:
    """The smallest (frames, height, width) of at least so many tokens that doubling the shortest
    side gives, frames first; of one frame for an image.
    """
    sides = [1, 1, 1]
    while sides[0] * sides[1] * sides[2] < tokens:
        axis = min((1, 2) if image else (0, 1, 2), key=lambda i: sides[i])
        sides[axis] *= 2
    return sides[0], sides[1], sides[2]


def _backwards(digits: Sequence[Tensor]) -> list[Tensor]:
    """Where a walk over numbers, the first the slowest, goes backwards on each axis: bool (N,).

    It turns round with every step on the axes before. A step changes their sum by one, from 0 on,
    so that it has gone an odd number of steps where their sum is odd.
    """
    found, total = [], torch.zeros_like(digits[0])
    for digit in digits:
        found.append(total % 2 == 1)
        total = total + digit
    return found


def _signed(digits: Sequence[Tensor], back: Sequence[Tensor]) -> list[Tensor]:
    return [torch.where(b, -digit, digit) for digit, b in zip(digits, back)]


def _lexsort(keys: Sequence[Tensor]) -> Tensor:
    """The order of int64 keys (N,), the first the most significant: int64 (N,)."""
    whole = torch.zeros_like(keys[0])
    for key in keys:
        whole = whole * (2 * key.abs().amax() + 1) + key
    return torch.argsort(whole)
