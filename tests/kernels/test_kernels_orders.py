"""Every kernel in three lane orders against the references, forward and backward, after 16-bit and
after low-bit forwards.
"""

import pytest
import torch
from helpers import problems
from sla2_core.backends.pooling import pool, smooth_keys
from sla2_core.routing import top_k_map
from sla2_kernels import backward as operator_backward
from sla2_kernels import forward as operator
from sla2_kernels import prepare
from sla2_kernels.emulator.emulate import ORDERS, lanes
from sla2_kernels.kernels import all_specs

NAMES = ("dq", "dk", "dv", "d alpha")
ALPHA = 0.6
ONLY_LOW_BIT = {"sla2_sparse_fwd_low"}
ONLY_STATES = {"sla2_keys_low", "sla2_masked_sum_low"}  # test_kernels_states.py
ONLY_MATCHED = {
    "sla2_round_queries",
    "sla2_widen",
    "sla2_round_values",
    "sla2_bwd_matched_rows",
}  # test_kernels_matched.py
ONLY_POOLED = {
    "sla2_pooled_fwd",
    "sla2_pooled_fwd_low",
    "sla2_pooled_bwd_q",
    "sla2_pooled_bwd_kv",
    "sla2_pooled_bwd_sum",
}  # test_kernels_pooled.py, test_kernels_pooled_backward.py
ONLY_HOPPER = {
    "sla2_sm90_masked_sum",
    "sla2_sm90_masked_sum_low",
    "sla2_sm90_pack",
    "sla2_sm90_pack_low",
    "sla2_sm90_pooled_fwd",
    "sla2_sm90_pooled_fwd_low",
    "sla2_sm90_sparse_bwd_kv",
    "sla2_sm90_sparse_bwd_q",
    "sla2_sm90_sparse_fwd",
    "sla2_sm90_sparse_fwd_low",
}  # test_kernels_hopper.py


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that ran."""
    names = set()

    def note(device, problem, name, *more):
        names.add(name)
        real(device, problem, name, *more)

    real = operator.run_kernel
    for module in (prepare, operator, operator_backward):
        monkeypatch.setattr(module, "run_kernel", note)
    return names


def make(precision):
    case = problems.make(
        111, 200, d=48, blocks=(64, 32), lengths=(200, 63), heads=1, precision=precision
    )
    return case._replace(alpha=torch.full_like(case.alpha, ALPHA))


def route(case):
    """The scores of heuristic routing and the map they give."""
    inputs = [problems.strided(x) for x in (case.q, case.k, case.v)]
    made = prepare.pool(problems.DEVICE, case.problem, *inputs, pooled=True)
    weight = problems.pointer(torch.eye(48)[None].contiguous())
    found, _, scores = operator.route(
        problems.DEVICE, case.problem, made.pooled_q, made.pooled_k, weight, weight, 1, 0.4
    )
    return scores.owner, found.indices.owner, found.counts.owner


def check_route(case, scores, indices, counts):
    lengths = case.lengths.long()
    pooled_k = pool(smooth_keys(case.k, lengths).double(), 32, lengths)
    exact = pool(case.q.double(), 64) @ pooled_k.transpose(-1, -2) * 48**-0.5
    dead = (torch.arange(exact.shape[-1]) * 32 >= lengths[:, None])[:, None, None]
    exact = exact.masked_fill(dead, -torch.inf)
    torch.testing.assert_close(scores.double(), exact, atol=2e-3, rtol=1e-3, check_stride=False)
    expected = top_k_map(scores, 0.4, block_q=64, block_k=32, n_q=111, n_k=200, kv_lengths=lengths)
    assert torch.equal(counts, expected.counts)
    assert torch.equal(indices[..., : expected.indices.shape[-1]], expected.indices)


def same(first, second):
    return all(
        torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip(first, second)
    )


def test_16_bit(launched):
    case, kept = make("full"), None
    (exact, exact_grads), (plain, plain_grads) = (
        f(case, gradients=True) for f in (problems.oracle, problems.same_dtype)
    )
    for order in ORDERS:
        with lanes(order, seed=3):
            routed = route(case)
            out, lse, grads = problems.run(case, gradients=True)
        check_route(case, *routed)
        problems.assert_as_good(out, exact, plain, 2.0, f"out, {order}")
        for name, found, expected, dense in zip(NAMES, grads, exact_grads, plain_grads):
            problems.assert_as_good(found, expected, dense, 3.0, f"{name}, {order}")
        kept = kept or (out, lse, *grads, *routed)
        assert same(kept, (out, lse, *grads, *routed)), order
    elsewhere = ONLY_LOW_BIT | ONLY_STATES | ONLY_POOLED | ONLY_MATCHED | ONLY_HOPPER
    assert launched == {spec.entry for spec in all_specs("sm_90a")} - elsewhere


@pytest.mark.parametrize("precision", ["int8", "int8_int8", "fp8"])
def test_low_bit_forward_and_its_16_bit_backward(precision, launched):
    problems.skip_unless_supported(precision)
    case, kept = make(precision), None
    full, full_grads = problems.oracle(case, gradients=True)
    _, plain_grads = problems.same_dtype(case, gradients=True)
    expected, expected_grads = problems.low_bit_oracle(case)
    rounding = (expected.double() - full).square().mean().sqrt()
    for order in ORDERS:
        with lanes(order, seed=3):
            out, lse, grads = problems.run(case, gradients=True)
        error = (out.double() - expected.double()).square().mean().sqrt()
        assert error < 0.75 * rounding, order
        *grads, d_alpha = grads
        for name, found, right, plain, exact in zip(
            NAMES, grads, expected_grads, plain_grads, full_grads
        ):
            allowed = right.double() + (
                plain.double() - exact
            )  # what 16 bit costs without the low-bit forward
            problems.assert_as_good(found, right.double(), allowed, 3.0, f"{name}, {order}")
        # dO . (O_s - O_l) sees the rounding of P~ in O_s, which the kernel does relative to a
        # running maximum
        noise = 3 * error / ALPHA * case.grad.double().norm()
        assert (d_alpha - expected_grads[-1]).abs().max() < noise, order
        grads.append(d_alpha)
        kept = kept or (out, lse, *grads)
        assert same(kept, (out, lse, *grads)), order
    assert launched > ONLY_LOW_BIT
