"""Low-bit formats against hand-computed values."""

import pytest
import torch
from sla2_core.formats import elements, format_of


def test_e4m3_values_ties_and_saturation():
    x = torch.tensor([0.0, 1.0, 17.0, 19.0, 460.0, -1000.0, float("nan")])
    out = elements.round_e4m3(x)
    assert out[:-1].tolist() == [0.0, 1.0, 16.0, 20.0, 448.0, -448.0]
    assert out[-1].isnan()


def test_e4m3_rounds_fp64_once():
    above = 1.0625 + 1e-12  # 1.0625 is half-way from 1 to 1.125; in fp32 the two are one number
    x = torch.tensor(
        [above, -above, 1.0625, 2.0**-9 * 0.5 + 1e-14, float("nan"), float("inf")],
        dtype=torch.float64,
    )
    expected = [1.125, -1.125, 1.0, 2.0**-9, float("nan"), 448.0]
    assert torch.equal(
        elements.round_e4m3(x).nan_to_num(7.0),
        torch.tensor(expected, dtype=torch.float64).nan_to_num(7.0),
    )
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    assert torch.equal(elements.round_e4m3(every).nan_to_num(7.0), every.nan_to_num(7.0))


def test_e2m1_rounds_to_its_eight_magnitudes():
    x = torch.tensor([0.2, 0.3, 0.75, 1.3, 2.4, 2.5, 3.6, 5.1, 9.0, -5.0])
    assert elements.round_e2m1(x).tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0, 4.0, 6.0, 6.0, -4.0]
    grid = torch.tensor(elements.E2M1_VALUES)
    assert torch.equal(elements.round_e2m1(grid), grid)


def test_int8_blocks_use_one_scale_each_and_a_short_last_block():
    x = torch.tensor([[1.0, -127.0], [63.4, 0.4], [0.5, -0.25]]).view(1, 1, 3, 2)
    out = format_of("int8").round_blocks(x, 2)[0, 0]
    assert out[:2].tolist() == [[1.0, -127.0], [63.0, 0.0]]
    torch.testing.assert_close(out[2], torch.tensor([127.0, -64.0]) * 0.5 / 127)


def test_probabilities_have_fixed_scales():
    p = torch.tensor([0.0, 1.0, 0.5])
    torch.testing.assert_close(
        format_of("int8_int8").round_probabilities(p, 8), torch.tensor([0.0, 1.0, 64 / 127])
    )
    torch.testing.assert_close(
        format_of("int8").round_probabilities(p, 8), torch.tensor([0.0, 1.0, 224 / 448])
    )


@pytest.mark.parametrize(
    ("fmt", "bound"), [("int8_int8", 0.5 / 127), ("fp8", 1 / 16), ("nvfp4", 1 / 4)]
)
def test_values_error_is_bounded_by_the_format(fmt, bound):
    torch.manual_seed(0)
    v = torch.randn(2, 3, 63, 8, dtype=torch.float64)
    out = format_of(fmt).round_values(v, 8)
    assert (out - v).abs().max() <= bound * v.abs().amax() * 1.01
    assert (out - v).abs().max() > 0


@pytest.mark.parametrize("fmt", ["int8", "int4", "fp8", "nvfp4"])
def test_zero_stays_zero_and_nan_stays_nan(fmt):
    assert (format_of(fmt).round_blocks(torch.zeros(1, 1, 5, 16), 4) == 0).all()
    x = torch.ones(1, 1, 5, 16)
    x[0, 0, 1, 3] = float("nan")
    assert format_of(fmt).round_blocks(x, 4)[0, 0, 1].isnan().any()
