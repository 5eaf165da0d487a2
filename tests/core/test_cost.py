"""The cost model against the FLOPs column of the paper's Tables 1 and 2."""

import pytest
import torch
from sla2_core import BlockMap, SLA2Config
from sla2_core.cost import measured_share, sla2_cost


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


def test_the_pooled_complement_costs_1_6_percent_and_makes_no_states():
    sizes = dict(n_q=32760, n_k=32760, num_heads=12, head_dim=128, topk=0.03)
    pooled, linear, none = (
        sla2_cost(**sizes, complement=name) for name in ("pooled", "linear", "none")
    )
    assert pooled.linear_flops == 4 * 32760 * 512 * 128 * 12
    assert pooled.linear_flops / pooled.full_flops == pytest.approx(1 / 64, rel=1e-3)
    assert pooled.bytes - none.bytes == 4 * 3 * 512 * 128 * 12
    assert (linear.bytes - none.bytes) / (pooled.bytes - none.bytes) == pytest.approx(129)


def test_sla_s_projection_is_counted_beside_its_linear_attention():
    sizes = dict(n_q=100, n_k=60, num_heads=2, head_dim=8, topk=0.5, block_q=32, block_k=16)
    linear, projected = (sla2_cost(**sizes, complement=name) for name in ("linear", "projected"))
    assert projected.linear_flops - linear.linear_flops == 2 * 100 * 8 * 8 * 2


@pytest.mark.parametrize(("kw", "match"), [({"topk": 0}, "topk"), ({"n_q": 0}, "n_q")])
def test_bad_values_are_named(kw, match):
    with pytest.raises(ValueError, match=f"{match}: expected"):
        sla2_cost(**({"n_q": 8, "n_k": 8, "num_heads": 1, "head_dim": 8, "topk": 0.5} | kw))


def test_a_measured_share_counts_what_the_map_attends_to_and_the_text_queries():
    mask = torch.zeros(1, 2, 4, 4, dtype=torch.bool)
    mask[:, :, 0], mask[:, 1, 1, :2] = True, True
    sizes = dict(block_q=32, block_k=16)
    block_map = BlockMap.from_mask(mask, **sizes, n_q=100, n_k=60)
    config = SLA2Config(head_dim=8, num_heads=2, topk=0.9, complement="none", alpha="one", **sizes)
    full, router = 4 * 100 * 60 * 8 * 2, 2 * 4 * 4 * 8 * 2
    assert measured_share(block_map, config) == pytest.approx((full * 10 / 32 + router) / full)
    dense = 4 * 7 * 60 * 8 * 2
    with_text = (full * 10 / 32 + router + dense) / (full + dense)
    assert measured_share(block_map, config, text_tokens=7) == pytest.approx(with_text)
