"""8-bit forward on the emulator: quantised tensors equal the formats' definition, outputs the
reference's, to rounding.
"""

import pytest
import torch
from helpers import problems
from sla2_core.backends.pooling import smooth_keys
from sla2_core.formats import format_of
from sla2_core.reference import sla2_reference
from sla2_kernels import prepare
from sla2_kernels.kernels import Geometry, spec_of

pointer = problems.pointer
PRECISIONS = ("int8", "int8_int8", "fp8")


def decoded(raw: torch.Tensor, fmt: str) -> torch.Tensor:
    return (raw.view(torch.float8_e4m3fn) if fmt == "fp8" else raw.view(torch.int8)).float()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_low_bit(precision):
    problems.skip_unless_supported(precision)
    form = format_of(precision)
    case = problems.make(
        111, 200, d=64, blocks=(64, 32), lengths=(200, 63), heads=1, precision=precision
    )
    lengths = case.lengths.long()
    inputs = [problems.strided(x) for x in (case.q, case.k, case.v)]
    made = prepare.pool(problems.DEVICE, case.problem, *inputs)
    made = prepare.keys(problems.DEVICE, case.problem, made, save=True)
    valid = (torch.arange(200) < lengths[:, None])[:, None, :, None]
    k = made.k.owner.view(case.k.shape)
    torch.testing.assert_close(
        k.float(),
        smooth_keys(case.k, lengths).float().masked_fill(~valid, 0.0),
        atol=0.02,
        rtol=0.01,
    )
    per_token = made.k_scale.owner[:, None].repeat_interleave(32, 2)[:, :, :200, None]
    found = decoded(made.k_bytes.owner, form.qk).view(k.shape) * per_token
    assert torch.equal(found, form.round_blocks(k.float(), 32))
    # Q is rounded where it is used; the largest value of a block is the format's limit.
    tops = torch.stack([x.abs().amax((2, 3)) for x in case.q.float().split(64, 2)], -1)
    torch.testing.assert_close(
        made.q_scale.owner[:, None] * (448.0 if precision == "fp8" else 127.0), tops
    )

    v = case.v.float().masked_fill(~valid, 0.0)
    order = torch.tensor([2 * (p >> 2) + (p & 1) + 8 * (p >> 1 & 1) for p in range(16)])
    tiles = decoded(made.v_bytes.owner, form.pv).unflatten(-1, (2, 16))
    tokens = (
        torch.empty_like(tiles)
        .index_copy_(-1, order, tiles)
        .flatten(-2)
        .transpose(-1, -2)
        .flatten(1, 2)
    )
    found = tokens[:, None, :200] * made.v_scale.owner[:, None, None]
    assert torch.equal(found, form.round_values(v, 32))
    assert (tokens[:, 200:] == 0).all()

    out, _ = problems.run(case)
    q, k, v = case.q, case.k, case.v
    expected = sla2_reference(
        q.float(),
        smooth_keys(k, lengths).float(),
        v.float(),
        case.block_map,
        case.alpha,
        precision=precision,
        smooth_k=False,
        kv_lengths=lengths,
    )
    full = problems.oracle(case)
    error, rounding = out.double() - expected.double(), expected.double() - full
    assert error.square().mean().sqrt() < 0.75 * rounding.square().mean().sqrt()
    assert torch.nn.functional.cosine_similarity(out.double().flatten(), full.flatten(), 0) > 0.999


def test_nan_in_a_key_block_shows_where_it_is_selected():
    case = problems.make(63, 128, blocks=(64, 32), heads=2, precision="int8_int8", density=1.0)
    case.k[0, 1, 100, 5] = torch.nan
    out, _ = problems.run(case, smooth_k=False)
    assert torch.isnan(out[0, 1]).all()
    assert torch.isfinite(out[0, 0]).all()


def test_fp8_needs_sm_89():
    geometry = Geometry(head_dim=64, precision="int8")
    with pytest.raises(
        ValueError, match=r"expected .full. or .int8_int8. on sm_80, which has no FP8, got .int8."
    ):
        spec_of("sla2_sparse_fwd_low", "sm_80", geometry)
    assert (
        spec_of(
            "sla2_sparse_fwd_low", "sm_80", Geometry(head_dim=64, precision="int8_int8")
        ).threads
        == 256
    )
