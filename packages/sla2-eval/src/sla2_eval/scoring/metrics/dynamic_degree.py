"""VBench's dynamic degree: whether a video moves, by optical flow."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from sla2_eval.scoring.metrics import raft
from sla2_eval.scoring.metrics.base import MetricSpec, Sample, need_frames

SPECS = (
    MetricSpec(
        name="dynamic_degree",
        kind="unpaired",
        title="Dynamic degree",
        definition=(
            "1 if at least round(4 T / 16) pairs of frames, at about 8 a second, have a mean top-5"
            " % flow above 6 min(H, W) / 256"
        ),
        source="VBench, dynamic_degree.py; torchvision RAFT",
        value_range=(0.0, 1.0),
        higher_is_better=True,
        binary=True,
        licence="BSD-3-Clause (torchvision)",
        weights=("raft",),
        packages=("torchvision",),
        vbench="dynamic_degree",
        settings={"model": "raft_large", "iterations": 20},
        revision=3,
    ),
)


def load(name: str, settings: dict, device: str) -> Callable[[Sample], float]:
    """The scorer, on the flow between frames at about eight a second."""
    flow = raft.optical_flow(settings, device)

    def score(sample: Sample) -> float:
        need_frames(sample, 2)
        frames = sample.frames[:: max(1, round(sample.fps / 8))]
        moved = [raft.strongest(flow(a, b), 0.05) for a, b in pairwise(frames)]
        return float(moves(moved, len(frames), frames.shape[1:3]))

    return score


def moves(strengths: list[float], num_frames: int, size: tuple[int, int]) -> bool:
    """VBench's verdict: at least round(4 T / 16) pairs above 6 min(H, W) / 256 pixels, whatever the
    frame rate: below 8 a second too.

    As there, a video without any pair does not move.
    """
    least = 6.0 * min(size) / 256.0
    return bool(strengths) and sum(strength > least for strength in strengths) >= round(
        4 * num_frames / 16.0
    )
