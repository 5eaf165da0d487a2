"""Whether a video of the built-in data set shows what its caption says, by the exact detector."""

from __future__ import annotations

from collections.abc import Callable

from sla2_eval.scoring.metrics.base import MetricSpec, Sample, need_prompt

SPECS = (
    MetricSpec(
        name="caption_accuracy",
        kind="unpaired",
        title="Caption accuracy",
        definition=(
            "share of videos in which the exact detector finds the captioned colour, shape and"
            " motion"
        ),
        source="sla2_eval.tiny.detector",
        value_range=(0.0, 1.0),
        higher_is_better=True,
        needs_prompt=True,
        binary=True,
        tiny_only=True,
    ),
)


def load(name: str, settings: dict, device: str) -> Callable[[Sample], float]:
    """The scorer: 1 if every captioned attribute is seen, else 0. It raises ValueError for a
    foreign caption.
    """
    import numpy as np

    from sla2_eval.tiny.detector import detect
    from sla2_eval.tiny.shapes import SIZE

    def score(sample: Sample) -> float:
        count, height, width = sample.frames.shape[:3]
        if height % SIZE or width != height:
            raise ValueError(
                f"caption_accuracy: expected square frames of a multiple of {SIZE}, got {height} x"
                f" {width}"
            )
        factor = height // SIZE
        cells = sample.frames.reshape(count, SIZE, factor, SIZE, factor, 3)
        small = cells.mean(axis=(2, 4), dtype=np.float64).astype(np.float32) / 255.0
        return float(detect(small, need_prompt(sample)).correct)

    return score
