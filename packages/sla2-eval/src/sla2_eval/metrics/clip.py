"""CLIP features: likeness to the reference frame by frame, and agreement with the prompt."""

from __future__ import annotations

from sla2_eval.metrics.base import MetricSpec

SPECS = (
    MetricSpec(
        name="clip_similarity",
        kind="paired",
        title="CLIP similarity",
        definition="cosine of the CLIP ViT-B/32 image features of frame and reference frame, mean over frames",
        source="Radford et al. 2021; open_clip",
        value_range=(-1.0, 1.0),
        higher_is_better=True,
        licence="MIT (OpenAI CLIP)",
        weights=("clip_b32",),
        packages=("open_clip (pip install open-clip-torch)",),
        settings={"model": "ViT-B-32-quickgelu"},
    ),
    MetricSpec(
        name="clip_score",
        kind="unpaired",
        title="CLIP score",
        definition="cosine of the CLIP ViT-B/32 features of frame and prompt, mean over frames",
        source="Hessel et al. 2021, unscaled; open_clip",
        value_range=(-1.0, 1.0),
        higher_is_better=True,
        licence="MIT (OpenAI CLIP)",
        weights=("clip_b32",),
        packages=("open_clip (pip install open-clip-torch)",),
        needs_prompt=True,
        settings={"model": "ViT-B-32-quickgelu"},
    ),
)
