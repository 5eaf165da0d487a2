"""The sparse forward on Hopper (csrc/sm90): wgmma, bulk copies and specialised warps, for the same
results as the `mma.sync` kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sla2_kernels.kernels import Geometry
from sla2_kernels.launch import Argument, Pointer, launch, load
from sla2_kernels.problem import NULL, Alpha, Device, Map, Problem, Strided
from sla2_kernels.specs import DTYPES, HEAD_DIMS, PRECISIONS, KernelSpec

ARCH = "sm_90a"
STAGES = 3  # of the rings of K and V
MULTIPROCESSORS = 132  # of an H100 SXM and an H200; an H100 PCIe has 114


def _no_shared(_: Geometry) -> int:
    return 0


# As sm90/*.cu lay it out: rings of K and V, H, rows of Q and O 16 bytes apart, Z, mbarriers.
def _forward_shared(g: Geometry) -> int:
    tiles = 2 * STAGES * g.block_k + g.head_dim
    rows = 2 * g.block_q * (g.row_bytes + 16)
    return tiles * g.row_bytes + rows + 4 * g.head_dim + 8 * (4 * STAGES + 4)


def _forward_low_shared(g: Geometry) -> int:
    tiles = 2 * STAGES * g.block_k * g.head_dim + g.head_dim * g.row_bytes
    rows = g.block_q * (3 * (g.row_bytes + 16) + 2 * (g.head_dim + 16))
    return tiles + rows + 4 * g.head_dim + 8 * (4 * STAGES + 6)


@dataclass(frozen=True)
class _Kernel:
    source: str
    threads: int
    opcodes: tuple[str, ...]
    shared_bytes: Callable[[Geometry], int] = _no_shared
    precisions: tuple[str, ...] = ("full",)


_LOW = ("int8", "int8_int8", "fp8")
_PRODUCTS = {"int8": ("IGMMA", "QGMMA"), "int8_int8": ("IGMMA",), "fp8": ("QGMMA",)}
_WIDE = ("LDG.E.128", "STG.E.128")
_ROLES = ("HGMMA", "UBLKCP", "USETMAXREG", "LDSM.16", "SYNCS")
_KERNELS = {
    "sla2_sm90_pack": _Kernel("sm90/pack.cu", 128, _WIDE),
    "sla2_sm90_sparse_fwd": _Kernel("sm90/sparse_fwd.cu", 384, _ROLES, _forward_shared),
    "sla2_sm90_pack_low": _Kernel("sm90/pack_low.cu", 128, _WIDE, precisions=_LOW),
    "sla2_sm90_sparse_fwd_low": _Kernel(
        "sm90/sparse_fwd_low.cu", 384, _ROLES, _forward_low_shared, _LOW
    ),
}


def supports(arch: str, geometry: Geometry) -> bool:
    """Whether these kernels serve a geometry: query blocks of 128, key blocks of 64."""
    return arch == ARCH and (geometry.block_q, geometry.block_k) == (128, 64)


def spec_of(name: str, geometry: Geometry) -> KernelSpec:
    """The spec of a kernel of csrc/sm90.

    Raises:
        ValueError: an unknown name, or a geometry that they do not serve.
    """
    kernel = _KERNELS.get(name)
    if not (kernel and supports(ARCH, geometry) and geometry.precision in kernel.precisions):
        raise ValueError(f"{name}: expected a kernel of csrc/sm90 for blocks of 128 and 64")
    products = _PRODUCTS.get(geometry.precision, ()) if kernel.threads == 384 else ()
    return KernelSpec(
        source=kernel.source,
        entry=name,
        arch=ARCH,
        threads=kernel.threads,
        macros=(
            ("SLA2_HEAD_DIM", geometry.head_dim),
            ("SLA2_BLOCK_Q", geometry.block_q),
            ("SLA2_BLOCK_K", geometry.block_k),
            ("SLA2_DTYPE", DTYPES[geometry.dtype]),
            ("SLA2_PRECISION", PRECISIONS[geometry.precision]),
        ),
        shared_bytes=kernel.shared_bytes(geometry),
        opcodes=(*kernel.opcodes, *products),
    )


def all_specs() -> list[KernelSpec]:
    """Every kernel of csrc/sm90, for every head dimension, dtype and precision."""
    return [
        spec_of(name, Geometry(head_dim=head_dim, dtype=dtype, precision=precision))
        for name, kernel in _KERNELS.items()
        for head_dim in HEAD_DIMS
        for dtype in DTYPES
        for precision in kernel.precisions
    ]


def _run(
    device: Device, problem: Problem, name: str, grid: tuple[int, ...], *args: Argument
) -> None:
    spec, grid = spec_of(name, problem.geometry), (*grid, 1, 1)[:3]
    if device.record:
        return device.record(spec, grid, args)
    kernel = load(spec, device.target, device.index)
    launch(kernel, grid, (spec.threads, 1, 1), spec.shared_bytes, args, device.stream)


@dataclass(frozen=True)
class LowBit:
    """8-bit Q, uint8 (B H, n_q, width), and the scales of Q, K and V: fp32 (B H, T_m), (B H, T_n)
    and (B H, width).
    """

    q_bytes: Pointer
    q_scale: Pointer
    k_scale: Pointer
    v_scale: Pointer


def pack(
    device: Device, problem: Problem, k: Strided, v: Strided, mean: Pointer = NULL
) -> tuple[Pointer, Pointer]:
    """K - mean and V in the tiles that the forward copies whole, zeros past `kv_lengths`.

    Args:
        k, v: 16 bit (B, H, n_k, width).
        mean: of K over its tokens, fp32 (B H, width); NULL: 0.

    Returns:
        Tiles of K and of V, 16 bit (B H, T_n, block_k, width), swizzled.
    """
    p = problem
    shape = (p.pairs, p.t_n, p.block_k, p.width)
    k_tiles, v_tiles = (device.allocate(shape, p.dtype) for _ in range(2))
    args = *k.arguments, *v.arguments, mean, p.kv_lengths, k_tiles, v_tiles
    sizes = np.int32(p.heads), np.int32(p.n_k)
    _run(device, p, "sla2_sm90_pack", (p.t_n, p.pairs, 2), *args, *sizes)
    return k_tiles, v_tiles


def pack_low(
    device: Device, problem: Problem, k_bytes: Pointer, v_bytes: Pointer
) -> tuple[Pointer, Pointer]:
    """8-bit K and V^T (`forward.Prologue`) in the tiles that the low-bit forward copies whole.

    Returns:
        Tiles of K and of V^T, uint8 (B H, T_n, block_k width), swizzled.
    """
    p = problem
    k_tiles, v_tiles = (
        device.allocate((p.pairs, p.t_n, p.block_k * p.width), "uint8") for _ in range(2)
    )
    args = k_bytes, v_bytes, k_tiles, v_tiles, np.int32(p.n_k)
    _run(device, p, "sla2_sm90_pack_low", (p.t_n, p.pairs, 2), *args)
    return k_tiles, v_tiles


def sparse_forward(
    device: Device,
    problem: Problem,
    q: Strided,
    k_tiles: Pointer,
    v_tiles: Pointer,
    block_map: Map,
    state: Pointer,
    norm: Pointer,
    alpha: Alpha,
    out: Strided,
    out_sparse: Pointer,
    lse: Pointer,
    *,
    low: LowBit | None = None,
    blocks: int = MULTIPROCESSORS,
) -> None:
    """Softmax over the selected blocks, the linear branch and their mixture, in one kernel.

    Args:
        q: 16 bit (B, H, n_q, width).
        k_tiles, v_tiles: what pack(), or pack_low() with `low`, makes.
        state, norm: H and Z of every query block (`forward.Linear`), or NULL: no linear branch.
        out, out_sparse, lse: where to write O, O_s (NULL: nowhere) and L.
        low: 8-bit Q and the scales, where the problem's precision is a low-bit one.
        blocks: of threads, at most one a multiprocessor; each walks over its query blocks.
    """
    p = problem
    count = p.pairs * p.t_m
    name = "sla2_sm90_sparse_fwd_low" if low else "sla2_sm90_sparse_fwd"
    _run(
        device,
        p,
        name,
        (min(blocks, count),),
        *q.arguments,
        *((low.q_bytes,) if low else ()),
        k_tiles,
        v_tiles,
        *((low.q_scale, low.k_scale, low.v_scale) if low else ()),
        block_map.indices,
        block_map.counts,
        np.int32(block_map.width),
        p.kv_lengths,
        state,
        norm,
        alpha.values,
        *map(np.int32, alpha.strides),
        *out.arguments,
        out_sparse,
        lse,
        *map(np.int32, (p.heads, p.n_q, p.n_k, p.head_dim, count)),
        p.softmax_scale,
    )
