"""Rounding to the values of INT8, INT4, FP8 E4M3 and FP4 E2M1, and the round trip with a scale.

The formats of this folder are made of these. Tensors have any shape and float dtype, and keep both.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

E4M3_MAX = 448.0
E2M1_MAX = 6.0
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NVFP4_GROUP = 16


def round_e4m3(x: Tensor) -> Tensor:
    """Nearest FP8 E4M3 value (ties to even), saturating at +-448; NaN stays NaN."""
    clipped = x.clamp(-E4M3_MAX, E4M3_MAX)
    if x.dtype == torch.float64:  # a cast by way of fp32 rounds twice
        exponent = torch.frexp(clipped.abs().clamp_min(2.0**-6)).exponent
        step = torch.ldexp(torch.ones_like(x), exponent - 4)
        return (clipped / step).round() * step
    return clipped.to(torch.float32).to(torch.float8_e4m3fn).to(x.dtype)


def round_e2m1(x: Tensor) -> Tensor:
    """Nearest FP4 E2M1 value (ties to even), saturating at +-6; NaN stays NaN."""
    size = x.abs().clamp(max=E2M1_MAX)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0)).to(x.dtype)
    return torch.copysign((size / step).round() * step, x)


def round_integer(x: Tensor, limit: int) -> Tensor:
    """Nearest integer (ties to even), saturating at +-limit."""
    return x.round().clamp(-limit, limit)


_LIMITS = {"int8": 127.0, "int4": 7.0, "fp8": E4M3_MAX}


def scale_of(amax: Tensor, fmt: str) -> Tensor:
    """The scale amax / (largest value of `fmt`), amax = max|x|; 1 where that is 0. `fmt` is "int8",
    "int4" or "fp8".
    """
    scale = amax / _LIMITS[fmt]
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def quantize(x: Tensor, scale: Tensor, fmt: str) -> Tensor:
    """x / scale rounded to the values of `fmt` ("int8" | "int4" | "fp8"), still in x's dtype."""
    if fmt == "fp8":
        return round_e4m3(x / scale)
    return round_integer(x / scale, int(_LIMITS[fmt]))


def fake_quantize(x: Tensor, fmt: str, dims: int | tuple[int, ...]) -> Tensor:
    """x quantised with one scale max|x| / limit over the axes `dims`, and dequantised. `fmt` is
    "int8", "int4" or "fp8".
    """
    scale = scale_of(x.abs().amax(dims, keepdim=True), fmt)
    return quantize(x, scale, fmt) * scale


def fake_quantize_nvfp4(x: Tensor, block: int | None = None, amax: float | None = None) -> Tensor:
    """x quantised to NVFP4 and dequantised: E2M1 values, an E4M3 scale for every 16 neighbours of
    the last axis, one fp32 scale for the tensor.

    Args:
        x: (..., N).
        block: where the last axis is tokens, groups start anew at every block of that many; None
            for an axis without blocks.
        amax: max|x| where it is known beforehand (1 for probabilities); None measures it.
    """
    n = x.shape[-1]
    block = block or n
    blocks = pad(x, (0, -n % block)).unflatten(-1, (-1, block))
    groups = pad(blocks, (0, -block % NVFP4_GROUP)).unflatten(-1, (-1, NVFP4_GROUP))
    largest = groups.abs().amax(-1, keepdim=True)
    whole = (largest.amax() if amax is None else torch.full_like(largest, amax)) / (
        E4M3_MAX * E2M1_MAX
    )
    whole = torch.where(whole == 0, torch.ones_like(whole), whole)
    scale = round_e4m3(largest / E2M1_MAX / whole) * whole
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (round_e2m1(groups / scale) * scale).flatten(-2)[..., :block].flatten(-2)[..., :n]
