"""Routing kernels on the emulator: scores, top-k with ties and NaN, the map by bits and by columns,
block means.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from sla2_core import BlockMap
from sla2_core.routing.router import pool, smooth_keys, top_k_map
from sla2_kernels import forward as operator
from sla2_kernels.backward import transpose_map

_SPEC = importlib.util.spec_from_file_location(
    "kernel_problems", Path(__file__).with_name("problems.py")
)
problems = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(problems)
DEVICE, pointer = problems.DEVICE, problems.pointer


@pytest.mark.parametrize("weight_heads", [1, 2])
def test_routing_equals_the_router(weight_heads):
    case = problems.make(111, 600, d=48, lengths=(600, 63))
    lengths = case.lengths.long()
    inputs = [problems.strided(x) for x in (case.q, case.k, case.v)]
    made = operator.prologue(DEVICE, case.problem, *inputs, linear=False, pool=True)
    weights = [torch.randn(weight_heads, 48, 48) * 0.3 for _ in range(2)]
    topk = 0.13
    found, scores = operator.route(
        DEVICE,
        case.problem,
        made.pooled_q,
        made.pooled_k,
        *map(pointer, weights),
        weight_heads,
        topk,
    )
    pooled_q = pool(case.q.double(), 32)
    pooled_k = pool(smooth_keys(case.k, lengths).double(), 16, lengths)
    exact = (
        (pooled_q @ weights[0].double())
        @ (pooled_k @ weights[1].double()).transpose(-1, -2)
        * 48**-0.5
    )
    dead = (torch.arange(exact.shape[-1]) * 16 >= lengths[:, None])[:, None, None]
    torch.testing.assert_close(
        scores.owner.double(),
        exact.masked_fill(dead, -torch.inf),
        atol=2e-3,
        rtol=1e-3,
        check_stride=False,
    )
    expected = top_k_map(
        scores.owner, topk, block_q=32, block_k=16, n_q=111, n_k=600, kv_lengths=lengths
    )
    assert torch.equal(found.counts.owner, expected.counts)
    assert torch.equal(found.indices.owner[..., : expected.indices.shape[-1]], expected.indices)


def select(scores: torch.Tensor, topk: float) -> operator.Map:
    """The map that the top-k kernel makes of scores (1, 1, T_m, T_n), blocks 32 x 16."""
    t_m, t_n = scores.shape[2:]
    problem = operator.Problem(
        batch=1, heads=1, n_q=32 * t_m, n_k=16 * t_n, head_dim=64, block_q=32, block_k=16
    )
    width = max(1, round(topk * t_n))
    indices, counts = (
        problems.allocate((1, 1, t_m, width), "int32"),
        problems.allocate((1, 1, t_m), "int32"),
    )
    sizes = [np.int32(x) for x in (1, t_m, t_n, 16 * t_n, width)]
    args = pointer(scores), operator.NULL, indices, counts, *sizes, np.float64(topk)
    operator.run_kernel(DEVICE, problem, "sla2_topk", (-(-t_m // 4), 1), *args)
    return operator.Map(indices, counts, width)


def test_topk_breaks_ties_to_the_lower_index_and_keeps_nan_on_top():
    torch.manual_seed(0)
    scores = torch.randint(-2, 3, (1, 1, 9, 77)).float()
    scores[0, 0, 1] = 0.0
    scores[0, 0, 2, ::2] = -0.0
    scores[0, 0, 3, 70:72] = torch.nan
    scores[0, 0, 4] = -torch.inf
    for topk in (0.01, 0.2, 1.0):
        expected = top_k_map(scores, topk, block_q=32, block_k=16, n_q=288, n_k=1232)
        found = select(scores, topk)
        assert torch.equal(found.indices.owner, expected.indices)
        assert torch.equal(found.counts.owner, expected.counts)


def test_bits_and_columns_of_a_map():
    torch.manual_seed(1)
    mask = torch.rand(1, 2, 37, 70) < 0.3
    mask[0, 0, :, 5] = True
    mask[0, 1, 4] = False
    mask[0, 1, 6] = True
    block_map = BlockMap.from_mask(mask, block_q=32, block_k=16, n_q=32 * 36 + 1, n_k=16 * 69 + 3)
    problem = operator.Problem(
        batch=1, heads=2, n_q=block_map.n_q, n_k=block_map.n_k, head_dim=64, block_q=32, block_k=16
    )
    width = block_map.indices.shape[3]
    bits, rest = problems.allocate((2, 37, 3), "uint32"), problems.allocate((2, 37), "float32")
    sizes = [np.int32(x) for x in (2, 37, 70, block_map.n_k, width)]
    args = pointer(block_map.indices), pointer(block_map.counts), operator.NULL, bits, rest, *sizes
    operator.run_kernel(DEVICE, problem, "sla2_row_bits", (10, 2), *args)
    words = bits.owner[..., None] >> torch.arange(32) & 1
    assert torch.equal(words.flatten(2)[..., :70].bool(), mask[0])
    left = 70 - mask[0].sum(-1)
    torch.testing.assert_close(rest.owner, torch.where(left == 0, 0.0, 1.0 / left))

    columns = transpose_map(DEVICE, problem, bits, width)
    expected = block_map.transposed()
    offsets = columns.offsets.owner
    assert torch.equal(offsets.diff(dim=1), expected.counts[0])
    assert (offsets[:, 0] == 0).all()
    for head in range(2):
        for column in range(70):
            rows = columns.rows.owner[head, offsets[head, column] : offsets[head, column + 1]]
            assert rows.tolist() == expected.indices[0, head, column, : len(rows)].tolist()


def test_problems_that_no_kernel_takes_are_refused():
    whole = {"batch": 1, "heads": 1, "n_q": 8, "n_k": 8, "head_dim": 64}
    for name, value in (
        ("head_dim", 192),
        ("n_q", 0),
        ("dtype", "float32"),
        ("block_q", 100),
        ("precision", "int4"),
    ):
        with pytest.raises(ValueError, match=name):
            operator.Problem(**{**whole, name: value})
