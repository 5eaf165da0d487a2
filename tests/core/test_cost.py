"""The cost model against the FLOPs column of the paper's Tables 1 and 2."""

import pytest
from sla2_core.cost import sla2_cost


@pytest.mark.parametrize(
    ("n", "heads", "topk", "tera", "full"),
    [
        (32760, 12, 0.03, 1.82, 52.75),
        (32760, 12, 0.05, 2.87, 52.75),
        (32760, 12, 0.10, 5.51, 52.75),
        (75600, 40, 0.03, 9.26, 292.6),
    ],
)
def test_ratios_of_the_paper(n, heads, topk, tera, full):
    cost = sla2_cost(
        n_q=n, n_k=n, num_heads=heads, head_dim=128, topk=topk, block_q=128, block_k=64
    )
    assert cost.flops / cost.full_flops == pytest.approx(tera / full, rel=0.02)
    assert cost.sparsity == pytest.approx(1 - topk)


def test_parts_of_a_small_case_by_hand():
    cost = sla2_cost(n_q=100, n_k=60, num_heads=2, head_dim=8, topk=0.5, block_q=32, block_k=16)
    assert cost.full_flops == 4 * 100 * 60 * 8 * 2
    assert cost.sparse_flops == cost.full_flops / 2
    assert cost.linear_flops == 2 * 160 * 64 * 2
    assert cost.router_flops == 2 * 4 * 4 * 8 * 2
    assert cost.flops == cost.sparse_flops + cost.linear_flops + cost.router_flops
    tokens = 2 * (100 + 60) * 8 * 2 * 2
    assert cost.bytes == tokens + 4 * 2 * 8 * 2 * (8 * 9) + 4 * 2 * 8 * 2 * 8


@pytest.mark.parametrize(("kw", "match"), [({"topk": 0}, "topk"), ({"n_q": 0}, "n_q")])
def test_bad_values_are_named(kw, match):
    with pytest.raises(ValueError, match=f"{match}: expected"):
        sla2_cost(**({"n_q": 8, "n_k": 8, "num_heads": 1, "head_dim": 8, "topk": 0.5} | kw))
