"""Q, K and V rounded to a low-bit format and back, to the bit as the plain definition rounds: no
fast math here.
"""

from __future__ import annotations

import numpy as np

from sla2_kernels.cpu.build import Array, exact_inner, exact_kernel, run
from sla2_kernels.cpu.elementwise import floor_power_of_two, rint

LIMITS = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}
_CHUNK = 256  # tokens of a work item


@exact_inner
def _round_row(x: Array, scale: Array, limit: float, fp8: bool, out: Array) -> None:
    """out <- x / scale rounded to integers or, with fp8, to E4M3, saturating at +-limit, times
    scale.
    """
    least, eighth = x.dtype.type(2.0**-6), x.dtype.type(0.125)
    for c in range(len(x)):
        value = x[c] / scale[c]
        value = limit if value > limit else value
        value = -limit if value < -limit else value
        if fp8:
            size = abs(value)
            step = floor_power_of_two(size if size > least else least) * eighth
            value = rint(value / step) * step
        else:
            value = rint(value)
        out[c] = value * scale[c]


@exact_kernel
def _quantize_blocks(
    x: Array,
    bits: Array,
    lengths: Array,
    block: int,
    limit: float,
    fp8: bool,
    out: Array,
    lo: int,
    hi: int,
) -> None:
    count, d = -(-x.shape[1] // block), x.shape[2]
    kind, largest = x.dtype.type, np.iinfo(bits.dtype).max
    scale = np.empty(d, x.dtype)
    for item in range(lo, hi):
        g, start = item // count, item % count * block
        stop = min(start + block, x.shape[1])
        valid = max(start, min(stop, lengths[g]))
        top = np.zeros(1, bits.dtype)  # as integers, so that a NaN is the largest
        for t in range(start, valid):
            most = top[0]
            for c in range(d):
                most = max(most, bits[g, t, c] & largest)
            top[0] = most
        most = top.view(x.dtype)[0] / limit
        scale[:] = kind(1) if most == 0 else most
        for t in range(start, valid):
            _round_row(x[g, t], scale, limit, fp8, out[g, t])
        out[g, valid:stop] = 0


@exact_kernel
def _channel_tops(bits: Array, lengths: Array, chunk: int, tops: Array, lo: int, hi: int) -> None:
    largest, d = np.iinfo(bits.dtype).max, bits.shape[2]
    for item in range(lo, hi):
        g, i = item // tops.shape[1], item % tops.shape[1]
        for c in range(d):
            tops[g, i, c] = 0
        for t in range(i * chunk, min((i + 1) * chunk, lengths[g])):
            for c in range(d):
                tops[g, i, c] = max(tops[g, i, c], bits[g, t, c] & largest)


@exact_kernel
def _quantize_channels(
    x: Array,
    lengths: Array,
    chunk: int,
    scale: Array,
    limit: float,
    fp8: bool,
    out: Array,
    lo: int,
    hi: int,
) -> None:
    count = -(-x.shape[1] // chunk)
    for item in range(lo, hi):
        g, start = item // count, item % count * chunk
        stop = min(start + chunk, x.shape[1])
        valid = max(start, min(stop, lengths[g]))
        for t in range(start, valid):
            _round_row(x[g, t], scale[g], limit, fp8, out[g, t])
        out[g, valid:stop] = 0


def _bits(x: Array) -> Array:
    return x.view(np.int64 if x.dtype == np.float64 else np.int32)


def quantize_blocks(x: Array, lengths: Array, block: int, fmt: str, threads: int = 1) -> Array:
    """Q or K after the round trip, one scale max|x| / limit per block of tokens and head.

    Args:
        x: (G, N, d), contiguous float32 or float64.
        lengths: valid tokens, int64 (G,); the others become 0.
        block: tokens that share a scale.
        fmt: a key of LIMITS.
    """
    out = np.empty_like(x)
    items = x.shape[0] * -(-x.shape[1] // block)
    run(
        _quantize_blocks,
        items,
        threads,
        x,
        _bits(x),
        lengths,
        block,
        x.dtype.type(LIMITS[fmt]),
        fmt == "fp8",
        out,
    )
    return out


def quantize_channels(x: Array, lengths: Array, fmt: str, threads: int = 1) -> Array:
    """V after the round trip, one scale max|x| / limit per channel over the valid tokens.

    Arguments as of quantize_blocks.
    """
    out, bits, limit = np.empty_like(x), _bits(x), x.dtype.type(LIMITS[fmt])
    g, n, d = x.shape
    tops = np.empty((g, -(-n // _CHUNK), d), bits.dtype)
    run(_channel_tops, tops.shape[0] * tops.shape[1], threads, bits, lengths, _CHUNK, tops)
    scale = tops.max(1).view(x.dtype) / limit
    scale[scale == 0] = 1
    run(
        _quantize_channels,
        tops.shape[0] * tops.shape[1],
        threads,
        x,
        lengths,
        _CHUNK,
        scale,
        limit,
        fmt == "fp8",
        out,
    )
    return out
