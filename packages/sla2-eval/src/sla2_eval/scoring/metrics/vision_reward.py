"""VisionReward, the paper's VR column, where the user has installed it."""

from __future__ import annotations

import math
from collections.abc import Callable

from sla2_eval.scoring.metrics.base import MetricSpec, Sample

SPECS = (
    MetricSpec(
        name="vision_reward",
        kind="unpaired",
        title="VisionReward",
        definition="weighted answers of the VisionReward video model to its checklist",
        source="Xu et al. 2024",
        value_range=(None, None),
        higher_is_better=True,
        licence="as the model's authors say",
        packages=(
            "vision_reward (a module with `score(frames, fps, prompt)`, on the Python path)",
        ),
        needs_prompt=True,
    ),
)


def load(name: str, settings: dict, device: str) -> Callable[[Sample], float]:
    """The scorer: `vision_reward.score(frames, fps, prompt)` of the user's own module, with uint8
    (T, H, W, 3) frames.
    """
    import vision_reward

    def score(sample: Sample) -> float:
        value = float(vision_reward.score(sample.frames, sample.fps, sample.prompt))
        if not math.isfinite(value):
            raise ValueError(f"vision_reward: expected a finite score, got {value}")
        return value

    return score
