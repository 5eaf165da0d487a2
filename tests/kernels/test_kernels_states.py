"""Linear states in 8 bit: what is written is H_j and Z_j of each block to the format's precision,
and their masked sums are exact, by `mma.sync` and on Hopper, in three orders of threads.
"""

from typing import NamedTuple

import pytest
import torch
from helpers import problems
from sla2_kernels import forward as operator
from sla2_kernels import hopper, prepare
from sla2_kernels.emulator.emulate import ORDERS, lanes
from sla2_kernels.kernels import eight_bit_states
from sla2_kernels.prepare import Prepared
from sla2_kernels.problem import Device, Map, Problem

SLOW = pytest.mark.slow
# FP8 is multiplied on sm_89, widened by the kernel or by Hopper's producer on sm_90a.
WAYS = [("sm_89", False), ("sm_90a", False), ("sm_90a", True)]
every_way = pytest.mark.parametrize(
    ("arch", "wgmma"), WAYS, ids=["sm_89", "sm_90a", "sm_90a wgmma"]
)


def device_of(arch, wgmma):
    if not problems.on_gpu():
        return Device(allocate=problems.allocate, target="emulator", arch=arch, wgmma=wgmma)
    if arch != problems.DEVICE.arch:
        pytest.skip(f"the GPU is not {arch}")
    return Device(allocate=problems.allocate, arch=arch, wgmma=wgmma)


def weight_place(j):
    """csrc/states.cuh's."""
    return (j & ~31) + (j >> 1 & 3) * 8 + (j >> 3 & 1) * 4 + (j & 1) * 2 + (j >> 4 & 1)


def weights_of(raw, arch):
    """2^n of blocks 0, 1, ... from a (B H, multiple of 32) tensor of bytes."""
    order = [weight_place(j) for j in range(32)]
    raw = raw.unflatten(-1, (-1, 32))[..., order].flatten(-2)
    if arch == "sm_89":
        return raw.view(torch.float8_e4m3fn).double() / 256
    return (raw.short() << 8).view(torch.float16).double()


class States(NamedTuple):
    """In fp64: H_j / block_k over V's scales, (B H, T_n, d, d), Z_j / block_k, (B H, T_n, d), and
    the weights, (B H, T_n).
    """

    matrix: torch.Tensor
    vector: torch.Tensor
    weights: torch.Tensor


def decoded(states, weights, d, arch):
    t_n = states.shape[1]
    matrix, vector = states.view(torch.float8_e4m3fn).double().split((d * d, 2 * d), 2)
    weights = weights_of(weights, arch)[:, :t_n]
    first, second = vector.unflatten(-1, (d, 2)).unbind(-1)
    vector = (first + second / 16) / 256 * weights[..., None]
    return States((matrix * weights[..., None]).unflatten(-1, (d, d)), vector, weights)


@every_way
@pytest.mark.parametrize("d", [64, pytest.param(128, marks=SLOW)])
@pytest.mark.parametrize(("rows", "depth"), [(70, 200), pytest.param(300, 333, marks=SLOW)])
def test_sums_are_exact(rows, depth, d, arch, wgmma, monkeypatch):
    monkeypatch.setattr(hopper, "MULTIPROCESSORS", 3)  # blocks of threads walk over several tiles
    device = device_of(arch, wgmma)
    torch.manual_seed(1)
    p = Problem(batch=1, heads=2, n_q=rows * 128, n_k=depth * 64, head_dim=d, precision="int8")
    mask = torch.rand(2, rows, depth) < 0.3
    column = torch.arange(depth)
    bit = column % 32 // 2 + column % 2 * 16  # as forward.Linear.bits
    bits = torch.zeros(2, rows, -(-depth // 32), dtype=torch.int64)
    bits = bits.index_add_(2, column // 32, mask.long() << bit).to(torch.uint32)
    states = torch.randn(2, depth, d * (d + 2)).to(torch.float8_e4m3fn).view(torch.uint8)
    padded = -(-depth // 64) * 64
    weights = torch.zeros(2, padded, dtype=torch.uint8)
    place = torch.tensor([weight_place(j) for j in range(depth)])
    exponent = torch.randint(-13, 1, (2, depth)) + 15
    weights[:, place] = (exponent << (3 if arch == "sm_89" else 2)).to(torch.uint8)
    scale, row_scale = torch.rand(2, d) + 0.5, torch.rand(2, rows)
    kept = decoded(states, weights, d, arch)
    assert torch.equal(kept.weights, 2.0 ** (exponent.double() - 15))
    rest = (~mask).double() * row_scale.double()[..., None]
    state = torch.einsum("bij,bjce,be->bice", rest, kept.matrix, scale.double())
    norm = rest @ kept.vector
    made = Prepared(
        q=None,
        k=None,
        v=None,
        v_scale=problems.pointer(scale),
        states=problems.pointer(states),
        state_weights=problems.pointer(weights),
    )
    known = Map(None, None, 0, problems.pointer(bits), problems.pointer(row_scale))
    found = None
    for order in ORDERS:
        with lanes(order, seed=5):
            linear = operator.linear_sums(device, p, made, known)
        new = linear.state.owner.view(2, rows, d, d), linear.norm.owner
        torch.testing.assert_close(new[0].double(), state, atol=1e-3, rtol=5e-3)
        torch.testing.assert_close(new[1].double(), norm, atol=1e-6, rtol=1e-4)
        found = found or new
        assert all(map(torch.equal, found, new)), order


def states_of(case, device):
    p = case.problem
    inputs = [problems.strided(x) for x in (case.q, case.k, case.v)]
    return prepare.keys(device, p, prepare.pool(device, p, *inputs))


def exact_states(case, device):
    """What the states stand for, from the smoothed K: fp64, V over its scales."""
    p, block = case.problem, case.problem.block_k
    inputs = [problems.strided(x) for x in (case.q, case.k, case.v)]
    made = prepare.keys(device, p, prepare.pool(device, p, *inputs), save=True)
    assert made.states.owner.dtype == case.q.dtype  # which backward() may want
    lengths = torch.tensor([p.n_k]) if case.lengths is None else case.lengths
    valid = (torch.arange(p.n_k) < lengths[:, None])[:, None, :, None]
    k, v = made.k.owner.view(case.k.shape).double(), case.v.double()
    v = v / made.v_scale.owner.view(p.batch, p.heads, 1, -1)[..., : p.head_dim].double()

    def blocks(x):
        x = x.masked_fill(~valid, 0.0)
        x = torch.nn.functional.pad(x, (0, 0, 0, p.t_n * block - p.n_k))
        return x.view(p.pairs, p.t_n, block, -1)

    phi = blocks(k.softmax(-1))
    return (phi.transpose(2, 3) @ blocks(v)) / block, phi.sum(2) / block


@every_way
@pytest.mark.parametrize(
    ("precision", "d"),
    [("int8", 64), pytest.param("int8_int8", 64, marks=SLOW), pytest.param("fp8", 128, marks=SLOW)],
)
def test_states_are_those_of_the_blocks(precision, d, arch, wgmma):
    device = device_of(arch, wgmma)
    blocks = (128, 64) if wgmma else (64, 32)
    case = problems.make(64, 333, d=d, blocks=blocks, lengths=(333, 70), precision=precision)
    case.v[:, :, 5] *= 300  # one token
    case.v[..., 7] *= 1e-3
    case.v[..., 8] = 0.0
    case.k[0] *= 5
    found = None
    for order in ORDERS:
        with lanes(order, seed=3):
            made = states_of(case, device)
        new = made.states.owner, made.state_weights.owner
        found = found or new
        assert all(map(torch.equal, found, new)), order
    kept = decoded(*found, d, arch)
    t_n = case.problem.t_n
    assert not found[1][:, [weight_place(j) for j in range(t_n, found[1].shape[1])]].any()
    matrix, vector = exact_states(case, device)
    # phi in 16 bit is off by 2^-9, E4M3 by 2^-4 and at least 2^-10.
    allowed = (2**-4 + 2**-8) * matrix.abs() + (2**-10 + 2**-9) * kept.weights[..., None, None]
    phi_error = 2**-8 * vector[..., None] * (127 if precision == "int8_int8" else 448)
    assert ((kept.matrix - matrix).abs() <= allowed + phi_error).all()
    assert ((kept.vector - vector).abs() <= 2**-7 * vector + 1e-5 * kept.weights[..., None]).all()
    empty = vector.sum(-1) == 0
    assert (kept.matrix[empty] == 0).all()
    assert empty.any()


@every_way
def test_an_outlier_costs_the_other_tokens_no_precision(arch, wgmma):
    """Weights keep states away from the smallest numbers of the format."""
    device = device_of(arch, wgmma)
    blocks = (128, 64) if wgmma else (64, 32)
    case = problems.make(64, 512, blocks=blocks, heads=1, precision="int8", density=0.0)
    case.v[0, 0, 5] *= 300
    made = states_of(case, device)
    kept = decoded(made.states.owner, made.state_weights.owner, 64, arch)
    exact = exact_states(case, device)[0]
    error = (kept.matrix - exact)[:, 1:].square().mean().sqrt()
    assert error < 0.045 * exact[:, 1:].square().mean().sqrt()


@every_way
def test_nan_shows(arch, wgmma, monkeypatch):
    monkeypatch.setattr(problems, "DEVICE", device_of(arch, wgmma))
    blocks = (128, 64) if wgmma else (64, 32)
    case = problems.make(63, 256, blocks=blocks, heads=3, precision="int8", density=0.0)
    case.k[0, 1, 100, 5] = torch.nan
    case.v[0, 2, 100, 5] = torch.nan
    out, _ = problems.run(case, smooth_k=False)
    assert torch.isfinite(out[0, 0]).all()
    assert torch.isnan(out[0, 1]).all()
    assert torch.isnan(out[0, 2, :, 5]).all()
    assert torch.isfinite(out[0, 2, :, :5]).all()


def test_channels_of_zeros_and_of_the_least_numbers_are_finite():
    case = problems.make(63, 128, blocks=(64, 32), heads=1, precision="int8", density=0.0)
    case.v[..., 3] = 0.0
    case.v[..., 4] *= 1e-37
    out, _ = problems.run(case)
    assert torch.isfinite(out).all()
    assert (out[..., 3] == 0).all()
    assert out[..., 4].abs().max() < 1e-36


def test_which_architectures_and_precisions_keep_them():
    kept = {
        (arch, precision)
        for arch in ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a", "sm_120")
        for precision in ("full", "int8_int8", "int8", "fp8")
        if eight_bit_states(arch, precision)
    }
    assert {arch for arch, _ in kept} == {"sm_89", "sm_90a", "sm_100a", "sm_120a", "sm_120"}
    assert {precision for _, precision in kept} == {"int8_int8", "int8", "fp8"}


def test_low_bit_without_fp8_keeps_16_bit_states(monkeypatch):
    if problems.on_gpu():
        pytest.skip("on the emulator")
    monkeypatch.setattr(problems, "DEVICE", device_of("sm_80", False))
    case = problems.make(
        111, 200, blocks=(64, 32), lengths=(200, 63), heads=1, precision="int8_int8"
    )
    made = states_of(case, problems.DEVICE)
    assert made.states.owner.dtype == torch.bfloat16
    assert not made.state_weights.address
    out, _ = problems.run(case)
    expected, full = problems.low_bit_oracle(case)[0].double(), problems.oracle(case)
    rounding = (expected - full).square().mean().sqrt()
    assert (out.double() - expected).square().mean().sqrt() < 0.75 * rounding
