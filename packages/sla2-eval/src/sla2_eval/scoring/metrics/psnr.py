"""Peak signal-to-noise ratio against the reference video."""

from __future__ import annotations

from collections.abc import Callable

from sla2_eval.scoring.metrics.base import MetricSpec, Sample, chunks, need_reference

SPECS = (
    MetricSpec(
        name="psnr",
        kind="paired",
        title="PSNR (dB)",
        definition=(
            "10 log10(1 / mean squared error) per frame, at most 100 dB, then mean over frames;"
            " data range 1"
        ),
        source="torchmetrics.functional.image.peak_signal_noise_ratio",
        value_range=(0.0, 100.0),
        higher_is_better=True,
        packages=("torchmetrics",),
        settings={"data_range": 1.0, "limit": 100.0},
    ),
)


def load(name: str, settings: dict, device: str) -> Callable[[Sample], float]:
    """The scorer; equal frames have an infinite ratio and count as `limit`."""
    from sla2_eval.scoring.metrics.torchmetrics_functions import image_function

    ratio = image_function("psnr", "peak_signal_noise_ratio")

    def score(sample: Sample) -> float:
        values = []
        # A frame at a time: several of 480 x 720 at once take longer, as their memory comes fresh
        # from the system.
        references = chunks(need_reference(sample), device, 1)
        pairs = zip(chunks(sample.frames, device, 1), references, strict=True)
        for video, reference in pairs:
            frames = ratio(
                video, reference, data_range=settings["data_range"], reduction="none", dim=(1, 2, 3)
            )
            values += frames.double().clamp(max=settings["limit"]).tolist()
        return sum(values) / len(values)

    return score
