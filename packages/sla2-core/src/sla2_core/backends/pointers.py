"""Tensors and settings of a call as the CUDA kernels take them: pointers, strides, sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sla2_core.backends.base import Inputs
from sla2_core.options import Options

if TYPE_CHECKING:
    from sla2_kernels.launch import Pointer
    from sla2_kernels.problem import Alpha, Device, Map, Strided
    from sla2_kernels.problem import Problem as KernelProblem

DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
EMULATED = "sm_90a"  # what the emulator stands for
_MADE = {"uint32": torch.int32}  # bit sets: torch has few operators on uint32


def pointer(x: Tensor | None) -> Pointer:
    """The address of a tensor's first element, which keeps the tensor alive; NULL for None."""
    from sla2_kernels.launch import Pointer

    return Pointer(0) if x is None else Pointer(x.data_ptr(), x)


def width(d: int) -> int:
    """Channels of a row of d as the kernels see it."""
    return 64 if d <= 64 else 128


def empty_out(q: Tensor) -> Tensor:
    """As CudaBackend.empty_out."""
    b, h, n, d = q.shape
    if d == width(d) and q.stride(1) < q.stride(2):
        return q.new_empty((b, n, h, d)).transpose(1, 2)
    return q.new_empty(q.shape)


def device_of(x: Tensor, target: str) -> Device:
    """Where kernels on x run: its GPU and torch's current stream there, or the emulator."""
    from sla2_kernels.launch import device_architecture
    from sla2_kernels.problem import Device

    def allocate(shape: tuple[int, ...], dtype: str) -> Pointer:
        made = _MADE.get(dtype) or getattr(torch, dtype)
        return pointer(torch.empty(shape, dtype=made, device=x.device))

    if target == "emulator":
        return Device(allocate=allocate, target=target, arch=EMULATED)
    index = x.device.index
    stream = torch.cuda.current_stream(index).cuda_stream
    return Device(allocate=allocate, arch=device_architecture(index), index=index, stream=stream)


def int32(lengths: Tensor | None) -> Pointer:
    """Lengths (B,) as int32, NULL for None."""
    return pointer(None if lengths is None else lengths.to(torch.int32))


def problem_of(call: Inputs, options: Options) -> KernelProblem:
    """Sizes, dtype and precision of a call as the kernels take them."""
    from sla2_kernels.problem import Problem as KernelProblem

    b, h, n_q, d = call.q.shape
    return KernelProblem(
        batch=b,
        heads=h,
        n_q=n_q,
        n_k=call.k.shape[2],
        head_dim=d,
        dtype=DTYPES[call.q.dtype],
        block_q=options.block_q,
        block_k=options.block_k,
        precision=options.format.cuda or options.precision,
        kv_lengths=int32(call.lengths),
    )


def steps(x: Tensor) -> tuple[int, int, int]:
    """Strides of the first three axes in elements, 0 for an axis of size 1."""
    item, head, row = (0 if size == 1 else step for size, step in zip(x.shape[:3], x.stride()))
    return item, head, row


def strided(x: Tensor) -> Strided:
    """x (B, H, N, d) in the layout it has, copied only if its channels are not adjacent."""
    from sla2_kernels.problem import Strided

    x = x if x.stride(3) == 1 else x.contiguous()
    return Strided(pointer(x), steps(x))


def map_of(call: Inputs) -> Map:
    """The block map of a call: indices (B, H, T_m, K) and counts (B, H, T_m), int32."""
    from sla2_kernels.problem import Map

    indices, counts = call.indices.contiguous(), call.counts.contiguous()
    return Map(pointer(indices), pointer(counts), indices.shape[3])


def alpha_of(alpha: Tensor | None) -> Alpha | None:
    """alpha (B|1, H|1, T_m|1) in fp32."""
    from sla2_kernels.problem import Alpha

    if alpha is None:
        return None
    alpha = alpha.float()
    return Alpha(pointer(alpha), steps(alpha))
