"""VBench's dynamic degree: whether a video moves, by optical flow."""

from __future__ import annotations

from sla2_eval.metrics.base import MetricSpec

SPECS = (
    MetricSpec(
        name="dynamic_degree",
        kind="unpaired",
        title="Dynamic degree",
        definition="1 if at least round(4 T / 16) pairs of frames, at about 8 a second, have a mean top-5 % flow above 6 min(H, W) / 256",
        source="VBench, dynamic_degree.py; torchvision RAFT",
        value_range=(0.0, 1.0),
        higher_is_better=True,
        licence="BSD-3-Clause (torchvision)",
        weights=("raft",),
        packages=("torchvision (pip install torchvision)",),
        vbench="dynamic_degree",
        settings={"model": "raft_large", "iterations": 20},
    ),
)
