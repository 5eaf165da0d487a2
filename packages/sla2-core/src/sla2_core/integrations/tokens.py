"""Moving tokens: what the families use to put a model's tensors into another order of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def moved(x: Any, dim: int, places: Tensor) -> Any:
    """A tensor, or a list or tuple of them, whose place i on `dim` holds what stood at places[i];
    None stays None.
    """
    if isinstance(x, list):
        return [moved(part, dim, places) for part in x]
    if isinstance(x, tuple):
        return tuple(moved(part, dim, places) for part in x)
    return None if x is None else x.index_select(dim, places)


def moved_patches(x: Tensor, patch: Sequence[int], places: Tensor) -> Tensor:
    """Latents (B, C, F, H, W) whose i-th patch is the one that was number places[i], frame by frame
    and row by row. What no whole patch holds, at the far ends, is cut off.

    Args:
        patch: (frames, height, width) of a patch, which is what the model makes a token of.
    """
    grid = [n // p for n, p in zip(x.shape[2:], patch)]
    for axis, (count, side) in enumerate(zip(grid, patch)):
        x = x.narrow(2 + axis, 0, count * side)
    batch, channels, *size = x.shape
    (frames, height, width), (p_t, p_h, p_w) = grid, patch
    x = x.reshape(batch, channels, frames, p_t, height, p_h, width, p_w)
    x = x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(1, 3)
    x = x.index_select(1, places).unflatten(1, (frames, height, width))
    return x.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(batch, channels, *size)


def moved_in(
    arguments: Mapping[str, Any], places: Tensor, dims: Mapping[str, int]
) -> dict[str, Any]:
    """Arguments by name with those that `dims` names moved, each on its dimension of tokens."""
    given = {name: moved(arguments.get(name), dim, places) for name, dim in dims.items()}
    return {**arguments, **{name: x for name, x in given.items() if x is not None}}
