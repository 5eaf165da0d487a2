"""VBench's imaging quality: MUSIQ, which knows noise, blur and over-exposure."""

from __future__ import annotations

from collections.abc import Callable

from sla2_eval.scoring.metrics.base import MetricSpec, Sample, chunks

SPECS = (
    MetricSpec(
        name="imaging_quality",
        kind="unpaired",
        title="Imaging quality",
        definition="MUSIQ (SPAQ) / 100, long side at most 512, mean over frames",
        source="VBench, imaging_quality.py; pyiqa",
        value_range=(0.0, 1.0),
        higher_is_better=True,
        licence="Apache-2.0 (MUSIQ)",
        weights=("musiq",),
        packages=("pyiqa",),
        vbench="imaging_quality",
        vbench_scale=100.0,
        settings={"long_side": 512},
    ),
)


def load(name: str, settings: dict, device: str) -> Callable[[Sample], float]:
    """The scorer: pyiqa's MUSIQ, a frame at a time as VBench runs it."""
    import torch
    from pyiqa.archs.musiq_arch import MUSIQ
    from torch.nn.functional import interpolate

    from sla2_eval.scoring.metrics.loading import fill, load_tensors

    model = fill(MUSIQ(pretrained=False), load_tensors("musiq", settings), "musiq").to(device)

    def score(sample: Sample) -> float:
        values = []
        with torch.inference_mode():
            for frame in chunks(sample.frames, device, 1):
                height, width = frame.shape[-2:]
                scale = settings["long_side"] / max(height, width)
                if scale < 1:
                    frame = interpolate(
                        frame,
                        (int(scale * height), int(scale * width)),
                        mode="bilinear",
                        align_corners=False,
                    )
                values.append(float(model(frame)) / 100)
        return sum(values) / len(values)

    return score
