"""Router: pooling with a short last block, top-k with ties, kv_lengths, fp32 under a cast."""

import pytest
import torch
from sla2_core import SLA2Config
from sla2_core.backends.pooling import pool, smooth_keys
from sla2_core.block_map import Geometry
from sla2_core.registry import ROUTERS
from sla2_core.routing import top_k_map

GEOMETRY = {"block_q": 4, "block_k": 4, "n_q": 4, "n_k": 30}


def test_pool_averages_valid_tokens_only():
    x = torch.arange(2 * 1 * 7 * 2, dtype=torch.float32).view(2, 1, 7, 2)
    torch.testing.assert_close(pool(x, 3)[1, 0, 2], x[1, 0, 6])
    torch.testing.assert_close(pool(x, 3)[0, 0, 0], x[0, 0, :3].mean(0))
    cut = pool(x, 3, torch.tensor([7, 4]))
    torch.testing.assert_close(cut[0], pool(x, 3)[0])
    torch.testing.assert_close(cut[1, 0, 1], x[1, 0, 3])
    assert (cut[1, 0, 2] == 0).all()


def test_smooth_keys_leaves_a_zero_mean_over_valid_tokens():
    k = torch.randn(2, 1, 9, 3) + 5
    torch.testing.assert_close(smooth_keys(k).mean(2), torch.zeros(2, 1, 3), atol=1e-6, rtol=0)
    cut = smooth_keys(k, torch.tensor([9, 4]))
    torch.testing.assert_close(cut[1, :, :4].mean(1), torch.zeros(1, 3), atol=1e-6, rtol=0)


def test_ties_go_to_the_lower_index_and_indices_ascend():
    scores = torch.tensor([1.0, 3.0, 3.0, 0.0, 3.0, 3.0, 1.0, 2.0]).view(1, 1, 1, 8)
    assert top_k_map(scores, 3 / 8, **GEOMETRY).indices.flatten().tolist() == [1, 2, 4]


@pytest.mark.parametrize(("topk", "expected"), [(0.01, 1), (0.3, 2), (0.32, 3), (1.0, 8)])
def test_k_is_rounded_and_at_least_one(topk, expected):
    assert top_k_map(torch.randn(1, 1, 1, 8), topk, **GEOMETRY).counts.item() == expected


def test_the_truncated_router_cuts_the_count_of_each_item():
    config = SLA2Config(head_dim=4, num_heads=1, topk=0.3, router="truncated")
    router = ROUTERS.make(config)
    geometry = Geometry(**GEOMETRY)
    scores = torch.arange(8.0).expand(2, 1, 1, 8)
    for topk, counts in ((0.37, [2, 1]), (0.75, [6, 2]), (0.01, [1, 1])):  # of 8 and of 3 blocks
        found = router.select(scores, topk, geometry, torch.tensor([30, 9]))
        assert found.counts.flatten().tolist() == counts
        assert router.select(scores, topk, geometry).counts[0].item() == counts[0]


def test_kv_lengths_limit_each_item_to_its_own_blocks():
    scores = torch.arange(8.0).expand(2, 1, 1, 8)
    bm = top_k_map(scores, 0.5, **GEOMETRY, kv_lengths=torch.tensor([30, 9]))
    assert bm.indices[0, 0, 0].tolist() == [4, 5, 6, 7]
    assert bm.counts.flatten().tolist() == [4, 2]
    assert bm.indices[1, 0, 0, :2].tolist() == [1, 2]


def test_kv_lengths_route_each_item_as_its_own_sequence():
    scores = (
        torch.randn(4, 2, 5, 29, generator=torch.Generator().manual_seed(0)).mul(4).round()
    )  # with ties
    lengths = [1, 40, 97, 113]
    sizes = dict(block_q=16, block_k=4, n_q=65)
    for topk in (0.01, 0.25, 0.5, 1.0):
        found = top_k_map(scores, topk, n_k=113, kv_lengths=torch.tensor(lengths), **sizes)
        for item, length in enumerate(lengths):
            t_n = -(-length // 4)
            alone = top_k_map(scores[item : item + 1, ..., :t_n], topk, n_k=length, **sizes)
            width = alone.indices.shape[-1]
            assert torch.equal(found.counts[item], alone.counts[0])
            assert torch.equal(found.indices[item, ..., :width], alone.indices[0])
            assert (found.indices[item, ..., width:] == -1).all()


def test_identity_router_scores_are_scaled_dot_products_in_fp32():
    router = ROUTERS.make(SLA2Config(head_dim=8, num_heads=2, topk=0.5)).to(torch.bfloat16)
    assert {p.dtype for p in router.parameters()} == {torch.float32}
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8)
    torch.testing.assert_close(router.scores(q, k), q @ k.transpose(-1, -2) / 8**0.5)
    with torch.autocast("cpu", torch.bfloat16):
        assert router.scores(q, k).dtype == torch.float32


def test_heuristic_router_has_no_parameters():
    router = ROUTERS.make(SLA2Config(head_dim=8, num_heads=2, topk=0.5, router="heuristic"))
    assert not list(router.parameters())
    assert not router.state_dict()
