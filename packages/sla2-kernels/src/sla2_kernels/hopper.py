"""The sparse forward on Hopper (csrc/sm90): wgmma, bulk copies and specialised warps, for the same
results as the `mma.sync` kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sla2_kernels.kernels import Geometry
from sla2_kernels.launch import Argument, Pointer, launch, load
from sla2_kernels.problem import NULL, Alpha, Device, Map, Problem, Strided
from sla2_kernels.specs import DTYPES, HEAD_DIMS, KernelSpec

ARCH = "sm_90a"
STAGES = 3  # of the rings of K and V
MULTIPROCESSORS = 132  # of an H100 SXM and an H200; an H100 PCIe has 114


@dataclass(frozen=True)
class _Kernel:
    source: str
    threads: int
    opcodes: tuple[str, ...]


_KERNELS = {
    "sla2_sm90_pack": _Kernel("sm90/pack.cu", 128, ("LDG.E.128", "STG.E.128")),
    "sla2_sm90_sparse_fwd": _Kernel(
        "sm90/sparse_fwd.cu", 384, ("HGMMA", "UBLKCP", "USETMAXREG", "LDSM.16", "SYNCS")
    ),
}


def _shared_bytes(name: str, geometry: Geometry) -> int:
    """K and V rings, H, rows of Q and O 16 bytes apart, Z, mbarriers: as sm90/*.cu lay them out."""
    if name == "sla2_sm90_pack":
        return 0
    tiles = 2 * STAGES * geometry.block_k + geometry.head_dim
    rows = 2 * geometry.block_q * (geometry.row_bytes + 16)
    return tiles * geometry.row_bytes + rows + 4 * geometry.head_dim + 8 * (4 * STAGES + 4)


def supports(arch: str, geometry: Geometry) -> bool:
    """Whether these kernels serve a geometry: query blocks of 128, key blocks of 64, 16 bit."""
    return arch == ARCH and (geometry.block_q, geometry.block_k, geometry.precision) == (
        128,
        64,
        "full",
    )


def spec_of(name: str, geometry: Geometry) -> KernelSpec:
    """The spec of a kernel of csrc/sm90.

    Raises:
        ValueError: an unknown name, or a geometry that they do not serve.
    """
    if name not in _KERNELS or not supports(ARCH, geometry):
        raise ValueError(f"{name}: expected one of {', '.join(_KERNELS)}, blocks of 128 and 64")
    kernel = _KERNELS[name]
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
            ("SLA2_PRECISION", 0),
        ),
        shared_bytes=_shared_bytes(name, geometry),
        opcodes=kernel.opcodes,
    )


def all_specs() -> list[KernelSpec]:
    """Every kernel of csrc/sm90, for every head dimension and dtype."""
    return [
        spec_of(name, Geometry(head_dim=head_dim, dtype=dtype))
        for name in _KERNELS
        for head_dim in HEAD_DIMS
        for dtype in DTYPES
    ]


def _run(
    device: Device, problem: Problem, name: str, grid: tuple[int, ...], *args: Argument
) -> None:
    spec, grid = spec_of(name, problem.geometry), (*grid, 1, 1)[:3]
    if device.record:
        return device.record(spec, grid, args)
    kernel = load(spec, device.target, device.index)
    launch(kernel, grid, (spec.threads, 1, 1), spec.shared_bytes, args, device.stream)


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
    blocks: int = MULTIPROCESSORS,
) -> None:
    """Softmax over the selected blocks, the linear branch and their mixture, in one kernel.

    Args:
        q: 16 bit (B, H, n_q, width).
        k_tiles, v_tiles: what pack() makes.
        state, norm: H and Z of every query block (`forward.Linear`), or NULL: no linear branch.
        out, out_sparse, lse: where to write O, O_s (NULL: nowhere) and L.
        blocks: of threads, at most one a multiprocessor; each walks over its query blocks.
    """
    p = problem
    count = p.pairs * p.t_m
    _run(
        device,
        p,
        "sla2_sm90_sparse_fwd",
        (min(blocks, count),),
        *q.arguments,
        k_tiles,
        v_tiles,
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
