"""Timing of several functions in one process: interleaved, each repetition between two events,
median and spread.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping


def interleave(
    cases: Mapping[str, Callable[[], object]],
    clock: Callable[[Callable[[], object]], float],
    repetitions: int,
    warmups: int = 2,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, dict]:
    """Milliseconds of each case: {"median", "low", "high"} (quartiles), or {"error"} in one line
    for one that fails.

    Each repetition runs every case once, so that a change of the machine's speed meets all alike.
    `clock(f)` runs f and returns its milliseconds.
    """
    times: dict[str, list[float]] = {}
    found: dict[str, dict] = {}
    for name, case in cases.items():
        try:
            for _ in range(warmups):
                clock(case)
            times[name] = []
        except Exception as error:
            found[name] = {"error": _line(error)}
    for repetition in range(repetitions):
        for name in times:
            times[name].append(clock(cases[name]))
        report(repetition + 1, repetitions)
    for name, values in times.items():
        low, median, high = (
            statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        )
        found[name] = {"median": median, "low": low, "high": high}
    return {name: found[name] for name in cases}


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def cuda_clock(function: Callable[[], object]) -> float:
    """Milliseconds between CUDA events around `function`, on the current stream."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
