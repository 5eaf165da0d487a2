"""The forward of the pooled complement on the emulator against the fp64 reference: odd lengths,
padding, rows that select all, one and no block, low bit, NaN.
"""

from dataclasses import replace

import pytest
import torch
from helpers import pooled_problems, problems
from sla2_core.backends.pooling import pool, smooth_keys
from sla2_kernels.emulator.emulate import ORDERS, lanes


def check(case, found, shift=0.0):
    out, lse = found.out.owner.view(case.q.shape), found.lse.owner
    exact, expected = pooled_problems.oracle(case)
    problems.assert_as_good(out, exact, pooled_problems.same_dtype(case), 2.0)
    torch.testing.assert_close(lse.double(), expected - shift, atol=0.02, rtol=0.01)


def shift_of(case):
    """What smoothing K takes from every score of a row."""
    k = case.k.double()
    smoothed = smooth_keys(k, None if case.lengths is None else case.lengths.long())
    return (case.q.double() * (k - smoothed)[:, :, :1]).sum(-1) * case.q.shape[-1] ** -0.5


# With (32, 16) blocks a tile has 16 pooled keys: 3 of 45 blocks, which end inside a word.
EDGES = [*problems.EDGES, pytest.param(40, 707, {}, id="several tiles")]


@pytest.mark.parametrize(("n_q", "n_k", "options"), EDGES)
def test_forward(n_q, n_k, options):
    case = problems.make(n_q, n_k, **options)
    check(case, pooled_problems.forward(case), shift_of(case))


@pytest.mark.parametrize("save", [False, True])
def test_the_means(save):
    """Of the smoothed K, also where the kernel reads K as it is."""
    case = problems.make(63, 111, lengths=(50, 111))
    lengths = case.lengths.long()
    made = pooled_problems.forward(case, save=save).pooled
    for found, x in ((made.k, smooth_keys(case.k.double(), lengths)), (made.v, case.v.double())):
        expected = pool(x, 16, lengths)
        expected[0, :, 4:] = 0.0
        found = found.owner.view(expected.shape).double()
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=4e-3)


def test_saved_and_unsmoothed():
    case = problems.make(63, 111, d=48, lengths=(50, 111))
    check(case, pooled_problems.forward(case, smooth_k=False))
    check(case, pooled_problems.forward(case, save=True), shift_of(case))


def test_one_bias_for_all_and_a_large_one():
    case = problems.make(63, 111)
    for bias in (torch.full((1, 1, 1), 0.7), torch.full((1, 2, 1), 40.0)):
        out = pooled_problems.forward(case, bias=bias).out.owner.view(case.q.shape)
        exact, _ = pooled_problems.oracle(case, bias=bias)
        problems.assert_as_good(out, exact, pooled_problems.same_dtype(case, bias=bias), 2.0)


@pytest.mark.skipif(problems.on_gpu(), reason="the GPU has the architecture it has")
@pytest.mark.parametrize("arch", [pytest.param("sm_100a", marks=pytest.mark.slow), "sm_120a"])
def test_other_architectures(arch, monkeypatch):
    """Where no pooled tile travels early, and with 16 rows a warp."""
    monkeypatch.setattr(problems, "DEVICE", replace(problems.DEVICE, arch=arch))
    case = problems.make(63, 200, lengths=(200, 63))
    check(case, pooled_problems.forward(case), shift_of(case))


def test_three_lane_orders_give_the_same_bits():
    case, kept = problems.make(63, 200, d=48, blocks=(64, 32), heads=1), None
    for order in ORDERS:
        with lanes(order, seed=3):
            found = pooled_problems.forward(case)
        kept = kept or found
        for name in ("out", "lse"):
            assert torch.equal(getattr(found, name).owner, getattr(kept, name).owner), order
    check(case, kept, shift_of(case))


def test_padding_tokens_may_hold_anything_and_nan_is_not_hidden():
    case = problems.make(63, 111, lengths=(70, 111))
    before = pooled_problems.forward(case)
    for x in (case.k, case.v):
        x[0, :, 70:] = torch.nan
    again = pooled_problems.forward(case)
    assert torch.equal(again.out.owner, before.out.owner)
    assert torch.equal(again.lse.owner, before.lse.owner)
    case.v[0, 1, 40, 3] = torch.nan  # in a selected or a pooled key of every row
    out = pooled_problems.forward(case).out.owner.view(case.q.shape)
    assert torch.isnan(out[0, 1, :, 3]).all()
    assert torch.isfinite(out[0, 0]).all()


@pytest.mark.parametrize("precision", ["int8", "int8_int8", "fp8"])
def test_low_bit_rounds_the_selected_part_alone(precision):
    problems.skip_unless_supported(precision)
    case = problems.make(
        111, 200, d=64, blocks=(64, 32), lengths=(200, 63), heads=1, precision=precision
    )
    found = pooled_problems.forward(case)
    out, lse = found.out.owner.view(case.q.shape), found.lse.owner
    # K as the kernels keep it: smoothed, in 16 bit.
    keys = smooth_keys(case.k, case.lengths.long())
    right, expected = pooled_problems.oracle(
        case, precision=precision, leaves=(case.q, keys, case.v)
    )
    full, _ = pooled_problems.oracle(case)
    error, rounding = out.double() - right, right - full
    assert error.square().mean().sqrt() < 0.75 * rounding.square().mean().sqrt()
    torch.testing.assert_close(lse.double(), expected, atol=0.02, rtol=0.01)
    # A row that selects nothing has no rounding but 16 bit's.
    alone = out[0, :, :64].double() - full[0, :, :64]
    plain = pooled_problems.same_dtype(case)[0, :, :64].double() - full[0, :, :64]
    assert alone.abs().max() <= 2 * plain.abs().max() + 1e-3 * full.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize(("d", "dtype"), [(64, "float16"), (80, "bfloat16"), (128, "bfloat16")])
@pytest.mark.parametrize("precision", ["full", "int8_int8"])
def test_real_block_size(d, dtype, precision):
    case = problems.make(200, 333, d=d, dtype=dtype, blocks=(128, 64), heads=1, precision=precision)
    found = pooled_problems.forward(case)
    if precision == "full":
        check(case, found, shift_of(case))
        return
    out, (full, _) = found.out.owner.view(case.q.shape).double(), pooled_problems.oracle(case)
    assert torch.nn.functional.cosine_similarity(out.flatten(), full.flatten(), 0) > 0.999
