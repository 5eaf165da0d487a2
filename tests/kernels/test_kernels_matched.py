"""The matched backward after a low-bit forward, against its plain definition, in three
lane orders.
"""

import pytest
import torch
from helpers import problems
from sla2_core.backends.pooling import smooth_keys
from sla2_core.formats import format_of
from sla2_kernels import forward as operator
from sla2_kernels.backward import _matched
from sla2_kernels.emulator.emulate import ORDERS, lanes

NAMES = ("dq", "dk", "dv")
PRECISIONS = ("int8", "int8_int8", "fp8")


def check(case, orders, **options):
    """dQ, dK, dV within three times what 16 bit costs without low bit; each order the same to the
    bit.
    """
    _, expected = problems.low_bit_oracle(case, "matched")
    _, exact = problems.oracle(case, gradients=True)
    _, plain = problems.same_dtype(case, gradients=True)
    kept = None
    for order in orders:
        with lanes(order, seed=3):
            _, _, grads = problems.run(case, gradients=True, qat_backward="matched")
        for name, found, right, dense, true in zip(NAMES, grads, expected, plain, exact):
            allowed = right.double() + (dense.double() - true)
            problems.assert_as_good(found, right.double(), allowed, 3.0, f"{name}, {order}")
        kept = kept or grads
        assert all(torch.equal(a, b) for a, b in zip(kept, grads)), order


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("int8", "bfloat16"),
        ("int8_int8", "float16"),
        pytest.param("fp8", "bfloat16", marks=pytest.mark.slow),
        pytest.param("int8_int8", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_matched_gradients(precision, dtype):
    problems.skip_unless_supported(precision)
    check(
        problems.make(
            111,
            200,
            d=48,
            dtype=dtype,
            blocks=(64, 32),
            lengths=(200, 63),
            heads=1,
            precision=precision,
        ),
        ORDERS,
    )


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_rows_that_select_nothing_or_everything(density):
    check(
        problems.make(63, 111, blocks=(64, 32), density=density, precision="int8_int8"), ["forward"]
    )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_inputs_and_row_values_are_the_definition_s(precision):
    problems.skip_unless_supported(precision)
    form = format_of(precision)
    case = problems.make(111, 200, d=64, blocks=(64, 32), heads=2, density=0.4, precision=precision)
    inputs = [problems.strided(x) for x in (case.q, case.k, case.v)]
    saved = operator.forward(problems.DEVICE, case.problem, *inputs, case.map, None, save=True)
    found = _matched(
        problems.DEVICE, case.problem, saved, *map(problems.pointer, (case.q, case.v, case.grad))
    )
    k = smooth_keys(case.k)
    rounded = []
    for x, wide, scale, block in (
        (case.q, found.q, found.q_scale, 64),
        (k, found.k, found.k_scale, 32),
    ):
        per_token = scale.owner[None].repeat_interleave(block, 2)[:, :, : x.shape[2], None]
        rounded.append(wide.owner.view(x.shape).float() * per_token)
        assert torch.equal(rounded[-1], form.round_blocks(x.float(), block))
    rounded.append(form.round_values(case.v.float(), 32))
    assert torch.equal(found.v.owner.view(case.v.shape), rounded[-1].to(case.v.dtype))

    selected = (
        case.block_map.mask()
        .repeat_interleave(64, 2)[:, :, :111]
        .repeat_interleave(32, 3)[..., :200]
    )
    scores = (rounded[0].double() @ rounded[1].double().transpose(-1, -2)) / 8
    p = torch.exp(scores - saved.lse.owner.view(1, 2, 111, 1).double()).where(selected, 0.0)
    d_p = case.grad.double() @ found.v.owner.view(case.v.shape).double().transpose(-1, -2)
    close = {"atol": 2e-4, "rtol": 2e-4, "check_dtype": False}
    torch.testing.assert_close(found.row_mean.owner.view(1, 2, 111), (p * d_p).sum(-1), **close)
    top = p.amax(-1)
    torch.testing.assert_close(
        found.row_top.owner.view(1, 2, 111), torch.where(top == 0, 1.0, top), **close
    )


def test_a_full_precision_backward_ignores_the_choice():
    case = problems.make(63, 111)
    _, _, first = problems.run(case, gradients=True)
    _, _, second = problems.run(case, gradients=True, qat_backward="matched")
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_real_block_size(precision):
    problems.skip_unless_supported(precision)
    check(
        problems.make(200, 333, d=128, blocks=(128, 64), heads=1, precision=precision), ["forward"]
    )
