"""The sparse forward for Hopper against fp64 formulas, in three orders of threads and of landing
copies, at odd lengths, and against the `mma.sync` kernel; what its code is made of.
"""

import pytest
import torch
from helpers import problems
from sla2_kernels import forward as operator
from sla2_kernels import hopper
from sla2_kernels.compile import compile_kernel
from sla2_kernels.emulator.emulate import ORDERS, lanes
from sla2_kernels.gate import gate, gate_code
from sla2_kernels.problem import NULL, ONE, Alpha, Strided
from sla2_kernels.sass import code_of

BLOCKS = (128, 64)

needs_hopper = pytest.mark.skipif(
    problems.DEVICE.arch != hopper.ARCH, reason="the GPU has no wgmma"
)


def make(n_q, n_k, **options):
    """A case, and states of the linear branch drawn at random: H, Z and alpha."""
    case = problems.make(n_q, n_k, blocks=BLOCKS, **options)
    p = case.problem
    state = torch.randn(p.pairs, p.t_m, p.width, p.width).to(case.q.dtype)
    return case, (state, torch.rand(p.pairs, p.t_m, p.width) + 0.5)


def run(case, states=None, *, save=False, blocks=3):
    """O, L and, with `save`, O_s of the kernels of csrc/sm90, as (B, H, n_q, ...)."""
    p, device = case.problem, problems.DEVICE
    q = operator.widened(device, p, problems.strided(case.q), p.n_q)
    k, v = (operator.widened(device, p, problems.strided(x), p.n_k) for x in (case.k, case.v))
    rows = (p.batch, p.heads, p.n_q, p.width)
    out, sparse = (problems.allocate(rows, p.dtype) for _ in range(2))
    lse = problems.allocate(rows[:3], "float32")
    hopper.sparse_forward(
        device,
        p,
        q,
        *hopper.pack(device, p, k, v),
        case.map,
        *((problems.pointer(x) for x in states) if states else (NULL, NULL)),
        Alpha.of(problems.pointer(case.alpha), tuple(case.alpha.shape)) if states else ONE,
        Strided.of(out, p.heads, p.n_q, p.width),
        sparse if save else NULL,
        lse,
        blocks=blocks,
    )
    return [x.owner for x in ((out, lse, sparse) if save else (out, lse))]


def formulas(case, states=None):
    """The same in fp64."""
    p = case.problem
    mask = case.block_map.mask()
    length = case.lengths if case.lengths is not None else torch.full((p.batch,), p.n_k)
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
    valid = torch.arange(p.t_n) * 64 < length[:, None, None, None]
    some = (mask & valid).any(-1)
    rest = (~mask & valid).any(-1)
    alpha = torch.where(rest, torch.where(some, case.alpha.double(), 0.0), 1.0)[:, :, rows, None]
    return alpha * sparse + (1 - alpha) * linear, lse, sparse


def check(found, expected):
    for x, exact in zip(found, expected):
        atol = 1e-4 if x.dtype == torch.float32 else 0.01
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
@pytest.mark.parametrize("d", [64, 128])
def test_the_results_are_those_of_the_mma_sync_kernel(d):
    """Behind the real prologue and linear states."""
    case = problems.make(333, 200, d=d, blocks=BLOCKS, lengths=(200, 63))
    p, device = case.problem, problems.DEVICE
    inputs = (problems.strided(x) for x in (case.q, case.k, case.v))
    made = operator.prologue(device, p, *inputs)
    linear = operator.linear_states(device, p, made, case.map)
    alpha = Alpha.of(problems.pointer(case.alpha), tuple(case.alpha.shape))
    plain, lse, sparse = operator.sparse_forward(device, p, made, case.map, linear, alpha, True)
    smooth = made.k.owner.view(case.k.shape)
    found = run(case._replace(k=smooth), (linear.state.owner, linear.norm.owner), save=True)
    for x, y in zip(found, (plain.owner, lse.owner, sparse.owner)):
        torch.testing.assert_close(x.flatten(), y.flatten(), atol=0.02, rtol=0.02)
    problems.assert_as_good(found[0], problems.oracle(case), problems.same_dtype(case), 2.0)


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(spec, id=spec.label, marks=pytest.mark.slow if "float16" in words else ())
        for spec in hopper.all_specs()
        for words in [spec.label.split()]
    ],
)
def test_code_is_what_the_budget_says(spec):
    built = compile_kernel(spec)
    code = code_of(built)[spec.entry]
    assert gate(spec, built) + gate_code(spec, code) == []
    if "sparse_fwd" in spec.entry:
        assert built.kernels[spec.entry].registers == 168  # 384 threads: 64,512
        # Two warps a scheduler; of a step, not the mask of a last tile and the rescaling of sums.
        d = dict(spec.macros)["SLA2_HEAD_DIM"]
        assert 2 * (code.loop.inner[0] - 64 - d // 2) <= {64: 580, 128: 600}[d]
