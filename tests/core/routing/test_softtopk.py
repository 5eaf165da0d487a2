"""SoftTop-k: rows sum to k, the gradient is exact, edges."""

import pytest
import torch
from sla2_core import soft_topk


@pytest.mark.parametrize(("t_n", "k"), [(1, 1), (7, 1), (63, 2.5), (512, 15), (5, 5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_sum_to_k_within_zero_and_one(t_n, k, dtype):
    torch.manual_seed(0)
    m = soft_topk(torch.randn(2, 3, t_n, dtype=dtype) * 3, k)
    assert m.shape == (2, 3, t_n)
    assert ((m >= 0) & (m <= 1)).all()
    torch.testing.assert_close(
        m.sum(-1), torch.full((2, 3), float(k), dtype=dtype), rtol=0, atol=2e-4
    )


def test_gradcheck_through_the_constraint():
    torch.manual_seed(1)
    scores = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: soft_topk(s, 2.0, 0.7), (scores,))
    assert torch.autograd.gradcheck(lambda s: soft_topk(s, 8.0, 0.7), (scores,))


def test_small_tau_is_hard_top_k():
    scores = torch.tensor([[0.3, 2.0, -1.0, 1.0]])
    torch.testing.assert_close(
        soft_topk(scores, 2, 1e-3), torch.tensor([[0.0, 1.0, 0.0, 1.0]]), rtol=0, atol=1e-5
    )


def test_saturated_row_has_a_finite_gradient():
    scores = torch.tensor([[100.0, -100.0, -100.0]], requires_grad=True)
    soft_topk(scores, 1, 0.1).square().sum().backward()
    assert torch.isfinite(scores.grad).all()


def test_blocks_at_minus_infinity_are_never_chosen():
    scores = torch.tensor(
        [[0.1, -torch.inf, 0.5, 0.2], [0.3, -torch.inf, -torch.inf, 0.1]], requires_grad=True
    )
    m = soft_topk(scores, 2)
    assert (m[scores.isinf()] == 0).all()
    torch.testing.assert_close(m.sum(-1), torch.tensor([2.0, 2.0]), rtol=0, atol=1e-4)
    m.square().sum().backward()
    assert (scores.grad[scores.isinf()] == 0).all()


@pytest.mark.parametrize(
    ("scores", "error"),
    [([1.0, 2.0], TypeError), (torch.arange(3), TypeError), (torch.tensor(1.0), ValueError)],
)
def test_bad_scores_are_named(scores, error):
    with pytest.raises(error, match="scores: expected"):
        soft_topk(scores, 1)


def test_nan_scores_come_out_as_nan():
    assert soft_topk(torch.tensor([[1.0, float("nan"), 2.0]]), 1).isnan().all()


@pytest.mark.parametrize(
    ("k", "tau", "match"),
    [(0, 0.1, "k: expected"), (4, 0.1, "k: expected"), (1, 0.0, "tau: expected")],
)
def test_bad_arguments(k, tau, match):
    with pytest.raises(ValueError, match=match):
        soft_topk(torch.zeros(1, 3), k, tau)
