"""alpha: knots over the relative position, the routed mass, dtypes, gradients."""

import pytest
import torch
from sla2_core import SLA2Config
from sla2_core.mixing.mass import mass_log_odds
from sla2_core.mixing.position import interpolate_knots
from sla2_core.registry import MIXINGS


def mixing(**kw):
    return MIXINGS.make(SLA2Config(head_dim=4, num_heads=2, topk=0.5, **kw))


def test_knots_equal_to_rows_give_one_value_per_query_block():
    values = torch.randn(1, 6)
    torch.testing.assert_close(interpolate_knots(values, torch.arange(6), 6), values)


def test_knots_interpolate_linearly_between_first_and_last_block():
    values = torch.tensor([[0.0, 1.0]])
    torch.testing.assert_close(
        interpolate_knots(values, torch.arange(5), 5), torch.linspace(0, 1, 5)[None]
    )
    torch.testing.assert_close(
        interpolate_knots(values, torch.tensor([3]), 5), torch.tensor([[0.75]])
    )
    assert interpolate_knots(values, torch.arange(1), 1).shape == (1, 1)


def test_position_starts_at_alpha_init_for_every_length():
    for rows in (1, 7, 40):
        alpha = mixing(alpha="position", alpha_init=0.6)(
            torch.zeros(1, 2, rows, 3), torch.zeros(1, 2, rows, 3, dtype=torch.bool)
        )
        torch.testing.assert_close(alpha, torch.full((1, 2, rows), 0.6))
    assert mixing(alpha="position", alpha_per_head=False).logit.shape == (1, 16)


def test_mass_starts_as_the_routed_share_of_the_pooled_mass():
    scores = torch.randn(2, 2, 5, 7)
    mask = torch.rand(2, 2, 5, 7) < 0.5
    mask[..., 0], mask[..., 1] = True, False
    expected = (torch.softmax(scores, -1) * mask).sum(-1)
    torch.testing.assert_close(mixing(alpha="mass")(scores, mask), expected)
    torch.testing.assert_close(
        mass_log_odds(scores, mask.float()), mass_log_odds(scores, mask), rtol=1e-4, atol=1e-4
    )


def test_mass_is_finite_where_all_or_nothing_is_selected():
    scores = torch.randn(1, 2, 3, 4, requires_grad=True)
    for fill in (True, False):
        odds = mass_log_odds(scores, torch.full((1, 2, 3, 4), fill))
        assert (odds == (20 if fill else -20)).all()
        odds.sum().backward()
        assert torch.isfinite(scores.grad).all()


@pytest.mark.parametrize("kind", ["position", "mass"])
def test_parameters_stay_fp32_and_receive_gradients(kind):
    module = mixing(alpha=kind).to(torch.bfloat16)
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    mask = torch.tensor([True, False, True]).expand(1, 2, 4, 3)
    module(torch.randn(1, 2, 4, 3), mask).sum().backward()
    assert all(p.grad is not None and (p.grad != 0).any() for p in module.parameters())
