"""VBench's 16 dimensions: their ranges, their weights, and the scores that are made of them, as in
constant.py and cal_final_score.py of VBench's scripts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

VERSION = "0.1.5"  # of VBench, whose numbers these are


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """`low`, `high`: what VBench normalises with. `info`: whether VBench needs to know more of a
    prompt than its text, which its full-info JSON says. `detectron2`: whether its code needs that.
    `partial`: whether it leaves out videos, those in which it does not find the object.
    """

    quality: bool = False  # of the Quality score; else of the Semantic score
    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0
    binary: bool = False  # 0 or 1 a video
    info: bool = False
    detectron2: bool = False
    partial: bool = False

    def normalised(self, mean: float) -> float:
        """(mean - low) / (high - low), unclipped."""
        return (mean - self.low) / (self.high - self.low)


DIMENSIONS = {
    "subject_consistency": Dimension(quality=True, low=0.1462),
    "background_consistency": Dimension(quality=True, low=0.2615),
    "temporal_flickering": Dimension(quality=True, low=0.6293),
    "motion_smoothness": Dimension(quality=True, low=0.706, high=0.9975),
    "dynamic_degree": Dimension(quality=True, weight=0.5, binary=True),
    "aesthetic_quality": Dimension(quality=True),
    "imaging_quality": Dimension(quality=True),
    "object_class": Dimension(info=True, detectron2=True),
    "multiple_objects": Dimension(info=True, detectron2=True),
    "human_action": Dimension(binary=True),
    "color": Dimension(info=True, detectron2=True, partial=True),
    "spatial_relationship": Dimension(info=True, detectron2=True),
    "scene": Dimension(high=0.8222, info=True),
    "appearance_style": Dimension(low=0.0009, high=0.2855, info=True),
    "temporal_style": Dimension(high=0.364),
    "overall_consistency": Dimension(high=0.364),
}
QUALITY_WEIGHT, SEMANTIC_WEIGHT = 4.0, 1.0  # in the Total score


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Of a model; None where a dimension of it is missing. VBench's own script counts that as 0,
    which is no score of the model.
    """

    quality: float | None
    semantic: float | None
    total: float | None
    missing: tuple[str, ...]  # dimensions

    def by_title(self) -> dict[str, float | None]:
        """The three scores by what VBench calls them."""
        return {
            "Quality score": self.quality,
            "Semantic score": self.semantic,
            "Total score": self.total,
        }


def scores(means: Mapping[str, float]) -> Scores:
    """Quality, Semantic and Total of the means of dimensions, not normalised.

    Raises ValueError for a name that is no dimension, and for a mean that is no finite number.
    """
    check_names(means)
    for name, mean in means.items():
        if not math.isfinite(mean):
            raise ValueError(f"{name}: expected a finite mean, got {mean}")
    quality, semantic = (_weighted(means, quality=side) for side in (True, False))
    total = None
    if quality is not None and semantic is not None:
        total = quality * QUALITY_WEIGHT + semantic * SEMANTIC_WEIGHT
        total /= QUALITY_WEIGHT + SEMANTIC_WEIGHT
    missing = tuple(name for name in DIMENSIONS if name not in means)
    return Scores(quality=quality, semantic=semantic, total=total, missing=missing)


def _weighted(means: Mapping[str, float], *, quality: bool) -> float | None:
    of = {name: about for name, about in DIMENSIONS.items() if about.quality == quality}
    if not of.keys() <= means.keys():
        return None
    weighed = (about.weight * about.normalised(means[name]) for name, about in of.items())
    return math.fsum(weighed) / math.fsum(about.weight for about in of.values())


def check_names(names: Iterable[str]) -> None:
    """Raise ValueError for one that is no dimension."""
    for name in names:
        if name not in DIMENSIONS:
            raise ValueError(
                f"dimensions: expected names among {', '.join(DIMENSIONS)}, got {name!r}"
            )
