"""BlockMap: from a mask and back, transposed, sparsity, and refusal of bad indices."""

import pytest
import torch
from sla2_core import BlockMap


def make(mask, **kw):
    geometry = {"block_q": 16, "block_k": 8, "n_q": 63, "n_k": 37} | kw
    return BlockMap.from_mask(mask, **geometry)


@pytest.fixture
def mask():
    torch.manual_seed(0)
    m = torch.rand(2, 3, 4, 5) < 0.4
    m[0, 0, 0] = False
    m[1, 2, 3] = True
    return m


def test_rows_are_the_set_columns_ascending(mask):
    bm = make(mask)
    assert bm.indices.dtype == bm.counts.dtype == torch.int32
    assert bm.indices.shape == (2, 3, 4, 5)
    for b, h, row in torch.cartesian_prod(
        torch.arange(2), torch.arange(3), torch.arange(4)
    ).tolist():
        expected = mask[b, h, row].nonzero().flatten().tolist()
        assert bm.counts[b, h, row] == len(expected)
        assert bm.indices[b, h, row].tolist() == expected + [-1] * (5 - len(expected))
    assert bm.sparsity == pytest.approx(1 - mask.float().mean().item())
    assert torch.equal(bm.mask(), mask)


def test_transposed_lists_the_query_blocks_of_each_key_block(mask):
    indices, counts = make(mask).transposed()
    assert counts.shape == (2, 3, 5)
    for column in range(5):
        expected = mask[1, 0, :, column].nonzero().flatten().tolist()
        assert indices[1, 0, column, : counts[1, 0, column]].tolist() == expected


@pytest.mark.parametrize(
    ("row", "count", "why"),
    [
        ([0, 0, 2], 3, "repeat"),
        ([2, 1, 4], 3, "descend"),
        ([0, 1, 5], 3, "outside"),
        ([-1, 1, 2], 3, "negative"),
        ([0, 1, 2], 4, "count"),
    ],
)
def test_bad_indices_are_refused_with_their_place(row, count, why):
    indices = torch.arange(3).repeat(1, 2, 4, 1)
    counts = torch.full((1, 2, 4), 3)
    indices[0, 1, 2], counts[0, 1, 2] = torch.tensor(row), count
    with pytest.raises(ValueError, match=r"\(b, h, row\) = \(0, 1, 2\)"):
        BlockMap(indices, counts, block_q=16, block_k=8, n_q=63, n_k=37)


def test_a_map_without_columns_selects_nothing(mask):
    b, h, t_m = mask.shape[:3]
    counts = torch.zeros(b, h, t_m, dtype=torch.int32)
    block_map = BlockMap(counts[..., None][..., :0], counts, block_q=16, block_k=8, n_q=63, n_k=37)
    nothing = make(torch.zeros_like(mask))
    assert torch.equal(block_map.indices, nothing.indices)
    assert torch.equal(block_map.counts, nothing.counts)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_an_empty_batch_is_refused(shape):
    with pytest.raises(ValueError, match="mask: expected shape"):
        make(torch.ones(*shape, 4, 5, dtype=torch.bool))
    counts = torch.zeros(*shape, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match="indices, counts: expected"):
        BlockMap(counts[..., None], counts, block_q=16, block_k=8, n_q=63, n_k=37)


def test_entries_past_the_count_are_ignored():
    indices = torch.tensor([[[[3, 99, -7]]]])
    bm = BlockMap(indices, torch.tensor([[[1]]]), block_q=16, block_k=8, n_q=5, n_k=37)
    assert bm.indices.tolist() == [[[[3, -1, -1]]]]


@pytest.mark.parametrize(
    ("kw", "match"),
    [
        ({"n_k": 48}, "mask: expected shape"),
        ({"block_q": 0}, "block_q: expected"),
        ({"n_q": 1.5}, "n_q: expected"),
    ],
)
def test_wrong_geometry_is_named(mask, kw, match):
    with pytest.raises(ValueError, match=match):
        make(mask, **kw)


def test_mask_must_be_bool(mask):
    with pytest.raises(TypeError, match="mask: expected a bool tensor"):
        make(mask.float())
