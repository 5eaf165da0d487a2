"""VBench's imaging quality: MUSIQ, which knows noise, blur and over-exposure."""

from __future__ import annotations

from sla2_eval.metrics.base import MetricSpec

SPECS = (
    MetricSpec(
        name="imaging_quality",
        kind="unpaired",
        title="Imaging quality",
        definition="MUSIQ (SPAQ) / 100, long side at most 512, mean over frames",
        source="VBench, imaging_quality.py; pyiqa",
        value_range=(0.0, 1.0),
        higher_is_better=True,
        licence="Apache-2.0 (MUSIQ)",
        weights=("musiq",),
        packages=("pyiqa (pip install sla2-eval[musiq])",),
        vbench="imaging_quality",
        settings={"long_side": 512},
    ),
)
