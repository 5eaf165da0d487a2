"""VBench's aesthetic quality: a linear head on CLIP features."""

from __future__ import annotations

from sla2_eval.metrics.base import MetricSpec

SPECS = (
    MetricSpec(
        name="aesthetic_quality",
        kind="unpaired",
        title="Aesthetic quality",
        definition="LAION's linear head on normalised CLIP ViT-L/14 features, / 10, mean over frames",
        source="VBench, aesthetic_quality.py",
        value_range=(0.0, 1.0),
        higher_is_better=True,
        licence="MIT (OpenAI CLIP, LAION)",
        weights=("clip_l14", "aesthetic_head"),
        packages=("open_clip (pip install open-clip-torch)",),
        vbench="aesthetic_quality",
        settings={"model": "ViT-L-14-quickgelu"},
    ),
)
