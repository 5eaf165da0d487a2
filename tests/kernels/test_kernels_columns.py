"""Columns that many rows select: how they are cut into slices, by the shapes alone, and dK and dV
summed over the slices, by every kernel that sums over columns.
"""

from dataclasses import replace

import pytest
import torch
from helpers import pooled_problems, problems
from sla2_core import BlockMap
from sla2_kernels import backward as operator_backward
from sla2_kernels.backward import backward, slice_plan, transpose_map
from sla2_kernels.emulator.emulate import ORDERS, lanes
from sla2_kernels.problem import Problem

from benchmarks.gpu_model import BACKWARD_SPARSITY, SHAPE, problem_of

SLOW = pytest.mark.slow
needs_hopper = pytest.mark.skipif(problems.DEVICE.arch != "sm_90a", reason="the GPU has no wgmma")


def sink(n_q, n_k, column=1, density=0.3, **options):
    """A case whose every row selects one block, `density` of the rows each of the others."""
    case = problems.make(n_q, n_k, density=density, **options)
    sizes = {name: getattr(case.block_map, name) for name in ("block_q", "block_k", "n_q", "n_k")}
    mask = case.block_map.mask()
    mask[..., column] = True
    return case._replace(block_map=BlockMap.from_mask(mask, **sizes))


@pytest.fixture
def cut(monkeypatch):
    """Columns of more than two rows are cut, whatever is selected in all."""
    monkeypatch.setattr(operator_backward, "LEAST_ROWS", 2)


@pytest.fixture
def columns(monkeypatch):
    """The maps by columns that a backward makes."""
    made, real = [], transpose_map
    note = lambda *args: made.append(real(*args)) or made[-1]  # noqa: E731
    monkeypatch.setattr(operator_backward, "transpose_map", note)
    return made


def slices_of(columns):
    """How many rows each slice adds up, by head: [[...], ...]."""
    lengths = []
    for counts, cuts in zip(columns.counts.owner.flatten(0, -2), columns.slice_offsets.owner):
        of_head = []
        for count, slices in zip(counts.tolist(), cuts.diff().tolist()):
            of_head += [count * (i + 1) // slices - count * i // slices for i in range(slices)]
        lengths.append(of_head)
    return lengths


def test_the_plan_has_room_for_every_map():
    torch.manual_seed(0)
    for t_m, t_n, width, pairs in ((256, 512, 15, 12), (591, 40, 4, 2), (300, 7, 3, 1)):
        p = Problem(batch=1, heads=pairs, n_q=128 * t_m, n_k=64 * t_n, head_dim=64)
        longest, slices = slice_plan(p, width)
        assert slices > 0
        for heat in range(20):  # from rows that choose anywhere to rows that choose alike
            order = torch.randn(t_m, t_n) + heat * torch.randn(t_n)
            counts = torch.bincount(order.topk(width).indices.flatten(), minlength=t_n)
            needed = sum(-(-c // longest) for c in counts.tolist() if c > longest)
            assert needed <= slices
        # The most that there can be: columns one row longer than what stays whole.
        assert t_m * width // (longest + 1) * 2 <= slices or slices == t_n * -(-t_m // longest)


def test_the_plan_of_the_paper_s_shape_and_of_others():
    topk = 1 - BACKWARD_SPARSITY
    p = problem_of("full", int(SHAPE["n"]), int(SHAPE["heads"]))
    assert slice_plan(p, round(topk * p.t_n)) == (76, 172)  # of 256 rows
    long = problem_of("full", 1_000_000, 40)
    assert slice_plan(long, round(topk * long.t_n))[1] == 0  # other columns take longer than a sink
    assert slice_plan(problem_of("full", 4096, 12), 64)[1] == 0  # no column has 33 rows


@pytest.mark.usefixtures("cut")
def test_columns_are_cut_evenly(columns):
    case = sink(210, 111, heads=2)
    p = case.problem
    bits = problems.allocate((p.pairs, p.t_m, 1), "uint32")
    place = torch.arange(p.t_n) // 2 + 16 * (torch.arange(p.t_n) % 2)
    bits.owner[..., 0] = (case.block_map.mask()[0].long() << place).sum(-1).int()
    made = transpose_map(problems.DEVICE, p, bits, case.map.width)
    counts = case.block_map.mask()[0].sum(1)
    expected = torch.where(counts > 2, -(-counts // 2), 0)
    assert torch.equal(made.slice_offsets.owner.diff(dim=1), expected.int())
    for head in range(p.pairs):
        used = int(expected[head].sum())
        of = torch.arange(p.t_n).repeat_interleave(expected[head]).int()
        assert torch.equal(made.slice_columns.owner[head, :used], of)
    assert all(set(lengths) <= {1, 2} for lengths in slices_of(made))


def gradients(case, kind):
    """dQ, dK, dV and d alpha or db of the kernels."""
    if kind != "pooled":
        return problems.run(case, gradients=True, linear=kind == "linear")[2]
    saved = pooled_problems.forward(case, save=True)
    made = backward(problems.DEVICE, case.problem, saved, problems.strided(case.grad))
    found = zip((made.d_q, made.d_k, made.d_v), (case.q, case.k, case.v))
    return [*(x.owner.view(like.shape) for x, like in found), made.d_alpha.owner]


def check(case, kind, columns, orders=ORDERS):
    """dK and dV within the tolerance of any backward and the same to the bit in every order, after
    slices of at most two rows.
    """
    kept = None
    for order in orders:
        with lanes(order, seed=3):
            found = gradients(case, kind)
        kept = kept or found
        assert all(map(torch.equal, kept, found)), order
    lengths = [length for of_head in slices_of(columns[-1]) for length in of_head]
    assert lengths
    assert max(lengths) <= 2
    if kind == "pooled":
        exact, plain = (
            pooled_problems.gradients(case, f, dtype)
            for f, dtype in (
                (pooled_problems.oracle, torch.float64),
                (pooled_problems.same_dtype, case.q.dtype),
            )
        )
    else:
        (_, exact), (_, plain) = (
            f(case, gradients=True, linear=kind == "linear")
            for f in (problems.oracle, problems.same_dtype)
        )
    for name, x, right, dense in zip(("dq", "dk", "dv"), kept, exact, plain):
        problems.assert_as_good(x, right, dense, 3.0, f"{name}, {kind}")


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("kind", ["linear", "pooled", pytest.param("sparse", marks=SLOW)])
def test_a_column_that_every_row_selects(kind, columns):
    check(sink(143, 75, lengths=(75, 20), heads=1), kind, columns)


@pytest.mark.usefixtures("cut")
def test_all_blocks_and_padding_blocks_that_rows_select(columns):
    case = problems.make(111, 60, lengths=(60, 17), density=1.0, heads=1)
    check(case, "linear", columns, ["forward"])


@pytest.mark.usefixtures("cut")
@needs_hopper
@pytest.mark.parametrize("kind", ["linear", pytest.param("pooled", marks=SLOW)])
@pytest.mark.parametrize("d", [64, pytest.param(128, marks=SLOW)])
def test_on_hopper(kind, d, columns, monkeypatch):
    from sla2_kernels import hopper

    monkeypatch.setattr(hopper, "MULTIPROCESSORS", 3)
    case = sink(420, 200, d=d, blocks=(128, 64), lengths=(200, 130), heads=1)
    check(case, kind, columns, ORDERS if kind == "linear" else ["random"])


@pytest.mark.slow
@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("precision", ["int8", "int8_int8"])
def test_the_matched_backward_of_low_bit(precision):
    problems.skip_unless_supported(precision)
    case = sink(200, 100, d=64, blocks=(32, 32), lengths=(100, 63), heads=1, precision=precision)
    _, expected = problems.low_bit_oracle(case, "matched")
    _, exact = problems.oracle(case, gradients=True)
    _, plain = problems.same_dtype(case, gradients=True)
    _, _, found = problems.run(case, gradients=True, qat_backward="matched")
    for name, x, right, dense, true in zip(("dq", "dk", "dv"), found, expected, plain, exact):
        allowed = right.double() + (dense.double() - true)
        problems.assert_as_good(x, right.double(), allowed, 3.0, name)


def test_slices_change_no_more_than_the_order_of_sums(columns, monkeypatch):
    case = sink(143, 75, heads=1, density=0.7)  # the linear branch has a part of cut columns
    whole = gradients(case, "linear")
    assert columns[-1].slices == 0
    monkeypatch.setattr(operator_backward, "LEAST_ROWS", 2)
    sliced = gradients(case, "linear")
    assert columns[-1].slices > 0
    assert torch.equal(whole[0], sliced[0])
    for x, y in zip(whole[1:3], sliced[1:3]):
        torch.testing.assert_close(x, y, atol=1e-3, rtol=2**-7)


def test_nan_in_a_slice_is_not_hidden(cut):
    case = sink(143, 75, heads=2)
    case.grad[0, 1, 100, 3] = torch.nan
    found = gradients(case, "linear")
    assert all(torch.isnan(x[0, 1]).any() for x in found[1:3])
    assert all(torch.isfinite(x[0, 0]).all() for x in found[1:3])


# sm_86, sm_89 and sm_120 have two warps for the same rows or keys at head dimension 128.
@pytest.mark.parametrize(
    ("blocks", "kind"),
    [
        ((32, 32), "linear"),
        *(
            pytest.param(blocks, kind, marks=SLOW)
            for blocks, kind in (
                ((32, 32), "pooled"),
                ((32, 16), "sparse"),
                ((16, 32), "linear"),
                ((64, 32), "pooled"),
                ((128, 64), "linear"),
            )
        ),
    ],
)
def test_two_warps_of_the_same_rows(blocks, kind, columns, cut, monkeypatch):
    if not problems.on_gpu():
        monkeypatch.setattr(problems, "DEVICE", replace(problems.DEVICE, arch="sm_89", wgmma=False))
    rows = 4 * blocks[0] - 5
    case = sink(rows, 3 * blocks[1] - 4, d=100, blocks=blocks, heads=1)
    check(case, kind, columns, ORDERS if blocks == (32, 32) else ["random"])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "int8_int8", "fp8"])
def test_two_warps_of_the_same_rows_matched(precision, monkeypatch):
    if problems.on_gpu():
        pytest.skip("on the emulator")
    monkeypatch.setattr(problems, "DEVICE", replace(problems.DEVICE, arch="sm_89", wgmma=False))
    case = problems.make(111, 100, d=128, blocks=(64, 32), lengths=(100, 63), precision=precision)
    _, expected = problems.low_bit_oracle(case, "matched")
    _, exact = problems.oracle(case, gradients=True)
    _, plain = problems.same_dtype(case, gradients=True)
    for order in ORDERS:
        with lanes(order, seed=3):
            _, _, found = problems.run(case, gradients=True, qat_backward="matched")
        for name, x, right, dense, true in zip(("dq", "dk", "dv"), found, expected, plain, exact):
            allowed = right.double() + (dense.double() - true)
            problems.assert_as_good(x, right.double(), allowed, 3.0, f"{name}, {order}")
