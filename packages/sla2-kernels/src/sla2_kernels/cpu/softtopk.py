"""SoftTop-k's shift of each row: Newton's steps inside a bracket that is halved where they leave
it.
"""

from __future__ import annotations

import numpy as np

from sla2_kernels.cpu.build import Array, inner, kernel, run
from sla2_kernels.cpu.elementwise import LOG2_E, exp2

_STEPS = 80


@inner
def _sigmoids(x: Array, row: int, shift: float, out: Array) -> tuple[float, float]:
    """out[row] <- sigmoid(x[row] + shift); returns the sum and the sum of sigmoid (1 - sigmoid)."""
    kind = x.dtype.type
    scale, one, total, slope = kind(LOG2_E), kind(1), kind(0), kind(0)
    for c in range(x.shape[1]):
        value = one / (one + exp2(-(x[row, c] + shift) * scale))
        out[row, c] = value
        total += value
        slope += value * (one - value)
    return total, slope


@kernel
def _soft_top_k(x: Array, k: Array, out: Array, lo: int, hi: int) -> None:
    kind, width = x.dtype.type, x.shape[1]
    tight = kind(np.finfo(x.dtype).eps)
    for row in range(lo, hi):
        valid, top, bottom = 0, kind(-np.inf), kind(np.inf)
        nan = False
        for c in range(width):
            value = x[row, c]
            if value != kind(-np.inf):
                valid += 1
                top = max(top, value)
                bottom = min(bottom, value)
                nan = nan or value != value
        if nan:
            out[row] = np.nan
            continue
        if k[row] >= valid:
            for c in range(width):
                out[row, c] = kind(x[row, c] != kind(-np.inf))
            continue
        # With every sigmoid equal to k / valid at the row's maximum the sum is at most k, at its
        # minimum at least k.
        share = min(max(k[row] / valid, kind(1e-7)), kind(1) - kind(1e-7))
        centre = np.log(share / (kind(1) - share))
        low, high = centre - top, centre - bottom
        shift = kind(0.5) * (low + high)
        for _ in range(_STEPS):
            total, slope = _sigmoids(x, row, shift, out)
            if total > k[row]:
                high = shift
            else:
                low = shift
            new = shift - (total - k[row]) / slope
            if not (new > low and new < high):
                new = kind(0.5) * (low + high)
            moved = abs(new - shift)
            shift = new
            if moved <= tight * max(kind(1), abs(shift)):
                break
        _sigmoids(x, row, shift, out)
        for c in range(width):
            if x[row, c] == kind(-np.inf):
                out[row, c] = 0


def soft_top_k(x: Array, k: Array, threads: int = 1) -> Array:
    """sigmoid(x + lambda) with lambda such that each row sums to k (Eq. 17).

    Args:
        x: scores / tau, float32 or float64 (rows, T_n); -inf marks blocks that cannot be chosen.
        k: (rows,) of x's dtype.

    Returns:
        (rows, T_n). A row with NaN is NaN; one with no more than k blocks chooses them all.
    """
    out = np.empty_like(x)
    run(_soft_top_k, len(x), threads, x, k, out)
    return out
