"""A device that writes launches down instead of making them: what counts bytes and launches of the
operator, at any shape, without a GPU and without the memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sla2_kernels.launch import Argument, Pointer
from sla2_kernels.problem import MULTIPROCESSORS, Device, Strided
from sla2_kernels.specs import KernelSpec

_SIZES = {"bfloat16": 2, "float16": 2, "uint8": 1}  # bytes; 4 for the others


def bytes_of(shape: tuple[int, ...], dtype: str) -> int:
    """Of a tensor as `Device.allocate` takes it."""
    return math.prod(shape) * _SIZES.get(dtype, 4)


@dataclass(frozen=True)
class Tensor:
    """A tensor without memory, which owns a recorded pointer."""

    nbytes: int


@dataclass(frozen=True)
class Launch:
    """A launch that was written down."""

    spec: KernelSpec
    grid: tuple[int, ...]
    arguments: tuple[Argument, ...]

    @property
    def blocks(self) -> int:
        """Blocks of threads in the grid."""
        return math.prod(self.grid)

    @property
    def bytes(self) -> int:
        """Of all tensors that its arguments name, each once: what it reads or writes of the
        device's memory if caches hold what it reads several times.
        """
        owners = {
            argument.address: argument.owner.nbytes
            for argument in self.arguments
            if isinstance(argument, Pointer) and argument.address
        }
        return sum(owners.values())


class Recorder:
    """Takes the launches of its `device`.

    Args:
        arch: what the device is, such as "sm_90a".

    Attributes:
        launches: so far, in order.
        device: to hand to `forward` and the others.
    """

    def __init__(self, arch: str):
        self.launches: list[Launch] = []
        self.device = Device(
            allocate=self.allocate, arch=arch, record=self._record, processors=MULTIPROCESSORS
        )
        self._next = 1 << 12

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Pointer:
        """A pointer to no memory, whose owner knows the tensor's bytes."""
        size = bytes_of(shape, dtype)
        address = self._next
        self._next += -(-size // 256) * 256 or 256
        return Pointer(address, Tensor(size))

    def tensor(self, batch: int, heads: int, tokens: int, channels: int) -> Strided:
        """A contiguous 16-bit tensor (B, H, N, channels) to call functions with."""
        pointer = self.allocate((batch, heads, tokens, channels), "bfloat16")
        return Strided.of(pointer, heads, tokens, channels)

    def _record(self, spec: KernelSpec, grid: tuple[int, ...], args: Sequence[Argument]) -> None:
        self.launches.append(Launch(spec, grid, tuple(args)))
