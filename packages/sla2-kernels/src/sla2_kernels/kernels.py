"""Which kernels there are: entry -> threads, shared memory and limits for a geometry. Must agree
with csrc/*.cu and csrc/sm90/*.cu.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

from sla2_kernels.specs import (
    ARCHITECTURES,
    DTYPES,
    HEAD_DIMS,
    PRECISIONS,
    Architecture,
    KernelSpec,
)


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What a kernel is compiled for.

    Attributes:
        head_dim: 64 or 128; smaller heads are padded.
        dtype: "bfloat16" or "float16".
        block_q: a multiple of 16, 16 to 128.
        block_k: a multiple of 16 (of 32 in low bit), up to 64.
        precision: "full", "int8", "int8_int8" or "fp8".

    Raises:
        ValueError: names the argument that is none of these.
    """

    head_dim: int
    dtype: str = "bfloat16"
    block_q: int = 128
    block_k: int = 64
    precision: str = "full"

    def __post_init__(self) -> None:
        if self.head_dim not in HEAD_DIMS:
            raise ValueError(
                f"head_dim: expected one of {', '.join(map(str, HEAD_DIMS))}, got {self.head_dim}"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision: expected one of {', '.join(PRECISIONS)}, got {self.precision!r}"
            )
        if not (16 <= self.block_q <= 128 and self.block_q % 16 == 0):
            raise ValueError(f"block_q: expected a multiple of 16 in [16, 128], got {self.block_q}")
        step = 16 if self.precision == "full" else 32
        if not (16 <= self.block_k <= 64 and self.block_k % step == 0):
            raise ValueError(
                f"block_k: expected a multiple of {step} in [{step}, 64], got {self.block_k}"
            )

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:  # each launch looks its kernel up by its geometry
        return hash((self.head_dim, self.dtype, self.block_q, self.block_k, self.precision))

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of 16-bit channels."""
        return 2 * self.head_dim


@dataclass(frozen=True)
class _Kernel:
    source: str
    threads: Callable[[Geometry, Architecture], int]
    shared_bytes: Callable[[Geometry], int]
    precisions: tuple[str, ...] = ("full",)
    blocks: Callable[[Geometry, Architecture], int] | None = None  # None: a quarter of the threads
    opcodes: tuple[str, ...] = ()
    needs_fp8: bool = False


_LOW = ("int8", "int8_int8", "fp8")
# 16 bytes a lane, from and to memory; tiles by cp.async and ldmatrix into 16-bit products.
_WIDE = ("LDG.E.128", "STG.E.128")
_TILES = ("LDGSTS.E.BYPASS.128", "LDSM.16", "HMMA.16816")
_WIDENS_FP8 = "F2FP.F16.E4M3.UNPACK"
# Of csrc/sm90: roles and copies; Q K^T and P V.
_ROLES = ("HGMMA", "UBLKCP", "USETMAXREG", "LDSM.16", "SYNCS")
_WGMMA = {
    "full": ("HGMMA", "HGMMA"),
    "int8": ("IGMMA", "QGMMA"),
    "int8_int8": ("IGMMA", "IGMMA"),
    "fp8": ("QGMMA", "QGMMA"),
}


def wgmma_allowed() -> bool:
    """Whether kernels of csrc/sm90 may be taken: $SLA2_WGMMA, 1 (the default) or 0.

    Raises:
        RuntimeError: it is something else.
    """
    chosen = os.environ.get("SLA2_WGMMA") or "1"
    if chosen not in ("0", "1"):
        raise RuntimeError(f"SLA2_WGMMA: expected 0 or 1, got {chosen!r}")
    return chosen == "1"


def has_wgmma(arch: str, geometry: Geometry) -> bool:
    """Whether csrc/sm90 has the sparse forward: on sm_90a, for blocks of 128 and 64."""
    return arch == "sm_90a" and (geometry.block_q, geometry.block_k) == (128, 64)


def products_of(arch: str, precision: str, wgmma: bool = False) -> tuple[str, str]:
    """The SASS instructions that multiply Q K^T and P V of the sparse forward: "HMMA" on 16-bit
    operands, "IMMA" on int8, "QMMA" on FP8, "QMMA.SF" on FP8 with block scales, which are 1 (twice
    the rate on sm_120a); "HMMA, widened" where FP8 is widened to fp16 first;
    "HGMMA", "IGMMA" and "QGMMA" of the kernels of csrc/sm90, which `wgmma` asks for.
    """
    if wgmma:
        return _WGMMA[precision]
    fp8 = "QMMA" if ARCHITECTURES[arch].fp8_mma else "HMMA, widened"
    if arch == "sm_120a":  # mma_m16n8k32_e4m3 in ptx.cuh
        fp8 = "QMMA.SF"
    return {
        "full": ("HMMA", "HMMA"),
        "int8": ("IMMA", fp8),
        "int8_int8": ("IMMA", "IMMA"),
        "fp8": (fp8, fp8),
    }[precision]


def faster_precision(arch: str, precision: str) -> str:
    """The precision that a forward should run in where speed is all that low bit is for: "full"
    where `mma.sync` would widen FP8, which is slower than 16 bit and rounds more.
    """
    return "full" if "HMMA, widened" in products_of(arch, precision) else precision


def _low_opcodes(arch: str, precision: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What the code of the low-bit forward has, beside its 16-bit products, and what it has not."""
    products = set(products_of(arch, precision))
    if "HMMA, widened" in products:
        return (*sorted(products - {"HMMA, widened"}), _WIDENS_FP8), ("QMMA",)
    unscaled = ("QMMA.16832",) if "QMMA.SF" in products else ()
    return tuple(sorted(products)), (_WIDENS_FP8, *unscaled)


def _none(_: Geometry) -> int:
    return 0


def _fixed(threads: int) -> Callable[[Geometry, Architecture], int]:
    return lambda *_: threads


def _forward_threads(g: Geometry, arch: Architecture) -> int:
    return g.block_q if arch.fast_mma and g.block_q % 32 == 0 else 2 * g.block_q


def _sparse_forward_shared(g: Geometry) -> int:
    ring = 4 * g.block_k * g.row_bytes
    mix = (g.head_dim + g.block_q) * g.row_bytes
    return g.block_q * g.row_bytes + max(ring, mix)


def _sparse_forward_low_shared(g: Geometry) -> int:
    ring = g.block_q * g.head_dim + 4 * g.block_k * g.head_dim
    return max(ring, (2 * g.block_q + g.head_dim) * g.row_bytes)


def _pooled_forward_shared(g: Geometry) -> int:
    return (g.block_q + 4 * g.block_k) * g.row_bytes


def _pooled_forward_low_shared(g: Geometry) -> int:
    selected = g.block_q * g.head_dim + 4 * g.block_k * g.head_dim
    return max(selected, 3 * g.block_k * g.row_bytes) + (g.block_k + g.block_q) * g.row_bytes


def _room(shared_bytes: int, arch: Architecture) -> int:
    """Blocks that a multiprocessor has shared memory for."""
    return arch.resident_blocks(32, 0, shared_bytes)


def _two_that_fit(
    shared_bytes: Callable[[Geometry], int],
) -> Callable[[Geometry, Architecture], int]:
    """Two blocks, of which one works while the other waits, where shared memory has room."""
    return lambda g, arch: min(2, _room(shared_bytes(g), arch))


def _backward_rows(g: Geometry) -> int:
    return min(64, g.block_q)


def _halves(g: Geometry, arch: Architecture, split: int) -> int:
    """Warps that share an accumulator's rows, each with half of `split` (sparse_bwd.cuh)."""
    return 1 if arch.fast_mma or g.head_dim == 64 or split % 32 else 2


def _backward_q_threads(g: Geometry, arch: Architecture) -> int:
    return 2 * _backward_rows(g) * _halves(g, arch, g.block_k)


def _backward_kv_threads(g: Geometry, arch: Architecture) -> int:
    return 2 * g.block_k * _halves(g, arch, _backward_rows(g))


def _backward_q_shared(g: Geometry) -> int:
    return (2 * _backward_rows(g) + 4 * g.block_k) * g.row_bytes


def _backward_kv_shared(g: Geometry) -> int:
    rows = _backward_rows(g)
    row_values = 2 if g.precision == "full" else 4
    return (2 * g.block_k + 4 * rows) * g.row_bytes + 2 * row_values * rows * 4


def _pooled_kv_shared(g: Geometry) -> int:
    return _backward_kv_shared(g) + 2 * g.block_k * 4


# As sm90/*.cu lay it out: rings of three K and V tiles, H, rows of Q and O 16 bytes apart, Z,
# mbarriers; with the pooled complement no H, and K's mean for Z.
def _hopper_forward_shared(g: Geometry) -> int:
    return _hopper_pooled_shared(g) + g.head_dim * g.row_bytes


def _hopper_pooled_shared(g: Geometry) -> int:
    tiles = 6 * g.block_k
    rows = 2 * g.block_q * (g.row_bytes + 16)
    return tiles * g.row_bytes + rows + 4 * g.head_dim + 8 * 16


def _hopper_forward_low_shared(g: Geometry) -> int:
    tiles = 6 * g.block_k * g.head_dim + g.head_dim * g.row_bytes
    rows = g.block_q * (3 * (g.row_bytes + 16) + g.head_dim + 16)
    return tiles + rows + 4 * g.head_dim + 8 * 18


def _hopper_pooled_low_shared(g: Geometry) -> int:
    tiles = 6 * g.block_k * g.row_bytes
    rows = g.block_q * (3 * (g.row_bytes + 16) + g.head_dim + 16)
    return tiles + rows + 8 * 18


_KERNELS = {
    "sla2_copy_columns": _Kernel("pool.cu", _fixed(256), _none),
    "sla2_pool": _Kernel(
        "pool.cu", lambda g, _: 2 * g.head_dim, _none, ("full", *_LOW), opcodes=_WIDE[:1]
    ),
    "sla2_key_mean": _Kernel("pool.cu", _fixed(512), _none, ("full", *_LOW)),
    "sla2_keys": _Kernel(
        "keys.cu",
        lambda g, _: 2 * g.head_dim,
        lambda g: 2 * g.block_k * g.row_bytes,
        ("full", *_LOW),
        opcodes=(*_WIDE, *_TILES),
    ),
    "sla2_keys_low": _Kernel(
        "keys_low.cu",
        lambda g, _: 2 * g.head_dim,
        lambda g: 2 * g.block_k * g.row_bytes,
        _LOW,
        opcodes=(*_WIDE, *_TILES),
        needs_fp8=True,
    ),
    "sla2_project": _Kernel("route.cu", lambda g, _: g.head_dim, _none),
    "sla2_scores": _Kernel("route.cu", _fixed(64), _none),
    "sla2_topk": _Kernel("route.cu", _fixed(128), _none),
    "sla2_row_bits": _Kernel("route.cu", _fixed(128), _none),
    "sla2_column_bits": _Kernel("route.cu", _fixed(128), _none),
    "sla2_column_offsets": _Kernel("route.cu", _fixed(256), _none),
    "sla2_column_rows": _Kernel("route.cu", _fixed(128), _none),
    "sla2_masked_sum": _Kernel(
        "linear.cu", _fixed(256), lambda g: 4 * 32 * 256, blocks=lambda *_: 2, opcodes=_TILES
    ),
    "sla2_masked_sum_low": _Kernel(
        "linear_low.cu",
        _fixed(256),
        lambda g: 8 * 32 * 128,
        ("int8",),
        blocks=lambda *_: 2,
        opcodes=_TILES[:2],
    ),
    "sla2_sparse_fwd": _Kernel(
        "sparse_fwd.cu",
        _forward_threads,
        _sparse_forward_shared,
        blocks=_two_that_fit(_sparse_forward_shared),
        opcodes=_TILES,
    ),
    "sla2_sparse_fwd_low": _Kernel(
        "sparse_fwd_low.cu",
        lambda g, _: 2 * g.block_q,
        _sparse_forward_low_shared,
        _LOW,
        blocks=lambda *_: 1,
        opcodes=_TILES,
    ),
    "sla2_pooled_fwd": _Kernel(
        "pooled_fwd.cu",
        _forward_threads,
        _pooled_forward_shared,
        blocks=_two_that_fit(_pooled_forward_shared),
        opcodes=_TILES,
    ),
    "sla2_pooled_fwd_low": _Kernel(
        "pooled_fwd_low.cu",
        lambda g, _: 2 * g.block_q,
        _pooled_forward_low_shared,
        _LOW,
        blocks=lambda *_: 1,
        opcodes=_TILES,
    ),
    "sla2_bwd_row_dot": _Kernel("sparse_bwd.cu", lambda g, _: 2 * g.block_q, _none),
    "sla2_sparse_bwd_q": _Kernel(
        "sparse_bwd.cu",
        _backward_q_threads,
        _backward_q_shared,
        ("full", *_LOW),
        blocks=_two_that_fit(_backward_q_shared),
        opcodes=_TILES,
    ),
    "sla2_sparse_bwd_kv": _Kernel(
        "sparse_bwd.cu",
        _backward_kv_threads,
        _backward_kv_shared,
        ("full", *_LOW),
        blocks=_two_that_fit(_backward_kv_shared),
        opcodes=_TILES,
    ),
    "sla2_round_queries": _Kernel("sparse_bwd_matched.cu", _fixed(256), _none, _LOW),
    "sla2_widen": _Kernel("sparse_bwd_matched.cu", _fixed(256), _none, _LOW),
    "sla2_round_values": _Kernel("sparse_bwd_matched.cu", _fixed(256), _none, _LOW),
    "sla2_bwd_matched_rows": _Kernel(
        "sparse_bwd_matched.cu",
        _backward_q_threads,
        _backward_q_shared,
        _LOW,
        blocks=_two_that_fit(_backward_q_shared),
        opcodes=_TILES,
    ),
    "sla2_finish_kv": _Kernel("sparse_bwd.cu", _fixed(256), _none),
    "sla2_pooled_bwd_q": _Kernel(
        "pooled_bwd.cu",
        _backward_q_threads,
        _backward_q_shared,
        blocks=_two_that_fit(_backward_q_shared),
        opcodes=_TILES,
    ),
    "sla2_pooled_bwd_kv": _Kernel(
        "pooled_bwd.cu",
        _backward_kv_threads,
        _pooled_kv_shared,
        blocks=_two_that_fit(_pooled_kv_shared),
        opcodes=_TILES,
    ),
    "sla2_pooled_bwd_sum": _Kernel("pooled_bwd.cu", lambda g, _: 2 * g.head_dim, _none),
    "sla2_linear_bwd_q": _Kernel(
        "linear_bwd.cu",
        lambda g, _: 2 * g.block_q,
        lambda g: (2 * g.block_q + g.head_dim) * g.row_bytes + 12 * g.block_q,
        opcodes=_TILES,
    ),
    "sla2_linear_bwd_kv": _Kernel(
        "linear_bwd.cu",
        lambda g, _: 2 * g.block_k,
        lambda g: (2 * g.block_k + g.head_dim) * g.row_bytes,
        opcodes=_TILES,
    ),
}
_HOPPER = {  # csrc/sm90
    "sla2_sm90_pack": _Kernel("sm90/pack.cu", _fixed(128), _none, opcodes=_WIDE),
    "sla2_sm90_sparse_fwd": _Kernel(
        "sm90/sparse_fwd.cu",
        _fixed(384),
        _hopper_forward_shared,
        blocks=lambda *_: 1,
        opcodes=_ROLES,
    ),
    "sla2_sm90_pooled_fwd": _Kernel(
        "sm90/sparse_fwd.cu",
        _fixed(384),
        _hopper_pooled_shared,
        blocks=lambda *_: 1,
        opcodes=_ROLES,
    ),
    "sla2_sm90_masked_sum": _Kernel(
        "sm90/masked_sum.cu",
        _fixed(384),
        lambda g: 8 * 64 * 256 + 8 * 16,
        blocks=lambda *_: 1,
        opcodes=("HGMMA", "LDGSTS.E.BYPASS.128", "USETMAXREG", "SYNCS"),
    ),
    "sla2_sm90_masked_sum_low": _Kernel(
        "sm90/masked_sum_low.cu",
        _fixed(384),
        lambda g: 4 * 64 * 256 + 8 * 64 * 128 + 8 * 8,
        ("int8",),
        blocks=lambda *_: 1,
        opcodes=("HGMMA", "LDGSTS.E.BYPASS.128", "USETMAXREG", "SYNCS"),
    ),
    "sla2_sm90_sparse_bwd_q": _Kernel(
        "sm90/sparse_bwd_q.cu",
        _fixed(384),
        lambda g: (6 * 64 + 256) * g.row_bytes + 128 * (g.row_bytes + 16) + 8 * 16,
        blocks=lambda *_: 1,
        opcodes=_ROLES,
    ),
    "sla2_sm90_sparse_bwd_kv": _Kernel(
        "sm90/sparse_bwd_kv.cu",
        _fixed(384),
        lambda g: (4 * 64 + 8 * 64) * g.row_bytes + 4 * 128 * 4 + 16 * g.head_dim + 8 * 8,
        blocks=lambda *_: 1,
        opcodes=("HGMMA", "UBLKCP", "USETMAXREG", "SYNCS"),
    ),
    "sla2_sm90_pack_low": _Kernel("sm90/pack_low.cu", _fixed(128), _none, _LOW, opcodes=_WIDE),
    "sla2_sm90_sparse_fwd_low": _Kernel(
        "sm90/sparse_fwd_low.cu",
        _fixed(384),
        _hopper_forward_low_shared,
        _LOW,
        blocks=lambda *_: 1,
        opcodes=_ROLES,
    ),
    "sla2_sm90_pooled_fwd_low": _Kernel(
        "sm90/sparse_fwd_low.cu",
        _fixed(384),
        _hopper_pooled_low_shared,
        _LOW,
        blocks=lambda *_: 1,
        opcodes=_ROLES,
    ),
}


def _resident_blocks(kernel: _Kernel, g: Geometry, arch: Architecture) -> int:
    """How many blocks of a kernel shall fit on a multiprocessor: by default those that make a
    quarter of its threads, as far as shared memory has room for them.
    """
    if kernel.blocks:
        return kernel.blocks(g, arch)
    wanted = max(1, arch.threads_per_sm // 4 // kernel.threads(g, arch))
    return min(wanted, _room(kernel.shared_bytes(g), arch))


def supports(arch: str, precision: str) -> bool:
    """Whether kernels of a precision can be compiled for `arch`: FP8 came with sm_89.

    That it is faster than 16 bit is another question: see `products_of`.
    """
    return precision in ("full", "int8_int8") or ARCHITECTURES[arch].number >= 89


def eight_bit_states(arch: str, precision: str) -> bool:
    """Whether a forward without gradients keeps the linear branch's states in 8 bit
    (csrc/states.cuh): in low bit, where E4M3 can be converted. sm_80 and sm_86 keep 16 bit.
    """
    return precision != "full" and supports(arch, "fp8")


@cache
def spec_of(name: str, arch: str, geometry: Geometry) -> KernelSpec:
    """The spec of kernel `name` for an architecture such as "sm_90a".

    Raises:
        ValueError: the architecture cannot run the geometry's precision, or the kernel is one of
            csrc/sm90 and serves neither another architecture nor other blocks.
    """
    if name in _HOPPER and not has_wgmma(arch, geometry):
        raise ValueError(
            f"{name}: expected sm_90a and blocks of 128 and 64, got {arch} and blocks of"
            f" {geometry.block_q} and {geometry.block_k}"
        )
    kernel = _HOPPER[name] if name in _HOPPER else _KERNELS[name]
    precision = (
        geometry.precision if geometry.precision in kernel.precisions else kernel.precisions[0]
    )
    if kernel.needs_fp8 and not supports(arch, "fp8"):
        raise ValueError(f"{name}: expected an architecture with FP8, got {arch}")
    if not supports(arch, precision):
        raise ValueError(
            f"precision: expected 'full' or 'int8_int8' on {arch}, which has no FP8, got"
            f" {precision!r}"
        )
    products: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    if name in ("sla2_sparse_fwd_low", "sla2_pooled_fwd_low"):
        products, absent = _low_opcodes(arch, precision)
    elif name in ("sla2_sm90_sparse_fwd_low", "sla2_sm90_pooled_fwd_low"):
        products = tuple(sorted(set(_WGMMA[precision])))
    elif name == "sla2_masked_sum_low":
        # Where E4M3 is widened, the kernel does it, once for the products of 32 rows.
        product = products_of(arch, "fp8")[0]
        products = ("HMMA.16816",) if product == "HMMA, widened" else (product,)
    return KernelSpec(
        source=kernel.source,
        entry=name,
        arch=arch,
        threads=kernel.threads(geometry, ARCHITECTURES[arch]),
        macros=(
            ("SLA2_HEAD_DIM", geometry.head_dim),
            ("SLA2_BLOCK_Q", geometry.block_q),
            ("SLA2_BLOCK_K", geometry.block_k),
            ("SLA2_DTYPE", DTYPES[geometry.dtype]),
            ("SLA2_PRECISION", PRECISIONS[precision]),
        ),
        shared_bytes=kernel.shared_bytes(geometry),
        blocks_per_sm=_resident_blocks(kernel, geometry, ARCHITECTURES[arch]),
        opcodes=(*kernel.opcodes, *products),
        never=("LDL", "STL", *absent),
    )


def all_specs(arch: str) -> list[KernelSpec]:
    """Every kernel of an architecture: what `sla2 compile` builds and the gate checks.

    Raises:
        ValueError: an unknown architecture.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch: expected one of {', '.join(ARCHITECTURES)}, got {arch!r}")
    return [
        spec_of(name, arch, Geometry(head_dim=head_dim, dtype=dtype, precision=precision))
        for name, kernel in {**_KERNELS, **(_HOPPER if arch == "sm_90a" else {})}.items()
        for head_dim in HEAD_DIMS
        for dtype in DTYPES
        for precision in kernel.precisions
        if supports(arch, "fp8" if kernel.needs_fp8 else precision)
    ]
