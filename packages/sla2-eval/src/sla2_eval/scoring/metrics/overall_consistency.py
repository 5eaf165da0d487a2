"""VBench's overall consistency and temporal style: ViCLIP's agreement of video and prompt."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from sla2_eval.scoring.metrics.base import MetricSpec, Sample, need_prompt
from sla2_eval.scoring.metrics.viclip_model import LARGE


def _spec(name: str, title: str, of: str = "") -> MetricSpec:
    return MetricSpec(
        name=name,
        kind="unpaired",
        title=title,
        definition=f"cosine of the ViCLIP features of 8 frames and of the prompt{of}",
        source=f"VBench, {name}.py",
        value_range=(-1.0, 1.0),
        higher_is_better=True,
        licence="Apache-2.0 (InternVid)",
        weights=("viclip",),
        packages=("open_clip",),
        needs_prompt=True,
        vbench=name,
        settings={"frames": 8, "size": 224, "model": LARGE},
        revision=3,
    )


# VBench computes both alike, each of the videos of its own prompts.
SPECS = (
    _spec("overall_consistency", "Overall consistency"),
    _spec("temporal_style", "Temporal style", ", where it asks for a style of motion"),
)


def load(name: str, settings: dict, device: str) -> Callable[[Sample], float]:
    """The scorer over ViCLIP's two features."""
    import numpy as np
    import torch

    from sla2_eval.scoring.metrics.loading import CLIP_MEAN, CLIP_STD, prepared
    from sla2_eval.scoring.metrics.viclip_model import ViCLIP

    model = ViCLIP(settings, device)

    def score(sample: Sample) -> float:
        chosen = np.ascontiguousarray(
            sample.frames[middles(len(sample.frames), settings["frames"])]
        )
        x = prepared(
            chosen,
            device,
            settings["size"],
            CLIP_MEAN,
            CLIP_STD,
            mode="bicubic",
            crop=True,
            antialias=False,
            whole=True,
        )
        with torch.inference_mode():
            return float(model.video(x) @ model.text(need_prompt(sample)))

    return score


def middles(length: int, count: int) -> list[int]:
    """The middle frame of each of `count` equal parts of a video; the last is repeated where there
    are too few.
    """
    import numpy as np

    parts = np.linspace(0, length, min(count, length) + 1).astype(int)
    found = [int(start + end - 1) // 2 for start, end in pairwise(parts)]
    return found + [found[-1]] * (count - len(found))
