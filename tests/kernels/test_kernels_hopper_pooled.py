"""The pooled complement on Hopper against the fp64 reference and the `mma.sync` kernel, in three
orders of threads and of landing copies.
"""

from dataclasses import replace

import pytest
import torch
from helpers import pooled_problems, problems
from sla2_core.backends.pooling import smooth_keys
from sla2_kernels import hopper, launch
from sla2_kernels.emulator.emulate import ORDERS, lanes

BLOCKS, SLOW = (128, 64), pytest.mark.slow

pytestmark = pytest.mark.skipif(problems.DEVICE.arch != "sm_90a", reason="the GPU has no wgmma")


@pytest.fixture(autouse=True)
def few_processors(monkeypatch):
    """Blocks of threads that walk over several query blocks."""
    monkeypatch.setattr(hopper, "MULTIPROCESSORS", 3)


def make(n_q, n_k, **options):
    return problems.make(n_q, n_k, **{"blocks": BLOCKS, "heads": 1, **options})


def shift_of(case):
    """What smoothing K takes from every score of a row."""
    k = case.k.double()
    smoothed = smooth_keys(k, None if case.lengths is None else case.lengths.long())
    return (case.q.double() * (k - smoothed)[:, :, :1]).sum(-1) * case.q.shape[-1] ** -0.5


def check(case, found, shift=0.0):
    out, lse = found.out.owner.view(case.q.shape), found.lse.owner
    exact, expected = pooled_problems.oracle(case)
    problems.assert_as_good(out, exact, pooled_problems.same_dtype(case), 2.0)
    torch.testing.assert_close(lse.double(), expected - shift, atol=0.02, rtol=0.01)


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that ran."""
    names, real = [], launch.load

    def note(spec, *more):
        names.append(spec.entry)
        return real(spec, *more)

    monkeypatch.setattr(launch, "load", note)
    return names


def same(found, kept):
    return all(torch.equal(getattr(found, x).owner, getattr(kept, x).owner) for x in ("out", "lse"))


def test_every_order_gives_the_same():
    case, kept = make(200, 333, lengths=(333, 63)), None
    for x in (case.k, case.v):  # padding may hold anything
        x[1, :, 63:] = torch.nan
    for order in ORDERS:
        with lanes(order, seed=3):
            found = pooled_problems.forward(case)
        kept = kept or found
        assert same(found, kept), order
    check(case, kept, shift_of(case))


@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_rows_of_no_some_and_all_blocks(density):
    case = make(130, 200, density=density)
    with lanes("random", seed=7):
        check(case, pooled_problems.forward(case), shift_of(case))


@pytest.mark.parametrize(
    ("d", "dtype"),
    [
        (64, "bfloat16"),
        *(pytest.param(*x, marks=SLOW) for x in ((48, "float16"), (80, "bfloat16"))),
        *(pytest.param(128, x, marks=SLOW) for x in ("float16", "bfloat16")),
    ],
)
def test_saved_as_it_is_and_by_mma_sync(d, dtype, launched, monkeypatch):
    """All three have the same result; the backward gets rows of what the tiles hold."""
    case = make(150, 270, d=d, dtype=dtype, lengths=(270, 129))
    plain = pooled_problems.forward(case)
    assert launched == ["sla2_copy_columns"] * (0 if d in (64, 128) else 3) + [
        "sla2_pool",
        "sla2_key_mean",
        "sla2_row_bits",
        "sla2_sm90_pooled_fwd",
        *(["sla2_copy_columns"] if d not in (64, 128) else []),
    ]
    assert not plain.pooled.k.address
    saved = pooled_problems.forward(case, save=True)
    rough = pooled_problems.forward(case, smooth_k=False)
    with monkeypatch.context() as by:
        by.setattr(problems, "DEVICE", replace(problems.DEVICE, wgmma=False))
        del launched[:]
        right = pooled_problems.forward(case, save=True)
        assert "sla2_pooled_fwd" in launched
    shift = shift_of(case)
    for found, less in ((plain, shift), (saved, shift), (rough, 0.0), (right, shift)):
        check(case, found, less)
        out, expected = (x.out.owner.flatten() for x in (found, right))
        torch.testing.assert_close(out, expected, atol=0.02, rtol=0.02)
    p = case.problem
    for rows, tiles, other in (
        (saved.pooled.k, saved.made.key_mean_tiles, right.pooled.k),
        (saved.pooled.v, saved.made.value_mean_tiles, right.pooled.v),
    ):
        assert torch.equal(rows.owner, other.owner)
        tile = tiles.owner.view(p.pairs, p.width // 64, 64, 8, 8)  # panels, rows, chunks
        row = torch.arange(64)[:, None]
        chunks = torch.take_along_dim(tile, (torch.arange(8) ^ row % 8)[None, None, :, :, None], 3)
        found = chunks.transpose(1, 2).reshape(p.pairs, 64, p.width)
        assert torch.equal(found[:, : p.t_n], rows.owner.view(p.pairs, p.t_n, p.width))
    assert (found[:, p.t_n :] == 0).all()


@pytest.mark.parametrize(
    ("lengths", "d"),
    [
        (None, 64),
        pytest.param((4485, 4100), 64, marks=SLOW),
        pytest.param((4200, 130), 128, marks=SLOW),
    ],
)
def test_several_tiles_of_pooled_keys(lengths, d):
    """71 blocks: the second tile ends inside a word of the map."""
    case = make(130, 70 * 64 + 5, d=d, lengths=lengths, density=0.1)
    with lanes("random", seed=9):
        check(case, pooled_problems.forward(case), shift_of(case))


def test_one_bias_for_all_and_a_large_one():
    case = make(130, 200, heads=2)
    for bias in (torch.full((1, 1, 1), 0.7), torch.full((1, 2, 1), 40.0)):
        out = pooled_problems.forward(case, bias=bias).out.owner.view(case.q.shape)
        exact, _ = pooled_problems.oracle(case, bias=bias)
        problems.assert_as_good(out, exact, pooled_problems.same_dtype(case, bias=bias), 2.0)


def test_nan_is_not_hidden():
    case = make(130, 200, heads=2)
    case.v[0, 1, 40, 3] = torch.nan  # in a selected or a pooled key of every row
    out = pooled_problems.forward(case).out.owner.view(case.q.shape)
    assert torch.isnan(out[0, 1, :, 3]).all()
    assert torch.isfinite(out[0, 0]).all()
    case.q[0, 0, 129] = torch.nan
    out = pooled_problems.forward(case).out.owner.view(case.q.shape)
    assert torch.isnan(out[0, 0, 129]).all()
    assert torch.isfinite(out[0, 0, :129]).all()


def check_low(case, found):
    """By how much O is off the definition, against what the format costs; O."""
    out, lse = found.out.owner.view(case.q.shape), found.lse.owner
    # K as the kernels keep it: smoothed, in 16 bit.
    keys = smooth_keys(case.k, None if case.lengths is None else case.lengths.long())
    right, expected = pooled_problems.oracle(
        case, precision=case.problem.precision, leaves=(case.q, keys, case.v)
    )
    error, rounding = out.double() - right, right - pooled_problems.oracle(case)[0]
    assert error.square().mean().sqrt() < 0.75 * rounding.square().mean().sqrt()
    torch.testing.assert_close(lse.double(), expected, atol=0.02, rtol=0.01)
    return out


LOW = [("int8", 64), *(pytest.param(x, 128, marks=SLOW) for x in ("int8", "int8_int8", "fp8"))]


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize(("precision", "d"), LOW)
def test_low_bit_rounds_the_selected_part_alone(precision, d, save, launched):
    """In three orders."""
    case = make(333, 333, d=d, lengths=(333, 70), precision=precision)
    for x in (case.k, case.v):
        x[1, :, 70:] = torch.nan
    kept = None
    for order in ORDERS:
        with lanes(order, seed=3):
            found = pooled_problems.forward(case, save=save)
        kept = kept or found
        assert same(found, kept), order
    assert set(launched) & {"sla2_pooled_fwd_low", "sla2_sm90_pooled_fwd_low"} == {
        "sla2_sm90_pooled_fwd_low"
    }
    for x in (case.k, case.v):
        x[1, :, 70:] = 0.0
    rounded = check_low(case, kept)
    # A row that selects nothing has no rounding but 16 bit's.
    full, _ = pooled_problems.oracle(case)
    alone, plain = (
        x[0, :, :128].double() - full[0, :, :128]
        for x in (rounded, pooled_problems.same_dtype(case))
    )
    assert alone.abs().max() <= 2 * plain.abs().max() + 1e-3 * full.abs().max()


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_low_bit_rows_of_no_and_all_blocks(density):
    case = make(130, 200, density=density, precision="int8")
    with lanes("random", seed=7):
        found = pooled_problems.forward(case)
    if density:
        check_low(case, found)
    else:
        check(case, found, shift_of(case))


def test_the_blocks_and_the_switch_decide():
    device = problems.DEVICE
    assert hopper.takes(device, make(63, 63, precision="int8").problem)
    assert not hopper.takes(device, make(63, 63, blocks=(64, 64)).problem)
    assert not hopper.takes(replace(device, wgmma=False), make(63, 63).problem)
