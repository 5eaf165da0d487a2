"""VBench's motion smoothness: how well the even frames foretell the odd ones, with a linear or a learned interpolator."""

from __future__ import annotations

from collections.abc import Callable

from sla2_eval.metrics.base import MetricSpec, Sample, need_frames

SPECS = (
    MetricSpec(
        name="motion_smoothness_linear",
        kind="unpaired",
        title="Motion smoothness (linear)",
        definition="1 - mean |odd frame - mean of its two neighbours| / 255; not VBench's number, whose interpolator is AMT-S",
        source="VBench, motion_smoothness.py, with a linear interpolator",
        value_range=(0.0, 1.0),
        higher_is_better=True,
    ),
)


def load(name: str, settings: dict, device: str) -> Callable[[Sample], float]:
    """The scorer of linear interpolation: integer arithmetic on the CPU, three frames at a time."""
    import numpy as np

    def score(sample: Sample) -> float:
        need_frames(sample, 3)
        frames = sample.frames
        doubled, count = 0, 0
        for middle in range(1, len(frames) - 1, 2):
            before, now, after = (frames[i].astype(np.int32) for i in (middle - 1, middle, middle + 1))
            doubled += int(np.abs(2 * now - before - after).sum(dtype=np.int64))
            count += now.size
        return 1.0 - doubled / (2 * 255.0 * count)

    return score
