"""Frechet video distance between the videos and the references, as sets."""

from __future__ import annotations

from sla2_eval.metrics.base import MetricSpec

SPECS = (
    MetricSpec(
        name="fvd",
        kind="set",
        title="FVD (I3D)",
        definition="Frechet distance of I3D Kinetics-400 logits (400-d) of 16-frame clips, 224 x 224, [-1, 1]; float64, by eigenvalues",
        source="Unterthiner et al. 2018; StyleGAN-V's TorchScript I3D",
        value_range=(0.0, None),
        higher_is_better=False,
        licence="Apache-2.0 (Kinetics-400 I3D)",
        weights=("i3d",),
        settings={"clip_frames": 16, "size": 224},
    ),
    MetricSpec(
        name="fvd_videomae",
        kind="set",
        title="FVD (VideoMAE)",
        definition="the same distance of VideoMAE ViT-B features (768-d), which see motion more than I3D does",
        source="Ge et al. 2024 (content-debiased FVD)",
        value_range=(0.0, None),
        higher_is_better=False,
        licence="CC-BY-NC-4.0 (VideoMAE)",
        weights=("videomae",),
        packages=("transformers (pip install transformers)",),
        settings={"clip_frames": 16, "size": 224},
    ),
)
