"""Small attention problems for the kernel tests: inputs, launches over poisoned memory, and the
oracle.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest
import torch
from sla2_core import BlockMap, block_sparse_attention
from sla2_core.backends.pooling import smooth_keys
from sla2_core.reference import linear_branch, mix, sla2_reference, sparse_branch
from sla2_kernels import forward as operator
from sla2_kernels.backward import backward
from sla2_kernels.kernels import supports
from sla2_kernels.launch import Pointer
from sla2_kernels.problem import NULL, Alpha, Device, Map, Problem, Strided
from sla2_kernels.specs import architecture_of

DTYPES = {
    "float32": torch.float32,
    "int32": torch.int32,
    "uint32": torch.int32,
    "uint8": torch.uint8,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


EDGES = [  # n_q, n_k and the options of make()
    pytest.param(63, 63, {}, id="63"),
    pytest.param(111, 200, {}, id="111x200"),
    pytest.param(200, 111, {"lengths": (111, 63, 1)}, id="kv_lengths"),
    pytest.param(16, 16, {"density": 1.0}, id="one block"),
    pytest.param(63, 63, {"density": 1.0}, id="all blocks"),
    pytest.param(63, 111, {"density": 0.0}, id="no blocks"),
]


def on_gpu() -> bool:
    """Whether the kernels run on the GPU: on pinned host memory, which both sides read, each launch
    waited for.
    """
    return os.environ.get("SLA2_TEST_TARGET") == "cuda"


def allocate(shape, dtype: str) -> Pointer:
    """Memory whose every byte is 0xFF: NaN in floats, -1 in integers."""
    tensor = torch.empty(shape, dtype=DTYPES[dtype], pin_memory=on_gpu())
    tensor.view(torch.uint8).fill_(0xFF)
    return Pointer(tensor.data_ptr(), tensor)


def pointer(tensor: torch.Tensor | None) -> Pointer:
    if tensor is None:
        return NULL
    tensor = tensor.pin_memory() if on_gpu() else tensor
    return Pointer(tensor.data_ptr(), tensor)


def strided(tensor: torch.Tensor) -> Strided:
    """A tensor (B, H, N, d) in the layout it has."""
    return Strided(pointer(tensor), tensor.stride()[:3])


def _device() -> Device:
    if not on_gpu():
        return Device(allocate=allocate, target="emulator", arch="sm_90a")
    return Device(allocate=allocate, arch=architecture_of(*torch.cuda.get_device_capability()))


DEVICE = _device()


def skip_unless_supported(precision: str) -> None:
    """Skip a test of a precision that this GPU has no tensor cores for."""
    if not supports(DEVICE.arch, precision):
        pytest.skip(f"{DEVICE.arch} has no FP8")


class Case(NamedTuple):
    """Inputs of one call, and the kernels' Problem for them."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    grad: torch.Tensor
    block_map: BlockMap
    alpha: torch.Tensor
    lengths: torch.Tensor | None
    problem: Problem

    @property
    def map(self) -> Map:
        indices = self.block_map.indices
        return Map(pointer(indices), pointer(self.block_map.counts), indices.shape[3])


def make(
    n_q,
    n_k,
    *,
    d=64,
    dtype="bfloat16",
    blocks=(32, 16),
    lengths=None,
    density=0.5,
    heads=2,
    precision="full",
):
    """A case with a random map, at least one row of which selects nothing and one everything if
    density is 0.5.
    """
    torch.manual_seed(n_q * 1000 + n_k)
    batch = 1 if lengths is None else len(lengths)
    q, grad = (torch.randn(batch, heads, n_q, d).to(DTYPES[dtype]) for _ in range(2))
    k, v = ((torch.randn(batch, heads, n_k, d) + shift).to(DTYPES[dtype]) for shift in (0.7, 0.0))
    t_m, t_n = -(-n_q // blocks[0]), -(-n_k // blocks[1])
    mask = torch.rand(batch, heads, t_m, t_n) < density
    if density == 0.5:
        mask[0, 0, 0], mask[-1, -1, -1] = False, True
    block_map = BlockMap.from_mask(mask, block_q=blocks[0], block_k=blocks[1], n_q=n_q, n_k=n_k)
    lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    problem = Problem(
        batch=batch,
        heads=heads,
        n_q=n_q,
        n_k=n_k,
        head_dim=d,
        dtype=dtype,
        block_q=blocks[0],
        block_k=blocks[1],
        precision=precision,
        kv_lengths=pointer(lengths),
    )
    return Case(q, k, v, grad, block_map, torch.rand(1, heads, t_m), lengths, problem)


def run(case: Case, *, smooth_k=True, linear=True, gradients=False, qat_backward="paper"):
    """O, L and, with `gradients`, (dQ, dK, dV, d alpha) from the kernels."""
    alpha = Alpha.of(pointer(case.alpha), tuple(case.alpha.shape)) if linear else None
    inputs = [strided(x) for x in (case.q, case.k, case.v)]
    saved = operator.forward(
        DEVICE, case.problem, *inputs, case.map, alpha, smooth_k=smooth_k, save=gradients
    )
    out, lse = saved.out.owner.view(case.q.shape), saved.lse.owner
    if not gradients:
        return out, lse
    made = backward(DEVICE, case.problem, saved, strided(case.grad), qat_backward=qat_backward)
    grads = [
        p.owner.view(x.shape)
        for p, x in zip((made.d_q, made.d_k, made.d_v), (case.q, case.k, case.v))
    ]
    if linear:
        grads.append(made.d_alpha.owner.sum(0, keepdim=True))
    return out, lse, grads


def oracle(case: Case, *, smooth_k=True, linear=True, gradients=False, precision="full"):
    """The reference in fp64: O and, with `gradients`, (O, [dQ, dK, dV, d alpha])."""
    return _differentiate(case, torch.float64, smooth_k, linear, gradients, precision)


def same_dtype(case: Case, *, smooth_k=True, linear=True, gradients=False, precision="full"):
    """The reference's formulas in the inputs' own 16-bit dtype, dense torch: what sets the
    tolerance.
    """
    return _differentiate(case, case.q.dtype, smooth_k, linear, gradients, precision)


def _differentiate(case, dtype, smooth_k, linear, gradients, precision):
    leaves = [x.to(dtype).requires_grad_(gradients) for x in (case.q, case.k, case.v, case.alpha)]
    if dtype == torch.float64 and linear:
        out = sla2_reference(
            *leaves[:3],
            case.block_map,
            leaves[3],
            kv_lengths=case.lengths,
            smooth_k=smooth_k,
            precision=precision,
        )
    else:
        out = _dense(case, *leaves, smooth_k, linear, precision)
    if not gradients:
        return out
    out.backward(case.grad.to(dtype))
    return out.detach(), [x.grad for x in (leaves if linear else leaves[:3])]


def _dense(case, q, k, v, alpha, smooth_k, linear, precision):
    block_map, (n_q, n_k) = case.block_map, (q.shape[2], k.shape[2])
    lengths = None if case.lengths is None else case.lengths.long()
    valid = torch.ones(1, 1, 1, n_k, dtype=torch.bool)
    if lengths is not None:
        valid = (torch.arange(n_k) < lengths[:, None])[:, None, None]
    if smooth_k and linear:
        k = smooth_keys(k, lengths)
    k, v = (x.masked_fill(~valid.transpose(-1, -2), 0.0) for x in (k, v))
    tokens = block_map.mask().repeat_interleave(block_map.block_q, 2)[:, :, :n_q]
    selected = tokens.repeat_interleave(block_map.block_k, 3)[..., :n_k] & valid
    o_s, _ = sparse_branch(q, k, v, selected, block_map.block_q, block_map.block_k, precision)
    if not linear:
        return o_s
    others = ~selected & valid
    o_l = linear_branch(q, k, v, others.to(q.dtype))
    nothing, everything = ~selected.any(-1, keepdim=True), ~others.any(-1, keepdim=True)
    return mix(o_s, o_l, alpha, block_map.block_q, nothing, everything)


def low_bit_oracle(case: Case, qat_backward: str = "paper"):
    """O and [dQ, dK, dV, d alpha] of the plain low-bit definition in fp32, from the smoothed K in
    16 bit as the kernels keep it.
    """
    lengths = None if case.lengths is None else case.lengths.long()
    leaves = [
        x.detach().float().clone().requires_grad_() for x in (case.q, case.k, case.v, case.alpha)
    ]
    q, k, v, alpha = leaves
    smooth = smooth_keys(k, lengths)
    keys = smooth + (smooth_keys(case.k, lengths).float() - smooth).detach()
    o_s, _ = block_sparse_attention(
        q,
        keys,
        v,
        case.block_map,
        precision=case.problem.precision,
        qat_backward=qat_backward,
        kv_lengths=lengths,
        backend="blocked",
    )
    valid = torch.ones(1, 1, 1, k.shape[2], dtype=torch.bool)
    if lengths is not None:
        valid = (torch.arange(k.shape[2]) < lengths[:, None])[:, None, None]
        keys, v = (x.masked_fill(~valid.transpose(-1, -2), 0.0) for x in (keys, v))
    block_q, block_k = case.block_map.block_q, case.block_map.block_k
    rows = case.block_map.mask().repeat_interleave(block_q, 2)[:, :, : q.shape[2]]
    selected = rows.repeat_interleave(block_k, 3)[..., : k.shape[2]] & valid
    others = ~selected & valid
    o_l = linear_branch(q, keys, v, others.to(q.dtype))
    nothing, everything = ~selected.any(-1, keepdim=True), ~others.any(-1, keepdim=True)
    out = mix(o_s, o_l, alpha, block_q, nothing, everything)
    return out.detach(), list(torch.autograd.grad(out, leaves, case.grad.float()))


def assert_as_good(found, exact, plain, factor: float, name: str = "out") -> None:
    """Largest error <= factor times that of the same-dtype dense computation, and RMS error <=
    factor times its own.
    """
    error, allowed = found.double() - exact, plain.double() - exact
    assert torch.isfinite(found).all(), f"{name}: not finite"
    floor = 1e-3 * exact.abs().max()
    assert error.abs().max() <= factor * allowed.abs().max() + floor, name
    assert error.square().mean().sqrt() <= factor * allowed.square().mean().sqrt() + 0.2 * floor, (
        name
    )
