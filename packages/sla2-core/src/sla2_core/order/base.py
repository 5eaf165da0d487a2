"""What a token order is: the order in which the tokens of a grid are cut into blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from sla2_core.config import SLA2Config
from sla2_core.registry import Described

Grid = tuple[int, int, int]  # frames, height, width, in tokens


class Order(Described, ABC):
    """A permutation of a grid of tokens. Text tokens keep their place behind the grid's.

    Attributes:
        identity: it is the raster order itself, for which no grid is needed.
        reads_coordinates: it has arrange(), and so works in models that say where each token lies,
            but not how large their grid is.
    """

    identity: ClassVar[bool] = False
    reads_coordinates: ClassVar[bool] = False

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

    def arrange(self, coordinates: Tensor, *, image: bool) -> Tensor:
        """int64 (N,): which of N tokens stands at each place.

        Args:
            coordinates: int64 (N, 3), frame, row and column of each token. image: there is one
                frame.

        Raises:
            ValueError: an order that is defined by whole grids alone.
        """
        raise ValueError(
            f"token_order: expected one that reads coordinates, got {self.name!r}, which asks for a"
            " grid"
        )

    def places(self, grid: Grid, device: torch.device) -> Tensor | None:
        """permutation(grid) on a device, computed there where the order can."""
        if self.reads_coordinates:
            return self.arrange(coordinates_of(grid, device), image=grid[0] == 1)
        found = self.permutation(grid)
        return None if found is None else found.to(device)


def coordinates_of(grid: Grid, device: torch.device) -> Tensor:
    """int64 (t * h * w, 3): frame, row and column of each token in raster order."""
    frames, height, width = grid
    token = torch.arange(frames * height * width, device=device)
    return torch.stack((token // (height * width), token // width % height, token % width), dim=1)


def with_text(places: Tensor, tokens: int, text_tokens: int) -> Tensor:
    """The order of `tokens` tokens whose last `text_tokens` are text, which keeps its place.

    Args:
        places: int64 (N,), the order of the others.

    Raises:
        ValueError: there are not N others.
    """
    if len(places) != tokens - text_tokens:
        raise ValueError(
            f"grid: expected {tokens - text_tokens} tokens as attention gets, got {len(places)}"
        )
    text = torch.arange(tokens - text_tokens, tokens, device=places.device)
    return torch.cat([places, text])
