"""The backward of the pooled complement on the emulator against the fp64 reference: every gradient,
odd lengths, padding, edge maps, low bit.
"""

from dataclasses import replace

import pytest
import torch
from helpers import pooled_problems, problems
from sla2_core.backends.pooling import smooth_keys
from sla2_kernels import backward as operator_backward
from sla2_kernels.backward import backward
from sla2_kernels.emulator.emulate import ORDERS, lanes

NAMES = ("dq", "dk", "dv")


def run(case, *, smooth_k=True):
    """dQ, dK, dV, db (1, H, T_m) from the kernels."""
    saved = pooled_problems.forward(case, smooth_k=smooth_k, save=True)
    made = backward(problems.DEVICE, case.problem, saved, problems.strided(case.grad))
    found = [
        p.owner.view(x.shape)
        for p, x in zip((made.d_q, made.d_k, made.d_v), (case.q, case.k, case.v))
    ]
    return [*found, made.d_alpha.owner.sum(0, keepdim=True)]


def check(case, found=None, **options):
    found = found or run(case, **options)
    exact = pooled_problems.gradients(case, pooled_problems.oracle, torch.float64)
    plain = pooled_problems.gradients(case, pooled_problems.same_dtype, case.q.dtype)
    compare(case, found, exact, plain)


def compare(case, found, exact, plain):
    for name, x, expected, dense in zip(NAMES, found, exact, plain):
        problems.assert_as_good(x, expected, dense, 3.0, name)
    # db is 0 where a row has pooled keys alone, but for the rounding of O in D = dO . O, a sum over
    # rows and channels: five times its standard deviation.
    out, _ = pooled_problems.oracle(case)
    squares = (case.grad.double() * out).square().sum(-1)
    blocks = torch.nn.functional.pad(squares, (0, -case.q.shape[2] % case.problem.block_q))
    variance = blocks.unflatten(2, (-1, case.problem.block_q)).sum(3).sum(0)
    noise = 5 * torch.finfo(case.q.dtype).eps / 2 * (variance.max() / 3).sqrt()
    error, allowed = (x[3].double() - exact[3] for x in (found, plain))
    assert error.abs().max() <= 3 * allowed.abs().max() + 1e-3 * exact[3].abs().max() + noise, "db"


@pytest.mark.parametrize(
    ("n_q", "n_k", "options"),
    [
        *problems.EDGES,
        pytest.param(40, 707, {"lengths": (707, 300)}, id="several tiles"),
    ],
)
def test_every_gradient(n_q, n_k, options):
    check(problems.make(n_q, n_k, **options))


def test_without_smoothing():
    check(problems.make(63, 111, lengths=(111, 50)), smooth_k=False)


@pytest.mark.parametrize("parts", [1, 2])
def test_sums_in_parts_of_several_query_blocks(parts, monkeypatch):
    grids = {}

    def note(device, problem, name, grid, *more):
        grids[name] = grid
        real(device, problem, name, grid, *more)

    real = operator_backward.run_kernel
    monkeypatch.setattr(operator_backward, "run_kernel", note)
    monkeypatch.setattr(operator_backward, "POOLED_BLOCKS", parts)
    check(problems.make(111, 200, heads=1))
    assert grids["sla2_pooled_bwd_kv"] == (1, parts, 1)


def test_padded_head_with_several_warps_in_three_lane_orders():
    case = problems.make(111, 200, d=48, blocks=(64, 32), lengths=(200, 63), heads=1)
    kept = None
    for order in ORDERS:
        with lanes(order, seed=3):
            found = run(case)
        kept = kept or found
        assert all(torch.equal(a, b) for a, b in zip(kept, found)), order
    check(case, kept)


def test_nan_in_the_incoming_gradient_is_not_hidden():
    case = problems.make(63, 63, density=0.5)
    case.grad[0, 1, 10, 3] = torch.nan
    found = run(case)
    assert torch.isnan(found[0][0, 1, 10]).all()
    assert all(torch.isnan(x[0, 1]).any() for x in found)
    assert all(torch.isfinite(x[0, 0]).all() for x in found)


def low_bit_oracle(case):
    """The gradients of Alg. 3 for the selected part, of the smoothed K in 16 bit as it is kept."""
    lengths = None if case.lengths is None else case.lengths.long()

    def function(case, bias):
        smooth = smooth_keys(case.k, lengths)
        keys = smooth + (smooth_keys(case.k.detach().to(kind), lengths).double() - smooth).detach()
        precision = case.problem.precision
        leaves = (case.q, keys, case.v)
        return pooled_problems.oracle(case, precision=precision, bias=bias, leaves=leaves)

    kind = case.q.dtype
    return pooled_problems.gradients(case, function, torch.float64)


@pytest.mark.parametrize(
    "precision", ["int8_int8", *(pytest.param(x, marks=pytest.mark.slow) for x in ("int8", "fp8"))]
)
def test_low_bit_forward_and_its_16_bit_backward(precision):
    problems.skip_unless_supported(precision)
    case = problems.make(
        111, 200, d=48, blocks=(64, 32), lengths=(200, 63), heads=1, precision=precision
    )
    expected = low_bit_oracle(case)
    exact = pooled_problems.gradients(case, pooled_problems.oracle, torch.float64)
    plain = pooled_problems.gradients(case, pooled_problems.same_dtype, case.q.dtype)
    # What 16 bit costs without the low-bit forward.
    allowed = [x + (dense.double() - full) for x, dense, full in zip(expected, plain, exact)]
    compare(case, run(case), expected, allowed)


def test_matched_is_refused():
    case = problems.make(63, 64, blocks=(64, 32), precision="int8_int8")
    saved, grad = pooled_problems.forward(case, save=True), problems.strided(case.grad)
    with pytest.raises(ValueError, match=r"^qat_backward: expected 'paper' with pooled keys, got"):
        backward(problems.DEVICE, case.problem, saved, grad, qat_backward="matched")


@pytest.mark.slow
@pytest.mark.parametrize("d", [64, 80, 128])
@pytest.mark.parametrize("wgmma", [True, False])
def test_real_block_size(d, wgmma, monkeypatch):
    monkeypatch.setattr(problems, "DEVICE", replace(problems.DEVICE, wgmma=wgmma))
    check(problems.make(300, 333, d=d, blocks=(128, 64), heads=1))


@pytest.mark.slow
def test_more_than_64_blocks_of_the_real_size():
    check(problems.make(130, 66 * 64 + 5, blocks=(128, 64), lengths=(4200, 2000), heads=1))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_tiles_that_begin_inside_a_word_of_bits(dtype):
    check(problems.make(111, 48 * 100 - 7, dtype=dtype, blocks=(64, 48), heads=1))
