"""What a call of the operator is about: its shapes and settings, where it runs, and where its
tensors lie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np

from sla2_kernels.kernels import Geometry, wgmma_allowed
from sla2_kernels.launch import Argument, Pointer
from sla2_kernels.specs import KernelSpec

NULL = Pointer(0)
MULTIPROCESSORS = 132  # of an H100 SXM and an H200, which the emulator stands for
Allocate = Callable[[tuple[int, ...], str], Pointer]
Record = Callable[[KernelSpec, tuple[int, ...], Sequence[Argument]], None]


class Strided(NamedTuple):
    """A 16-bit tensor (B, H, N, channels) in any layout with adjacent channels.

    A transposed (B, N, H, channels), as models hold it, is one.

    Attributes:
        pointer: of the first element.
        strides: elements from a batch item, a head and a token to the next. Kernels read the tensor
            itself if it `fits` and has 64 or 128 channels, and a copy of it otherwise.
    """

    pointer: Pointer
    strides: tuple[int, int, int]

    @classmethod
    def of(cls, pointer: Pointer, heads: int, tokens: int, channels: int) -> Strided:
        """A contiguous tensor."""
        return cls(pointer, (heads * tokens * channels, tokens * channels, channels))

    @property
    def fits(self) -> bool:
        """Whether kernels can take it 16 bytes at a time, with 32-bit offsets within a block."""
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
        """As kernels list it: pointer, then the strides of item, head and token."""
        item, head, token = self.strides
        return self.pointer, np.int64(item), np.int64(head), np.int32(token)


NOTHING = Strided(NULL, (0, 0, 0))  # where a kernel takes no tensor


@dataclass(frozen=True, kw_only=True)
class Device:
    """Where kernels run.

    Attributes:
        allocate: allocate(shape, dtype) returns a Pointer to uninitialised memory, 16-byte aligned,
            whose owner keeps it alive. dtype is "float32", "int32", "uint32", "uint8",
            "bfloat16" or "float16".
        target: "cuda" or "emulator".
        arch: what kernels are compiled for, such as "sm_90a".
        index: number of the GPU.
        stream: a cudaStream_t as an integer; None: the default stream.
        record: takes a launch's spec, grid and arguments in place of the target, which then
            launches nothing: see `record.Recorder`.
        processors: how many multiprocessors; None: as many as the GPU has, MULTIPROCESSORS of the
            emulator.
        wgmma: take the kernels of csrc/sm90 where they serve; False: `mma.sync`. Default:
            $SLA2_WGMMA, see `kernels.wgmma_allowed`.
    """

    allocate: Allocate
    target: str = "cuda"
    arch: str = "sm_90a"
    index: int = 0
    stream: int | None = None
    record: Record | None = None
    processors: int | None = None
    wgmma: bool = field(default_factory=wgmma_allowed)


@cache
def _geometry(head_dim: int, dtype: str, block_q: int, block_k: int, precision: str) -> Geometry:
    return Geometry(
        head_dim=head_dim, dtype=dtype, block_q=block_q, block_k=block_k, precision=precision
    )


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Shapes and settings of one call.

    Attributes:
        batch, heads, n_q, n_k, head_dim: of q (B, H, n_q, d) and k, v (B, H, n_k, d); d <= 128.
        dtype: of Q, K, V and O, "bfloat16" or "float16".
        block_q, block_k: tokens in a query block and in a key block; see `Geometry`.
        precision: of the sparse branch's forward, "full", "int8", "int8_int8" or "fp8".
        kv_lengths: valid keys of each item, int32 (B,) on the device, or NULL for all n_k.

    Raises:
        ValueError: names the argument that no kernel takes.
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
        if min(self.batch, self.heads, self.n_q, self.n_k, self.head_dim) < 1:
            for name in ("batch", "heads", "n_q", "n_k", "head_dim"):
                if getattr(self, name) < 1:
                    raise ValueError(f"{name}: expected an integer >= 1, got {getattr(self, name)}")
        if self.head_dim > 128:
            raise ValueError(f"head_dim: expected at most 128, got {self.head_dim}")
        if self.pairs > 65535:
            raise ValueError(f"batch * heads: expected at most 65535, got {self.pairs}")
        _ = self.geometry

    @cached_property
    def width(self) -> int:
        """Channels of a row as the kernels see it: 64 or 128."""
        return 64 if self.head_dim <= 64 else 128

    @cached_property
    def geometry(self) -> Geometry:
        """What kernels are compiled for."""
        return _geometry(self.width, self.dtype, self.block_q, self.block_k, self.precision)

    @cached_property
    def pairs(self) -> int:
        """B H, the number of (item, head) pairs."""
        return self.batch * self.heads

    @cached_property
    def t_m(self) -> int:
        """Query blocks, the last of which may be short."""
        return -(-self.n_q // self.block_q)

    @cached_property
    def t_n(self) -> int:
        """Key blocks, the last of which may be short."""
        return -(-self.n_k // self.block_k)

    @cached_property
    def softmax_scale(self) -> np.float32:
        """1 / sqrt(d)."""
        return np.float32(self.head_dim**-0.5)

    @cached_property
    def low(self) -> bool:
        """Whether the sparse branch's forward runs in 8 bit."""
        return self.precision != "full"


class Map(NamedTuple):
    """A block map on the device.

    Attributes:
        indices: selected key blocks, int32 (B, H, T_m, width), ascending, -1 past the counts.
        counts: int32 (B, H, T_m).
        width: how many blocks a row selects at most.
        bits, rest_inverse: the same map as `forward.Linear` has it, or NULL.
    """

    indices: Pointer
    counts: Pointer
    width: int
    bits: Pointer = NULL
    rest_inverse: Pointer = NULL


class Alpha(NamedTuple):
    """The mixing ratio, fp32 (B|1, H|1, T_m|1).

    Attributes:
        values: its first element.
        strides: elements from an item, a head and a row block to the next; 0 along a shared axis.
    """

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


class AlphaRule(NamedTuple):
    """How the mixing ratio of each row block is made while it is routed.

    Attributes:
        offset: fp32 (heads,) with a slope: alpha = sigmoid(offset + slope log(m / (1 - m))), m the
            share of exp(score) that the selected blocks hold. (heads, knots) without:
            alpha = sigmoid(offset at the row's place among the rows), interpolated linearly between
            knots that are spread evenly. NULL: alpha = 1.
        slope: fp32 (heads,), or NULL.
        heads: 1 or H.
        knots: how many.
    """

    offset: Pointer = NULL
    slope: Pointer = NULL
    heads: int = 1
    knots: int = 1
