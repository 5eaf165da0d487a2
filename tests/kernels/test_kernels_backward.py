"""The whole backward on the emulator against the fp64 reference: every gradient, odd lengths,
padding, edge maps.
"""

import pytest
import torch
from helpers import problems

NAMES = ("dq", "dk", "dv", "d alpha")


def check(case, **options):
    *_, grads = problems.run(case, gradients=True, **options)
    (_, exact), (_, plain) = (
        f(case, gradients=True, **options) for f in (problems.oracle, problems.same_dtype)
    )
    for name, found, expected, dense in zip(NAMES, grads, exact, plain):
        problems.assert_as_good(found, expected, dense, 3.0, name)


@pytest.mark.parametrize(("n_q", "n_k", "options"), problems.EDGES)
def test_every_gradient(n_q, n_k, options):
    check(problems.make(n_q, n_k, **options))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_padded_head_with_several_warps(dtype):
    check(problems.make(111, 200, d=48, dtype=dtype, blocks=(64, 32), heads=1), smooth_k=False)


def test_sparse_branch_alone():
    check(problems.make(111, 200, lengths=(200, 63)), linear=False, smooth_k=False)


def test_repeats_are_equal_to_the_bit():
    case = problems.make(63, 111, lengths=(111, 50))
    out, lse, grads = problems.run(case, gradients=True)
    again, lse_again, grads_again = problems.run(case, gradients=True)
    assert torch.equal(out, again)
    assert torch.equal(lse, lse_again)
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_again))


def test_nan_in_the_incoming_gradient_is_not_hidden():
    case = problems.make(63, 63, density=0.5)
    case.grad[0, 1, 10, 3] = torch.nan
    *_, (dq, dk, dv, d_alpha) = problems.run(case, gradients=True)
    assert torch.isnan(dq[0, 1, 10]).all()
    assert torch.isnan(dk[0, 1]).any()
    assert torch.isnan(dv[0, 1]).any()
    assert torch.isnan(d_alpha[0, 1]).any()
    assert all(torch.isfinite(x[0, 0]).all() for x in (dq, dk, dv, d_alpha))


@pytest.mark.slow
@pytest.mark.parametrize("d", [64, 128])
def test_real_block_size(d):
    check(problems.make(200, 333, d=d, blocks=(128, 64), heads=1))
