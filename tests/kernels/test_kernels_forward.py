"""The whole forward on the emulator against the fp64 reference: odd lengths, padding, all, one and
no blocks, NaN.
"""

from dataclasses import replace

import pytest
import torch
from helpers import problems
from sla2_core.reference import block_sparse_reference


@pytest.mark.parametrize(("n_q", "n_k", "options"), problems.EDGES)
def test_forward(n_q, n_k, options):
    case = problems.make(n_q, n_k, **options)
    out, lse = problems.run(case)
    problems.assert_as_good(out, problems.oracle(case), problems.same_dtype(case), 2.0)
    keys = case.k.double() - problems.smooth_keys(
        case.k.double(), None if case.lengths is None else case.lengths.long()
    )
    shift = (case.q.double() * keys[:, :, :1]).sum(-1) * case.q.shape[-1] ** -0.5
    _, expected = block_sparse_reference(
        case.q.double(), case.k.double(), case.v.double(), case.block_map, kv_lengths=case.lengths
    )
    torch.testing.assert_close(lse.double(), expected - shift, atol=0.02, rtol=0.01)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_padded_head_with_several_warps(dtype):
    case = problems.make(111, 200, d=48, dtype=dtype, blocks=(64, 32), heads=1)
    out, _ = problems.run(case, smooth_k=False)
    exact, plain = (f(case, smooth_k=False) for f in (problems.oracle, problems.same_dtype))
    problems.assert_as_good(out, exact, plain, 2.0)


def test_sparse_branch_alone():
    case = problems.make(111, 200, lengths=(200, 63))
    out, lse = problems.run(case, linear=False, smooth_k=False)
    q, k, v = (x.double() for x in (case.q, case.k, case.v))
    exact, expected = block_sparse_reference(q, k, v, case.block_map, kv_lengths=case.lengths)
    problems.assert_as_good(out, exact, problems.same_dtype(case, linear=False), 2.0)
    torch.testing.assert_close(lse.double(), expected, atol=1e-4, rtol=1e-4)
    assert (lse == -torch.inf).any()


@pytest.mark.skipif(problems.on_gpu(), reason="the GPU has the architecture it has")
def test_sixteen_rows_a_warp(monkeypatch):
    """As sm_86, sm_89 and sm_120 share a query block among warps."""
    monkeypatch.setattr(problems, "DEVICE", replace(problems.DEVICE, arch="sm_120a"))
    case = problems.make(111, 200, lengths=(200, 63))
    out, _ = problems.run(case)
    problems.assert_as_good(out, problems.oracle(case), problems.same_dtype(case), 2.0)


def test_padding_tokens_may_hold_anything():
    case = problems.make(63, 111, lengths=(70, 111))
    out, lse = problems.run(case)
    for x in (case.k, case.v):
        x[0, :, 70:] = torch.nan
    again, lse_again = problems.run(case)
    assert torch.equal(out, again)
    assert torch.equal(lse, lse_again)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nan_is_not_hidden(name):
    case = problems.make(63, 63, density=1.0)
    getattr(case, name)[0, 1, 40, 3] = torch.nan
    out, _ = problems.run(case)
    assert torch.equal(torch.isnan(out), torch.isnan(problems.oracle(case)))
    assert torch.isnan(out[0, 1]).any()
    assert torch.isfinite(out[0, 0]).all()


def test_large_scores_need_the_running_maximum():
    case = problems.make(63, 111)
    case.q.mul_(30)
    out, _ = problems.run(case)
    problems.assert_as_good(out, problems.oracle(case), problems.same_dtype(case), 2.0)


@pytest.mark.slow
@pytest.mark.parametrize("d", [64, 128])
def test_real_block_size(d):
    case = problems.make(200, 333, d=d, blocks=(128, 64), heads=1)
    out, _ = problems.run(case)
    problems.assert_as_good(out, problems.oracle(case), problems.same_dtype(case), 2.0)
