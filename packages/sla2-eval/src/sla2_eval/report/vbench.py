"""VBench's dimensions of every variant, and the scores that are made of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sla2_eval.report.groups import Group
from sla2_eval.scoring import metrics
from sla2_eval.scoring.vbench_dimensions import DIMENSIONS, scores

_LEAST = 2  # dimensions that a variant must have for the table to be shown


def part_means(group: Group, seed: int | None) -> dict[str, dict[str, Any]]:
    """{metric: {"vbench": dimension, "vbench_mean", "vbench_weight"}} of one training. Where
    several folders scored parts of its videos, each mean counts by what it was made of.
    """
    found: dict[str, dict[str, Any]] = {}
    for member in group.of_seed(seed):
        for metric, about in (member.results or {}).get("metrics", {}).items():
            mean = about.get("vbench_mean")
            weight = about.get("vbench_weight", about.get("num_videos", 0))
            if mean is None or about.get("vbench") not in DIMENSIONS or not weight:
                continue
            before = found.get(metric, {"vbench_mean": 0.0, "vbench_weight": 0})
            both = before["vbench_weight"] + weight
            mean = (before["vbench_mean"] * before["vbench_weight"] + mean * weight) / both
            found[metric] = {"vbench": about["vbench"], "vbench_mean": mean, "vbench_weight": both}
    return found


def vbench_rows(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """{"label", "dimensions": {dimension: {"metric", "mean", "normalised"}}, "scores": {title:
    value or None}} of each variant that has a dimension, means over its trainings; none where no
    variant has two. VBench's own numbers come before those of metrics here.
    """
    rows = []
    for group in groups:
        parts = [part_means(group, seed) for seed in group.seeds()]
        dimensions = {
            dimension: found
            for dimension in DIMENSIONS
            if (found := _dimension(dimension, parts)) is not None
        }
        if dimensions:
            known = scores({name: about["mean"] for name, about in dimensions.items()})
            row = {"label": group.label, "dimensions": dimensions, "scores": known.by_title()}
            rows.append(row)
    return rows if any(len(row["dimensions"]) >= _LEAST for row in rows) else []


def _dimension(dimension: str, parts: list[dict[str, dict[str, Any]]]) -> dict[str, Any] | None:
    """The metric that stands for a dimension, and its mean over trainings."""
    order = [*metrics.specs(), f"vbench_{dimension}"]
    values: dict[str, list[float]] = {}
    for part in parts:
        for metric, about in part.items():
            if about["vbench"] == dimension:
                values.setdefault(metric, []).append(about["vbench_mean"])
    if not values:
        return None
    metric = max(values, key=lambda name: order.index(name) if name in order else -1)
    mean = math.fsum(values[metric]) / len(values[metric])
    return {"metric": metric, "mean": mean, "normalised": DIMENSIONS[dimension].normalised(mean)}
