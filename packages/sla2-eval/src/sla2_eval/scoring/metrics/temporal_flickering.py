"""VBench's temporal flickering: how much neighbouring frames differ, of all videos or of those that
its static filter keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from sla2_eval.scoring.metrics import raft
from sla2_eval.scoring.metrics.base import LeftOut, MetricSpec, Sample, need_frames

SPECS = (
    MetricSpec(
        name="temporal_flickering",
        kind="unpaired",
        title="Temporal flickering",
        definition=(
            "1 - mean |frame i - frame i+1| / 255; 1 for a still video; of all videos, moving ones"
            " too"
        ),
        source="VBench, temporal_flickering.py",
        value_range=(0.0, 1.0),
        higher_is_better=True,
        vbench="temporal_flickering",
    ),
    MetricSpec(
        name="temporal_flickering_static",
        kind="unpaired",
        title="Temporal flickering (static videos)",
        definition=(
            "the same of the videos that VBench's static filter keeps, as its leaderboard has it:"
            " at most round(2 T / 16) pairs of frames have a mean top-2 % flow above"
            " 3 min(H, W) / 256, and the first and last frame none above that many times twice that"
        ),
        source="VBench, static_filter.py and temporal_flickering.py; torchvision RAFT",
        value_range=(0.0, 1.0),
        higher_is_better=True,
        licence="BSD-3-Clause (torchvision)",
        weights=("raft",),
        packages=("torchvision",),
        vbench="temporal_flickering",
        settings={"model": "raft_large", "iterations": 20},
    ),
)


def load(name: str, settings: dict, device: str) -> Callable[[Sample], float]:
    """The scorer: integer arithmetic on the CPU, a pair of frames at a time. With the static filter
    it raises LeftOut for a video that moves.
    """
    import numpy as np

    flow = raft.optical_flow(settings, device) if name == "temporal_flickering_static" else None

    def score(sample: Sample) -> float:
        need_frames(sample, 2)
        frames = sample.frames
        if flow is not None:
            # The last two are between the ends, forwards and backwards.
            pairs = [*pairwise(frames), (frames[0], frames[-1]), (frames[-1], frames[0])]
            strengths = [raft.strongest(flow(a, b), 0.02) for a, b in pairs]
            if not is_static(strengths, len(frames), frames.shape[1:3]):
                raise LeftOut(f"{name}: the static filter, as the video moves")
        total = 0
        for now, then in zip(frames[1:], frames[:-1]):
            total += int((np.maximum(now, then) - np.minimum(now, then)).sum(dtype=np.int64))
        return 1.0 - total / (255.0 * frames[1:].size)

    return score


def is_static(strengths: list[float], num_frames: int, size: tuple[int, int]) -> bool:
    """VBench's static filter, on the strength of the flow in pixels between each two neighbours,
    then between the first and last frame and back.
    """
    least, count = 3.0 * min(size) / 256.0, round(2 * num_frames / 16.0)
    moving = sum(strength > least for strength in strengths[:-2])
    return moving <= count and max(strengths[-2:]) <= least * count * 2
