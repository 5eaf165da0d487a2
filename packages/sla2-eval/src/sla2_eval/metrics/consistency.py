"""VBench's subject and background consistency: how alike the frames' features are."""

from __future__ import annotations

from sla2_eval.metrics.base import MetricSpec

SPECS = (
    MetricSpec(
        name="subject_consistency",
        kind="unpaired",
        title="Subject consistency",
        definition="mean over i >= 1 of (max(0, cos(f_i-1, f_i)) + max(0, cos(f_0, f_i))) / 2 of DINO ViT-B/16 features",
        source="VBench, subject_consistency.py",
        value_range=(0.0, 1.0),
        higher_is_better=True,
        licence="Apache-2.0 (DINO)",
        weights=("dino_b16",),
        packages=("timm (pip install timm)",),
        vbench="subject_consistency",
        vbench_range=(0.1462, 1.0),
        settings={"model": "vit_base_patch16_224"},
    ),
    MetricSpec(
        name="background_consistency",
        kind="unpaired",
        title="Background consistency",
        definition="the same of CLIP ViT-B/32 image features",
        source="VBench, background_consistency.py",
        value_range=(0.0, 1.0),
        higher_is_better=True,
        licence="MIT (OpenAI CLIP)",
        weights=("clip_b32",),
        packages=("open_clip (pip install open-clip-torch)",),
        vbench="background_consistency",
        vbench_range=(0.2615, 1.0),
        settings={"model": "ViT-B-32-quickgelu"},
    ),
)
