"""The kernels for Hopper against fp64 formulas at odd lengths and against the `mma.sync` kernels,
in three orders of threads and of landing copies; what their code is made of.
"""

from dataclasses import replace

import pytest
import torch
from helpers import problems
from sla2_kernels import forward as operator
from sla2_kernels import hopper, launch, prepare
from sla2_kernels.compile import compile_kernel
from sla2_kernels.emulator.emulate import ORDERS, lanes
from sla2_kernels.gate import gate, gate_code
from sla2_kernels.kernels import Geometry, all_specs, spec_of
from sla2_kernels.problem import NULL, ONE, Alpha, Device, Strided
from sla2_kernels.sass import code_of

BLOCKS, SLOW = (128, 64), pytest.mark.slow

needs_hopper = pytest.mark.skipif(problems.DEVICE.arch != "sm_90a", reason="the GPU has no wgmma")


def make(n_q, n_k, **options):
    """A case, and states of the linear branch drawn at random: H, Z and alpha."""
    case = problems.make(n_q, n_k, blocks=BLOCKS, **options)
    p = case.problem
    state = torch.randn(p.pairs, p.t_m, p.width, p.width).to(case.q.dtype)
    return case, (state, torch.rand(p.pairs, p.t_m, p.width) + 0.5)


def run(case, states=None, *, low=None, save=False, blocks=3):
    """O, L and, with `save`, O_s of the kernels of csrc/sm90, as (B, H, n_q, ...)."""
    p, device = case.problem, problems.DEVICE
    q = prepare.widened(device, p, problems.strided(case.q), p.n_q)
    if low:
        k_bytes, v_bytes, *scales = map(problems.pointer, low)
        low = hopper.LowBit(*scales)
        tiles = hopper.pack_low(device, p, k_bytes, v_bytes)
    else:
        k, v = (prepare.widened(device, p, problems.strided(x), p.n_k) for x in (case.k, case.v))
        tiles = hopper.pack(device, p, k, v)
    rows = (p.batch, p.heads, p.n_q, p.width)
    out, sparse = (problems.allocate(rows, p.dtype) for _ in range(2))
    lse = problems.allocate(rows[:3], "float32")
    hopper.sparse_forward(
        device,
        p,
        q,
        *tiles,
        case.map,
        *((problems.pointer(x) for x in states) if states else (NULL, NULL)),
        Alpha.of(problems.pointer(case.alpha), tuple(case.alpha.shape)) if states else ONE,
        Strided.of(out, p.heads, p.n_q, p.width),
        sparse if save else NULL,
        lse,
        low=low,
        blocks=blocks,
    )
    return [x.owner for x in ((out, lse, sparse) if save else (out, lse))]


def lengths_of(case):
    p = case.problem
    return case.lengths if case.lengths is not None else torch.full((p.batch,), p.n_k)


def alpha_of(case):
    """The weight of O_s in every row, fp64 (B, H, n_q, 1)."""
    mask = case.block_map.mask()
    valid = torch.arange(mask.shape[3]) * 64 < lengths_of(case)[:, None, None, None]
    some, rest = (mask & valid).any(-1), (~mask & valid).any(-1)
    alpha = torch.where(rest, torch.where(some, case.alpha.double(), 0.0), 1.0)
    return alpha[:, :, torch.arange(case.problem.n_q) // 128, None]


def formulas(case, states=None):
    """The same in fp64."""
    p = case.problem
    mask = case.block_map.mask()
    length = lengths_of(case)
    counts = torch.arange(p.n_k) < length[:, None, None, None]
    selected = mask.repeat_interleave(128, 2)[:, :, : p.n_q].repeat_interleave(64, 3)[..., : p.n_k]
    selected = selected & counts
    q, k, v = (x.double() for x in (case.q, case.k, case.v))
    k, v = (x.masked_fill(~counts.transpose(2, 3), 0.0) for x in (k, v))
    scores = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).masked_fill(~selected, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().nan_to_num(0.0)
    sparse = torch.nn.functional.pad(weights @ v, (0, p.width - q.shape[3]))
    if not states:
        return sparse, lse, sparse
    state, norm = (x.double().view(p.batch, p.heads, *x.shape[1:]) for x in states)
    phi = torch.nn.functional.pad(q.softmax(-1), (0, p.width - q.shape[3]))
    rows = torch.arange(p.n_q) // 128
    above = torch.einsum("bhnc,bhncd->bhnd", phi, state[:, :, rows])
    linear = above / torch.einsum("bhnc,bhnc->bhn", phi, norm[:, :, rows])[..., None]
    alpha = alpha_of(case)
    return alpha * sparse + (1 - alpha) * linear, lse, sparse


def draw_low(case):
    """8-bit K and V^T and the scales, as the prologue lays them out, the case whose Q rounds to the
    8-bit values drawn, and the case of the values that all of them stand for.
    """
    p = case.problem
    qk = torch.float8_e4m3fn if p.precision == "fp8" else torch.int8
    pv = torch.int8 if p.precision == "int8_int8" else torch.float8_e4m3fn

    def bytes_of(x, dtype):
        x = (x * 40).round().clamp(-127, 127) if dtype == torch.int8 else x * 40
        return x.to(dtype)

    q = bytes_of(torch.randn(p.batch, p.heads, p.n_q, p.width), qk)
    k, v = (torch.randn(p.batch, p.heads, p.t_n * 64, p.width) for _ in range(2))
    padding = torch.arange(p.t_n * 64)[:, None] >= lengths_of(case)[:, None, None, None]
    k, v = bytes_of(k.masked_fill(padding, 0), qk), bytes_of(v.masked_fill(padding, 0), pv)
    q_scale, k_scale, v_scale = (
        torch.rand(p.batch, p.heads, n) * 0.01 + 0.02 for n in (p.t_m, p.t_n, p.width)
    )
    place = torch.arange(64)
    key = place // 16 * 16 + place % 16 // 4 * 2 + place % 2 + place % 4 // 2 * 8
    blocks = v.view(torch.uint8).view(p.batch, p.heads, p.t_n, 64, p.width)
    v_bytes = blocks[..., key, :].transpose(3, 4).contiguous()
    k_rows, v_rows = k[:, :, : p.n_k], v[:, :, : p.n_k]
    low = k_rows.contiguous().view(torch.uint8), v_bytes
    q = q.double() * q_scale.double().repeat_interleave(128, 2)[:, :, : p.n_q, None]
    exact = case._replace(
        q=q,
        k=k_rows.double() * k_scale.double().repeat_interleave(64, 2)[:, :, : p.n_k, None],
        v=v_rows.double() * v_scale.double()[:, :, None],
    )
    return (*low, q_scale, k_scale, v_scale), case._replace(q=q.to(case.q.dtype)), exact


def check(found, expected, atol_out=0.01):
    for x, exact in zip(found, expected):
        atol = 1e-4 if x.dtype == torch.float32 else atol_out
        torch.testing.assert_close(x.double(), exact, atol=atol, rtol=atol, check_stride=False)


@needs_hopper
def test_every_order_gives_the_same():
    case, states = make(333, 200, lengths=(200, 63))
    for x in (case.k, case.v):  # padding may hold anything
        x[1, :, 63:] = torch.nan
    expected, kept = formulas(case, states), None
    for order in ORDERS:
        with lanes(order, seed=3):
            found = run(case, states, save=True)
        check(found, expected)
        kept = kept or found
        for x, y in zip(kept, found):
            assert torch.equal(x.view(torch.uint8), y.view(torch.uint8)), order
    assert (kept[1] == -torch.inf).any()


@needs_hopper
@pytest.mark.parametrize("density", [0.0, 0.7, 1.0])
def test_rows_of_no_some_and_all_blocks(density):
    case, states = make(130, 555, density=density, heads=1)
    with lanes("random", seed=7):
        check(run(case, states), formulas(case, states))
        check(run(case), formulas(case))


@needs_hopper
@pytest.mark.slow
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("precision", ["int8", "int8_int8", "fp8"])
def test_low_bit(precision, d):
    case, states = make(333, 200, d=d, lengths=(200, 63), precision=precision)
    low, case, exact = draw_low(case)
    phi = formulas(case, states)[0] - alpha_of(case) * formulas(case)[0]
    sparse, lse, _ = formulas(exact)
    expected, kept = (alpha_of(case) * sparse + phi, lse, sparse), None
    for order in ORDERS:
        with lanes(order, seed=3):
            found = run(case, states, low=low, save=True)
        check(found, expected, 0.03)
        kept = kept or found
        for x, y in zip(kept, found):
            assert torch.equal(x.view(torch.uint8), y.view(torch.uint8)), order
    with lanes("random", seed=4):
        check(run(case, low=low), (sparse, lse), 0.03)


@needs_hopper
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("d", [48, 80, 128])
def test_head_dimensions(d, dtype):
    case, states = make(200, 333, d=d, dtype=dtype, lengths=(333, 129))
    state, norm = states
    state[..., d:, :], state[..., :, d:], norm[..., d:] = 0.0, 0.0, 0.0  # as padding leaves them
    with lanes("random", seed=5):
        check(run(case, states, save=True), formulas(case, states))


@needs_hopper
@pytest.mark.slow
@pytest.mark.parametrize(
    ("d", "precision"), [(64, "full"), (128, "full"), (64, "int8"), (128, "fp8")]
)
def test_the_results_are_those_of_the_mma_sync_kernel(d, precision):
    """Behind the real passes over Q, K and V."""
    case = problems.make(333, 200, d=d, blocks=BLOCKS, lengths=(200, 63), precision=precision)
    p, device = case.problem, problems.DEVICE
    inputs = (problems.strided(x) for x in (case.q, case.k, case.v))
    made = prepare.keys(device, p, prepare.pool(device, p, *inputs), save=True)
    linear = operator.linear_sums(device, p, made, case.map)
    alpha = Alpha.of(problems.pointer(case.alpha), tuple(case.alpha.shape))
    by_mma_sync = replace(device, wgmma=False)
    plain, lse, sparse = operator.sparse_forward(
        by_mma_sync, p, made, case.map, linear, alpha, True
    )
    smooth = case._replace(k=made.k.owner.view(case.k.shape))
    names = ("k_bytes", "v_bytes", "q_scale", "k_scale", "v_scale")
    low = tuple(getattr(made, name).owner for name in names) if p.low else None
    found = run(smooth, (linear.state.owner, linear.norm.owner), low=low, save=True)
    for x, y in zip(found, (plain.owner, lse.owner, sparse.owner)):
        torch.testing.assert_close(x.flatten(), y.flatten(), atol=0.02, rtol=0.02)
    if not p.low:
        problems.assert_as_good(found[0], problems.oracle(case), problems.same_dtype(case), 2.0)


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that ran."""
    names, real = set(), launch.load

    def note(spec, *more):
        names.add(spec.entry)
        return real(spec, *more)

    monkeypatch.setattr(launch, "load", note)
    return names


# What each of both ways has a kernel for.
PARTS = (
    "sparse_fwd",
    "sparse_fwd_low",
    "pooled_fwd",
    "masked_sum",
    "masked_sum_low",
    "sparse_bwd_q",
    "sparse_bwd_kv",
)
BOTH = {f"sla2_{where}{part}" for where in ("", "sm90_") for part in PARTS}


@needs_hopper
@pytest.mark.parametrize(
    ("d", "lengths", "linear"),
    [
        (64, (200, 63), True),
        pytest.param(128, None, True, marks=pytest.mark.slow),
        pytest.param(80, (200, 129), False, marks=pytest.mark.slow),
    ],
)
def test_the_whole_operator_takes_them(d, lengths, linear, launched, monkeypatch):
    """Forward and backward, blocks of threads that walk over several tiles, in every order."""
    monkeypatch.setattr(hopper, "MULTIPROCESSORS", 3)
    case = problems.make(333, 200, d=d, blocks=BLOCKS, lengths=lengths, heads=1)
    options, kept = dict(linear=linear, smooth_k=linear, gradients=True), None
    for order in ORDERS:
        with lanes(order, seed=2):
            out, lse, grads = problems.run(case, **options)
        kept = kept or (out, lse, *grads)
        assert all(map(torch.equal, kept, (out, lse, *grads))), order
    sums = {"sla2_sm90_masked_sum"} if linear else set()
    assert launched & BOTH == sums | {f"sla2_sm90_sparse_{x}" for x in ("fwd", "bwd_q", "bwd_kv")}
    (exact, exact_grads), (plain, plain_grads) = (
        f(case, **options) for f in (problems.oracle, problems.same_dtype)
    )
    problems.assert_as_good(out, exact, plain, 2.0)
    for x, right, dense in zip(grads, exact_grads, plain_grads):
        problems.assert_as_good(x, right, dense, 3.0)


@needs_hopper
@pytest.mark.parametrize(
    ("precision", "d"), [("int8", 64), pytest.param("fp8", 128, marks=pytest.mark.slow)]
)
def test_the_whole_operator_takes_them_in_low_bit(precision, d, launched):
    case = problems.make(
        333, 200, d=d, blocks=BLOCKS, lengths=(200, 63), heads=1, precision=precision
    )
    out, _ = problems.run(case)
    assert launched & BOTH == {"sla2_sm90_sparse_fwd_low", "sla2_sm90_masked_sum_low"}
    expected, full = problems.low_bit_oracle(case)[0].double(), problems.oracle(case)
    rounding = (expected - full).square().mean().sqrt()
    assert (out.double() - expected).square().mean().sqrt() < 0.75 * rounding


@needs_hopper
def test_other_blocks_and_the_switch_take_mma_sync(monkeypatch, launched):
    problems.run(problems.make(63, 63, heads=1), gradients=True)
    parts = {"sparse_fwd", "masked_sum", "sparse_bwd_q", "sparse_bwd_kv"}
    assert launched & BOTH == {f"sla2_{x}" for x in parts}
    monkeypatch.setenv("SLA2_WGMMA", "0")
    assert not Device(allocate=problems.allocate).wgmma
    monkeypatch.setenv("SLA2_WGMMA", "no")
    with pytest.raises(RuntimeError, match=r"^SLA2_WGMMA: expected 0 or 1, got 'no'$"):
        Device(allocate=problems.allocate)
    with pytest.raises(ValueError, match="expected sm_90a and blocks of 128 and 64, got sm_90a an"):
        spec_of("sla2_sm90_pack", "sm_90a", Geometry(head_dim=64, block_q=64))


@needs_hopper
@pytest.mark.parametrize(
    ("precision", "d"),
    [("full", 64), ("int8", 64), *(pytest.param(p, 128, marks=SLOW) for p in ("full", "fp8"))],
)
def test_keys_writes_the_tiles_that_pack_does(precision, d):
    case = problems.make(130, 200, d=d, blocks=BLOCKS, lengths=(200, 63), precision=precision)
    p, device = case.problem, problems.DEVICE
    inputs = (problems.strided(x) for x in (case.q, case.k, case.v))
    first = prepare.pool(device, p, *inputs)
    made = prepare.keys(device, p, first, linear=False, tiles=True)
    if p.low:
        rows = prepare.keys(device, p, first, linear=False)
        expected = hopper.pack_low(device, p, rows.k_bytes, rows.v_bytes)
    else:
        expected = hopper.pack(device, p, made.k, made.v, made.mean)
    for tile, right in zip((made.k_tiles, made.v_tiles), expected):
        found, right = (x.owner.view(torch.uint8).flatten() for x in (tile, right))
        assert torch.equal(found, right)


@needs_hopper
@pytest.mark.parametrize(
    ("rows", "depth", "d"), [(300, 200, 64), pytest.param(70, 333, 128, marks=pytest.mark.slow)]
)
def test_masked_sum(rows, depth, d):
    p = problems.make(130, 130, d=d, blocks=BLOCKS, heads=2).problem
    mask = torch.rand(2, rows, depth) < 0.3
    x = torch.randn(2, depth, d * (d + 1)).to(torch.bfloat16)
    scale = torch.rand(2, rows)
    column = torch.arange(depth)
    bit = column % 32 // 2 + column % 2 * 16  # as forward.Linear.bits
    bits = torch.zeros(2, rows, -(-depth // 32), dtype=torch.int64)
    bits.index_add_(2, column // 32, mask.long() << bit)
    bits = bits.to(torch.uint32)
    exact = (~mask).double() @ x.double() * scale.double()[..., None]
    kept = None
    for order in ORDERS:
        matrix = problems.allocate((2, rows, d, d), p.dtype)
        vector = problems.allocate((2, rows, d), "float32")
        with lanes(order, seed=5):
            inputs = map(problems.pointer, (bits, x, scale))
            hopper.masked_sum(problems.DEVICE, p, *inputs, matrix, vector, rows, depth, blocks=3)
        found = matrix.owner.flatten(2), vector.owner
        for y, right in zip(found, exact.split((d * d, d), 2)):
            torch.testing.assert_close(y.double(), right, atol=1e-3, rtol=5e-3)
        kept = kept or found
        assert all(torch.equal(y, z) for y, z in zip(kept, found)), order


SLOTS = {
    "full": (540, 580),
    "pooled": (680, 730),
    "int8": (640, 720),
    "fp8": (560, 650),
    "int8_int8": (840, 1060),
}
# Of 1,024, 1,536 and 2,048 clocks that a step's products take at d = 128.
STEPS = {
    "sla2_sm90_masked_sum": 380,
    "sla2_sm90_masked_sum_low": 380,
    "sla2_sm90_sparse_bwd_q": 800,
    "sla2_sm90_sparse_bwd_kv": 1070,
}
QUICK = ("d128 bfloat16 full", "d128 bfloat16 int8")


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(
            spec, id=spec.label, marks=() if spec.label.endswith(QUICK) else pytest.mark.slow
        )
        for spec in all_specs("sm_90a")
        if "sm90" in spec.entry
    ],
)
def test_code_is_what_the_budget_says(spec):
    built = compile_kernel(spec)
    code = code_of(built)[spec.entry]
    assert gate(spec, built) + gate_code(spec, code) == []
    if spec.entry in STEPS:
        assert 2 * code.loop.inner[0] <= STEPS[spec.entry]
    if "_fwd" in spec.entry:
        assert built.kernels[spec.entry].registers == 168  # 384 threads: 64,512
        d = dict(spec.macros)["SLA2_HEAD_DIM"]
        # Two warps a scheduler.
        name = "pooled" if "pooled" in spec.entry else spec.label.split()[-1]
        assert 2 * code.loop.inner[0] <= SLOTS[name][d == 128]
