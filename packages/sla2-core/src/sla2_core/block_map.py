"""BlockMap: which key blocks each query block attends to exactly, by row and transposed; validated
once, when made.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Ascending block indices, int32 (B, H, rows, max), and how many of each row count, int32 (B,
    H, rows).

    Entries at or past a row's count are -1.
    """

    indices: Tensor
    counts: Tensor


class Geometry(NamedTuple):
    """Sizes of a block map: tokens in a block of queries and of keys, query and key tokens."""

    block_q: int
    block_k: int
    n_q: int
    n_k: int


def num_blocks(length: Any, block: int) -> Any:
    """ceil(length / block) for tokens in blocks of `block`: an integer, or a tensor where `length`
    is an integer tensor.
    """
    return -(-length // block)


def _rows_of(mask: Tensor, width: int | None = None) -> Rows:
    """The rows of a bool mask, `width` wide; None is as wide as the fullest row, for which a value
    is read.
    """
    counts = mask.sum(-1, dtype=torch.int32)
    if width is None:
        width = max(1, int(counts.max())) if counts.numel() else 1
    order = torch.sort(mask.to(torch.uint8), dim=-1, descending=True, stable=True).indices[
        ..., :width
    ]
    inside = torch.arange(width, device=mask.device) < counts[..., None]
    return Rows(torch.where(inside, order, -1).to(torch.int32).contiguous(), counts.contiguous())


class BlockMap:
    """The routed blocks of one attention call.

    Args:
        indices: int32 or int64 (B, H, T_m, K_max), ascending key block indices of each query block.
        counts: int32 or int64 (B, H, T_m), how many of a row's indices count.
        block_q, block_k: tokens in a query block, in a key block.
        n_q, n_k: query and key tokens; T_m = ceil(n_q / block_q), T_n = ceil(n_k / block_k).

    Raises:
        TypeError: indices or counts are no integer tensors.
        ValueError: a shape does not fit the lengths, or a row's indices repeat, descend or leave
            [0, T_n); the message names the first such (b, h, row).
    """

    def __init__(
        self, indices: Tensor, counts: Tensor, *, block_q: int, block_k: int, n_q: int, n_k: int
    ):
        _check_geometry(block_q, block_k, n_q, n_k)
        for name, x, ndim in (("indices", indices, 4), ("counts", counts, 3)):
            if not isinstance(x, Tensor) or x.dtype not in (torch.int32, torch.int64):
                kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
                raise TypeError(f"{name}: expected an int32 or int64 tensor, got {kind}")
            if x.ndim != ndim:
                raise ValueError(f"{name}: expected {ndim} dimensions, got shape {tuple(x.shape)}")
        t_m, t_n = num_blocks(n_q, block_q), num_blocks(n_k, block_k)
        if (
            indices.shape[2] != t_m
            or tuple(counts.shape) != tuple(indices.shape[:3])
            or 0 in counts.shape
        ):
            raise ValueError(
                f"indices, counts: expected (B, H, {t_m}, K_max) and (B, H, {t_m}) for n_q={n_q},"
                f" block_q={block_q}, got {tuple(indices.shape)} and {tuple(counts.shape)}"
            )
        if indices.shape[3] == 0:  # nothing selected; the kernels want a column
            indices = torch.full_like(counts, -1, dtype=indices.dtype)[..., None]
        place = torch.arange(indices.shape[3], device=indices.device)
        inside = place < counts[..., None]
        follows = inside[..., 1:] & (indices[..., 1:] <= indices[..., :-1])
        bad = (inside & ((indices < 0) | (indices >= t_n))).any(-1) | follows.any(-1)
        bad |= (counts < 0) | (counts > indices.shape[3])
        if bool(bad.any()):
            b, h, row = bad.nonzero()[0].tolist()
            raise ValueError(
                f"indices: expected ascending block indices without repeats in [0, {t_n}), got"
                f" {indices[b, h, row].tolist()} with count {int(counts[b, h, row])} at (b, h, row)"
                f" = ({b}, {h}, {row})"
            )
        self._set(
            Rows(torch.where(inside, indices, -1).to(torch.int32), counts.to(torch.int32)),
            block_q,
            block_k,
            n_q,
            n_k,
        )

    def _set(
        self,
        rows: Rows,
        block_q: int,
        block_k: int,
        n_q: int,
        n_k: int,
        uniform: bool = False,
    ) -> None:
        self.indices, self.counts = rows
        self.uniform = uniform  # every row is known to fill all of its indices
        self.block_q, self.block_k, self.n_q, self.n_k = block_q, block_k, n_q, n_k
        self._transposed: Rows | None = None

    @classmethod
    def _trusted(
        cls, rows: Rows, *, block_q: int, block_k: int, n_q: int, n_k: int, uniform: bool = False
    ) -> BlockMap:
        """A map whose rows were made here and need no validation (no device synchronisation)."""
        block_map = cls.__new__(cls)
        block_map._set(rows, block_q, block_k, n_q, n_k, uniform)
        return block_map

    @classmethod
    def _of_mask(cls, mask: Tensor, geometry: Geometry) -> BlockMap:
        """from_mask for a mask made here: no checks, no device synchronisation, rows T_n wide."""
        return cls._trusted(_rows_of(mask, mask.shape[-1]), **geometry._asdict())

    @classmethod
    def from_mask(cls, mask: Tensor, *, block_q: int, block_k: int, n_q: int, n_k: int) -> BlockMap:
        """The map of a bool mask (B, H, T_m, T_n), True where the block pair is attended exactly.

        Raises TypeError for another dtype, ValueError for a shape that does not fit the lengths and
        block sizes.
        """
        _check_geometry(block_q, block_k, n_q, n_k)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(
                f"mask: expected a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}"
            )
        expected = (num_blocks(n_q, block_q), num_blocks(n_k, block_k))
        if mask.ndim != 4 or tuple(mask.shape[2:]) != expected or 0 in mask.shape:
            raise ValueError(
                f"mask: expected shape (B, H, {expected[0]}, {expected[1]}) for n_q={n_q},"
                f" n_k={n_k}, blocks {block_q} x {block_k}, got {tuple(mask.shape)}"
            )
        return cls._trusted(_rows_of(mask), block_q=block_q, block_k=block_k, n_q=n_q, n_k=n_k)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, T_m, T_n)."""
        return (*self.counts.shape, num_blocks(self.n_k, self.block_k))

    @property
    def sparsity(self) -> float:
        """Share of the block pairs that are not attended exactly, in [0, 1]."""
        b, h, t_m, t_n = self.shape
        return 1.0 - int(self.counts.sum()) / (b * h * t_m * t_n)

    def mask(self) -> Tensor:
        """The map as bool (B, H, T_m, T_n)."""
        b, h, t_m, t_n = self.shape
        out = torch.zeros((b, h, t_m, t_n + 1), dtype=torch.bool, device=self.indices.device)
        out.scatter_(-1, torch.where(self.indices < 0, t_n, self.indices).long(), True)
        return out[..., :t_n].contiguous()

    def transposed(self) -> Rows:
        """For each key block the query blocks that attend to it, ascending: indices
        (B, H, T_n, Q_max) and counts (B, H, T_n). Made once and kept.
        """
        if self._transposed is None:
            self._transposed = _rows_of(self.mask().transpose(-1, -2))
        return self._transposed

    def to(self, device: torch.device | str) -> BlockMap:
        """The same map on another device."""
        rows = Rows(self.indices.to(device), self.counts.to(device))
        return BlockMap._trusted(
            rows, block_q=self.block_q, block_k=self.block_k, n_q=self.n_q, n_k=self.n_k
        )

    def __repr__(self) -> str:
        return (
            f"BlockMap(shape={self.shape}, blocks={self.block_q}x{self.block_k}, n_q={self.n_q},"
            f" n_k={self.n_k})"
        )


def _check_geometry(block_q: int, block_k: int, n_q: int, n_k: int) -> None:
    for name, value in (("block_q", block_q), ("block_k", block_k), ("n_q", n_q), ("n_k", n_k)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
