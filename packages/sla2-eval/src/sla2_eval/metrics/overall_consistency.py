"""VBench's overall consistency: ViCLIP's agreement of video and prompt."""

from __future__ import annotations

from sla2_eval.metrics.base import MetricSpec

SPECS = (
    MetricSpec(
        name="overall_consistency",
        kind="unpaired",
        title="Overall consistency",
        definition="cosine of the ViCLIP features of 8 frames and of the prompt",
        source="VBench, overall_consistency.py",
        value_range=(-1.0, 1.0),
        higher_is_better=True,
        licence="Apache-2.0 (InternVid)",
        weights=("viclip",),
        packages=("viclip (from InternVideo, on the Python path)",),
        needs_prompt=True,
        vbench="overall_consistency",
        vbench_range=(0.0, 0.364),
        settings={"frames": 8},
    ),
)
