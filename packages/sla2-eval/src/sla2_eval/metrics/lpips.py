"""Learned perceptual image patch similarity to the reference video."""

from __future__ import annotations

from sla2_eval.metrics.base import MetricSpec

SPECS = (
    MetricSpec(
        name="lpips",
        kind="paired",
        title="LPIPS",
        definition="distance of AlexNet features per frame, linearly weighted; mean over frames; input in [-1, 1]",
        source="Zhang et al. 2018; lpips",
        value_range=(0.0, None),
        higher_is_better=False,
        licence="BSD-2-Clause (lpips), BSD-3-Clause (torchvision)",
        weights=("alexnet",),
        packages=("lpips (pip install lpips)",),
        settings={"net": "alex"},
    ),
)
