"""VisionReward, the paper's VR column, where the user has installed it."""

from __future__ import annotations

from sla2_eval.metrics.base import MetricSpec

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
        packages=("vision_reward (a module with `score(frames, fps, prompt)`, on the Python path)",),
        needs_prompt=True,
    ),
)
