"""The precision that a forward of the CUDA kernels runs in, where it is not what was asked for."""

from __future__ import annotations

import functools
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sla2_kernels.problem import Device, Problem

_BY_WGMMA = "; blocks of 128 and 64 run in 8 bit by wgmma, unless SLA2_WGMMA is 0"


@functools.cache
def precision_to_run(arch: str, precision: str) -> str:
    """The precision of a forward by mma.sync without gradients, whose low bit is for speed alone.
    One RuntimeWarning says where that is another one than asked for.
    """
    from sla2_kernels.kernels import faster_precision, products_of

    chosen = faster_precision(arch, precision)
    if chosen != precision:
        qk, pv = products_of(arch, precision)
        warnings.warn(
            f"precision: {precision!r} runs in 16 bit on {arch}, which has no FP8 mma.sync (Q K^T"
            f" would run by {qk}, P V by {pv}: slower than 16 bit); forwards with gradients round"
            " as asked" + (_BY_WGMMA if arch == "sm_90a" else ""),
            RuntimeWarning,
            stacklevel=2,
        )
    return chosen


def to_run(device: Device, problem: Problem) -> Problem:
    """The problem of a forward without gradients: see precision_to_run. Hopper's own kernels have
    every precision.
    """
    from sla2_kernels import hopper

    if device.target != "cuda" or hopper.takes(device, problem):
        return problem
    return replace(problem, precision=precision_to_run(device.arch, problem.precision))
