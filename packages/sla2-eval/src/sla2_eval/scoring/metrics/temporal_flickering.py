"""VBench's temporal flickering: how much neighbouring frames differ."""

from __future__ import annotations

from collections.abc import Callable

from sla2_eval.scoring.metrics.base import MetricSpec, Sample, need_frames

SPECS = (
    MetricSpec(
        name="temporal_flickering",
        kind="unpaired",
        title="Temporal flickering",
        definition="1 - mean |frame i - frame i+1| / 255; 1 for a still video",
        source="VBench, temporal_flickering.py",
        value_range=(0.0, 1.0),
        higher_is_better=True,
        vbench="temporal_flickering",
        vbench_range=(0.6293, 1.0),
    ),
)


def load(name: str, settings: dict, device: str) -> Callable[[Sample], float]:
    """The scorer: integer arithmetic on the CPU, a pair of frames at a time."""
    import numpy as np

    def score(sample: Sample) -> float:
        need_frames(sample, 2)
        frames = sample.frames
        total = 0
        for now, then in zip(frames[1:], frames[:-1]):
            total += int((np.maximum(now, then) - np.minimum(now, then)).sum(dtype=np.int64))
        return 1.0 - total / (255.0 * frames[1:].size)

    return score
