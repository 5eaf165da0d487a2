"""Routing kernels on the emulator: scores, top-k with ties and NaN, the map by bits and by columns,
block means.
"""

import numpy as np
import pytest
import torch
from helpers import problems
from sla2_core import BlockMap, SLA2Config
from sla2_core.backends.pooling import pool, smooth_keys
from sla2_core.block_map import Rows
from sla2_core.registry import MIXINGS
from sla2_core.routing import top_k_map
from sla2_kernels import forward as operator
from sla2_kernels import prepare
from sla2_kernels.backward import transpose_map
from sla2_kernels.emulator.emulate import ORDERS, lanes

DEVICE, pointer = problems.DEVICE, problems.pointer


@pytest.mark.parametrize("weight_heads", [1, 2])
def test_routing_equals_the_router(weight_heads):
    case = problems.make(111, 600, d=48, lengths=(600, 63))
    lengths = case.lengths.long()
    inputs = [problems.strided(x) for x in (case.q, case.k, case.v)]
    made = prepare.pool(DEVICE, case.problem, *inputs, pooled=True)
    weights = [torch.randn(weight_heads, 48, 48) * 0.3 for _ in range(2)]
    topk = 0.13
    found, _, scores = operator.route(
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
    sizes = [np.int32(x) for x in (1, t_m, t_n, 16 * t_n, 0, t_m, t_n, width, 1, 1)]
    none = [operator.NULL] * 3
    args = pointer(scores), *none, indices, counts, *none, *sizes, np.float64(topk)
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


def plain_route(scores, lengths, topk: float, routable: int, block_k: int):
    """(indices, counts) of numpy scores (B, H, T_m, T_n) by sorting: what the kernel must give.

    Padding is behind the blocks that compete, as it is where text comes last.
    """
    t_n = scores.shape[-1]
    count = max(1, round(topk * routable)) if routable else 0
    best = np.argsort(-scores[..., :routable], axis=-1, kind="stable")[..., :count]
    text = np.broadcast_to(np.arange(routable, t_n), (*scores.shape[:3], t_n - routable))
    text = np.where(text * block_k < lengths[:, None, None, None], text, -1)
    indices = np.concatenate([np.sort(best, axis=-1), text], axis=-1)
    return indices, (indices >= 0).sum(-1)


def run_route(problem, pooled, weights, topk, routable):
    """Indices, counts and scores of operator.route as numpy arrays."""
    pointers = (pointer(x) for x in (*pooled, *weights))
    found, _, scores = operator.route(DEVICE, problem, *pointers, 1, topk, routable)
    return [x.owner.numpy() for x in (found.indices, found.counts, scores)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("n_q", "n_k", "routable", "lengths"),
    [
        (111, 1129, 63, None),
        (111, 1129, 63, (1129, 1010)),
        (33, 600, 0, None),
        (33, 600, 0, (97, 1)),
        (65, 530, 1, (530, 17)),
        (65, 529, 33, (528, 529)),
        (31, 1040, 64, (1040, 1025)),
        (31, 1040, 65, None),
        (1, 9, 0, None),
    ],
)
def test_blocks_from_routable_on_are_forced_and_the_others_compete(
    order, n_q, n_k, routable, lengths
):
    torch.manual_seed(n_k + routable)
    batch, topk = 2, 0.13
    item_lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    sizes = {"batch": batch, "heads": 2, "n_q": n_q, "n_k": n_k, "block_q": 32, "block_k": 16}
    problem = operator.Problem(**sizes, head_dim=64, kv_lengths=pointer(item_lengths))
    # Small integers: scores are exact, and many of them equal.
    pooled = [torch.randint(-1, 2, (4, rows, 64)).float() for rows in (problem.t_m, problem.t_n)]
    with lanes(order, seed=5):
        indices, counts, scores = run_route(problem, pooled, (None, None), topk, routable)
    valid = np.array(lengths or (n_k, n_k))
    q, k = (x.view(batch, 2, -1, 64).double() for x in pooled)
    exact = (q @ k.transpose(-1, -2)).numpy() / 8
    hidden = np.arange(problem.t_n) * 16 >= valid[:, None]
    np.testing.assert_array_equal(scores, np.where(hidden[:, None, None], -np.inf, exact))
    expected = plain_route(scores, valid, topk, routable, 16)
    np.testing.assert_array_equal(indices, expected[0])
    np.testing.assert_array_equal(counts, expected[1])


@pytest.mark.parametrize("lengths", [None, (600, 63)])
def test_all_blocks_compete_by_default(lengths):
    case = problems.make(111, 600, lengths=lengths)
    torch.manual_seed(2)
    pooled = [torch.randn(case.problem.pairs, rows, 64) for rows in (4, 38)]
    weights = [torch.randn(1, 64, 64) for _ in range(2)]
    default, whole = (run_route(case.problem, pooled, weights, 0.13, n) for n in (None, 38))
    for a, b in zip(default, whole):
        np.testing.assert_array_equal(a, b)


def test_without_weights_the_means_are_not_projected():
    case = problems.make(111, 600, lengths=(600, 63))
    torch.manual_seed(3)
    pooled = [torch.randn(case.problem.pairs, rows, 64) for rows in (4, 38)]
    identity = torch.eye(64)[None]
    without, projected = (
        run_route(case.problem, pooled, w, 0.2, 21) for w in ((None, None), (identity, identity))
    )
    for a, b in zip(without, projected):
        np.testing.assert_array_equal(a, b)


def made_alpha(kind: str) -> tuple[object, operator.AlphaRule]:
    """A mixing of two heads with drawn parameters, and the kernel's rule for it."""
    config = SLA2Config(head_dim=64, num_heads=2, topk=0.13, alpha=kind, alpha_knots=5)
    mixing = MIXINGS.make(config)
    for parameter in mixing.parameters():
        torch.nn.init.normal_(parameter)
    offset, slope = (None if x is None else x.detach() for x in mixing.rule())
    if offset is None:
        return mixing, operator.AlphaRule()
    pointers = pointer(offset), pointer(slope)
    return mixing, operator.AlphaRule(*pointers, offset.shape[0], offset[0].numel())


@pytest.mark.parametrize("kind", ["mass", "position", "one"])
@pytest.mark.parametrize(
    ("n_q", "n_k", "routable", "lengths"),
    [
        (1060, 1129, 63, (1129, 1010)),
        (65, 530, None, (530, 17)),
        (33, 600, 0, None),
        (31, 9, 1, None),
    ],
)
def test_alpha_and_the_bits_are_made_with_the_map(kind, n_q, n_k, routable, lengths, monkeypatch):
    torch.manual_seed(n_k)
    monkeypatch.setattr(operator, "SCORE_BYTES", 1 << 15)  # one to five parts of 32 query blocks
    item_lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    sizes = {"batch": 2, "heads": 2, "n_q": n_q, "n_k": n_k, "block_q": 32, "block_k": 16}
    problem = operator.Problem(**sizes, head_dim=64, kv_lengths=pointer(item_lengths))
    pooled = [torch.randn(4, rows, 64) for rows in (problem.t_m, problem.t_n)]
    if lengths is None:
        pooled[0][1, 0] = torch.nan
    mixing, rule = made_alpha(kind)
    call = DEVICE, problem, *map(pointer, pooled), operator.NULL, operator.NULL, 1, 0.13, routable
    whole, _, scores = operator.route(*call)
    found, alpha, none = operator.route(*call, keep_scores=False, alpha=rule)
    assert none is operator.NULL
    for name in ("indices", "counts"):
        assert torch.equal(getattr(found, name).owner, getattr(whole, name).owner)
    for made, expected in zip(
        (found.bits, found.rest_inverse), operator.row_bits(DEVICE, problem, whole)
    ):
        assert torch.equal(made.owner, expected.owner)
    rows = Rows(whole.indices.owner, whole.counts.owner)
    mask = BlockMap._trusted(rows, block_q=32, block_k=16, n_q=n_q, n_k=n_k).mask()
    expected = mixing.alpha(scores.owner, mask).detach().expand(2, 2, problem.t_m)
    torch.testing.assert_close(alpha.values.owner, expected, atol=1e-5, rtol=1e-5, equal_nan=True)
    assert alpha.values.owner.isnan().any() == (lengths is None and kind == "mass")


@pytest.mark.parametrize("routable", [-1, 39])
def test_routable_blocks_that_are_not_there_are_refused(routable):
    case = problems.make(111, 600)
    pooled = [torch.zeros(2, rows, 64) for rows in (4, 38)]
    with pytest.raises(ValueError, match=f"routable: expected 0 to 38 key blocks, got {routable}"):
        run_route(case.problem, pooled, (None, None), 0.2, routable)


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
    place = torch.arange(32) // 2 + 16 * (torch.arange(32) % 2)  # of each block's bit in its word
    words = bits.owner[..., None] >> place & 1
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
