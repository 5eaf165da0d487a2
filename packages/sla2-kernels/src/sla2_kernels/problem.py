"""What a call of the operator is about: its shapes and settings, where it runs, and where its
tensors lie.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from sla2_kernels.kernels import Geometry
from sla2_kernels.launch import Pointer

NULL = Pointer(0)
Allocate = Callable[[tuple[int, ...], str], Pointer]


@dataclass(frozen=True)
class Strided:
    """A 16-bit tensor (B, H, N, channels) in any layout with adjacent channels, such as a
    transposed (B, N, H, channels).

    `strides`: elements from a batch item, a head and a token to the next. They and the address must
    be multiples of 16 bytes where the kernels read it directly, which is where channels are 64 or
    128; see `fits`.
    """

    pointer: Pointer
    strides: tuple[int, int, int]

    @classmethod
    def of(cls, pointer: Pointer, heads: int, tokens: int, channels: int) -> Strided:
        """A contiguous tensor."""
        return cls(pointer, (heads * tokens * channels, tokens * channels, channels))

    @property
    def fits(self) -> bool:
        """Whether the kernels can read and write it 16 bytes at a time, with 32-bit offsets within
        a block of tokens.
        """
        return (
            not self.pointer.address % 16
            and not any(s % 8 for s in self.strides)
            and self.strides[2] < 1 << 20
        )

    @property
    def owner(self) -> Any:
        """What keeps the memory alive."""
        return self.pointer.owner

    @property
    def arguments(self) -> tuple[Pointer, np.int64, np.int64, np.int32]:
        """As kernels list it: pointer, then strides."""
        item, head, token = self.strides
        return self.pointer, np.int64(item), np.int64(head), np.int32(token)


@dataclass(frozen=True, kw_only=True)
class Device:
    """Where kernels run: target "cuda" or "emulator", architecture, GPU number, CUDA stream, and
    the allocator.

    `allocate(shape, dtype)` returns a Pointer to uninitialised memory of that shape, 16-byte
    aligned; dtype is "float32", "int32", "uint32", "uint8", "bfloat16" or "float16". The Pointer's
    owner must keep the memory alive.
    """

    allocate: Allocate
    target: str = "cuda"
    arch: str = "sm_90a"
    index: int = 0
    stream: int | None = None


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Shapes and settings of a call: q (B, H, n_q, d), k and v (B, H, n_k, d), d <= 128; see
    sla2_core.functional.

    `kv_lengths` is a device pointer to int32 (B,), or NULL. Raises ValueError naming the argument
    for what no kernel takes.
    """

    batch: int
    heads: int
    n_q: int
    n_k: int
    head_dim: int
    dtype: str = "bfloat16"
    block_q: int = 128
    block_k: int = 64
    precision: str = "full"
    kv_lengths: Pointer = NULL

    def __post_init__(self) -> None:
        for name in ("batch", "heads", "n_q", "n_k", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {getattr(self, name)}")
        if self.head_dim > 128:
            raise ValueError(f"head_dim: expected at most 128, got {self.head_dim}")
        if self.pairs > 65535:
            raise ValueError(f"batch * heads: expected at most 65535, got {self.pairs}")
        _ = self.geometry

    @property
    def width(self) -> int:
        """Channels of a row as the kernels see it: 64 or 128."""
        return 64 if self.head_dim <= 64 else 128

    @property
    def geometry(self) -> Geometry:
        return Geometry(
            head_dim=self.width,
            dtype=self.dtype,
            block_q=self.block_q,
            block_k=self.block_k,
            precision=self.precision,
        )

    @property
    def pairs(self) -> int:
        """(batch, head) pairs."""
        return self.batch * self.heads

    @property
    def t_m(self) -> int:
        return -(-self.n_q // self.block_q)

    @property
    def t_n(self) -> int:
        return -(-self.n_k // self.block_k)

    @property
    def softmax_scale(self) -> np.float32:
        return np.float32(self.head_dim**-0.5)

    @property
    def low(self) -> bool:
        return self.precision != "full"


@dataclass(frozen=True)
class Map:
    """A block map on the device: indices int32 (B, H, T_m, width), ascending, -1 past counts int32
    (B, H, T_m).
    """

    indices: Pointer
    counts: Pointer
    width: int


@dataclass(frozen=True)
class Alpha:
    """The mixing ratio, fp32 (B|1, H|1, T_m|1), by its element strides; 0 where it is shared."""

    values: Pointer
    strides: tuple[int, int, int]

    @classmethod
    def of(cls, values: Pointer, shape: tuple[int, int, int]) -> Alpha:
        """From a contiguous tensor of `shape`."""
        items, heads, rows = shape
        return cls(
            values,
            (heads * rows if items > 1 else 0, rows if heads > 1 else 0, 1 if rows > 1 else 0),
        )


ONE = Alpha(NULL, (0, 0, 0))
