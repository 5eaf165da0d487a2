"""The one plain definition of each low-bit number format, as quantise-dequantise in floating point;
kernels match it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

E4M3_MAX = 448.0
E2M1_MAX = 6.0
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NVFP4_GROUP = 16


class Formats(NamedTuple):
    """Formats of the two products of attention: Q K^T and P V."""

    qk: str
    pv: str


FORMATS = {
    "int8": Formats("int8", "fp8"),
    "int8_int8": Formats("int8", "int8"),
    "fp8": Formats("fp8", "fp8"),
    "int4": Formats("int4", "fp8"),
    "nvfp4": Formats("nvfp4", "nvfp4"),
}


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
    """max|x| / (largest value of the format); 1 where that is 0."""
    scale = amax / _LIMITS[fmt]
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def quantize(x: Tensor, scale: Tensor, fmt: str) -> Tensor:
    """x / scale rounded to the values of `fmt` ("int8" | "int4" | "fp8"), still in x's dtype."""
    if fmt == "fp8":
        return round_e4m3(x / scale)
    return round_integer(x / scale, int(_LIMITS[fmt]))


def fake_quantize(x: Tensor, fmt: str, dims: int | tuple[int, ...]) -> Tensor:
    """Quantise with one scale max|x| / limit over `dims`, and dequantise; nvfp4 uses groups of 16
    along the last axis.
    """
    if fmt == "nvfp4":
        return fake_quantize_nvfp4(x)
    scale = scale_of(x.abs().amax(dims, keepdim=True), fmt)
    return quantize(x, scale, fmt) * scale


def fake_quantize_nvfp4(x: Tensor, block: int | None = None, amax: float | None = None) -> Tensor:
    """NVFP4: E2M1 values, an E4M3 scale per 16 neighbours of the last axis, one fp32 scale for the
    tensor.

    With `block` the last axis is tokens, and groups start anew at every block of that many. `amax`
    is max|x| where it is known beforehand (1 for probabilities).
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


def quantize_probabilities(p: Tensor, fmt: str, block_k: int) -> Tensor:
    """P~ = exp(S - rowmax) in [0, 1], (..., keys), after the round trip through `fmt`: fixed scales
    1/448 (fp8), 1/127 (int8).

    nvfp4 has groups of 16 keys that start anew at every key block of `block_k`.
    """
    if fmt == "fp8":
        return round_e4m3(p * E4M3_MAX) / E4M3_MAX
    if fmt == "int8":
        return round_integer(p * 127.0, 127) / 127.0
    return fake_quantize_nvfp4(p, block_k, amax=1.0)


def quantize_values(v: Tensor, fmt: str, block_k: int) -> Tensor:
    """V (B, H, N_k, d) after the round trip: one scale per channel over the whole sequence; nvfp4
    in groups along N_k.
    """
    if fmt == "nvfp4":
        return fake_quantize_nvfp4(v.transpose(-1, -2), block_k).transpose(-1, -2)
    return fake_quantize(v, fmt, 2)


def quantize_blocks(x: Tensor, block: int, fmt: str) -> Tensor:
    """Q or K (B, H, N, d) after the round trip: one scale per block of tokens and head; nvfp4 in
    groups along d.
    """
    if fmt == "nvfp4":
        return fake_quantize_nvfp4(x)
    n = x.shape[2]
    blocks = pad(x, (0, 0, 0, -n % block)).unflatten(2, (-1, block))
    return fake_quantize(blocks, fmt, (3, 4)).flatten(2, 3)[:, :, :n]
