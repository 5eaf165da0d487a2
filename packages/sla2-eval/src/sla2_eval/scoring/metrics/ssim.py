"""Structural similarity against the reference video, at one scale and at five."""

from __future__ import annotations

from collections.abc import Callable

from sla2_eval.scoring.metrics.base import MetricSpec, Sample, chunks, need_reference

_BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)

SPECS = (
    MetricSpec(
        name="ssim",
        kind="paired",
        title="SSIM",
        definition=(
            "structural similarity per frame (Gaussian, sigma 1.5; a border of half the window left"
            " out), mean over frames"
        ),
        source=(
            "Wang et al. 2004; torchmetrics.functional.image.structural_similarity_index_measure"
        ),
        value_range=(-1.0, 1.0),
        higher_is_better=True,
        packages=("torchmetrics",),
        settings={"data_range": 1.0, "sigma": 1.5},
    ),
    MetricSpec(
        name="ms_ssim",
        kind="paired",
        title="MS-SSIM",
        definition=(
            "structural similarity at five scales per frame, then mean over frames; frames of at"
            " least 176 x 176; data range 1"
        ),
        source=(
            "Wang et al. 2003;"
            " torchmetrics.functional.image.multiscale_structural_similarity_index_measure"
        ),
        value_range=(0.0, 1.0),
        higher_is_better=True,
        packages=("torchmetrics",),
        settings={"data_range": 1.0, "sigma": 1.5, "betas": list(_BETAS)},
    ),
)


def load(name: str, settings: dict, device: str) -> Callable[[Sample], float]:
    """The scorer. It raises ValueError for frames smaller than the window (at five scales, 16 times
    it).
    """
    from sla2_eval.scoring.metrics.torchmetrics_functions import image_function

    options = {"data_range": settings["data_range"], "sigma": settings["sigma"]}
    border = int(3.5 * settings["sigma"] + 0.5)
    if name == "ms_ssim":
        similarity = image_function("ssim", "multiscale_structural_similarity_index_measure")
        options |= {"betas": tuple(settings["betas"]), "normalize": "relu", "reduction": "none"}
        scales = len(settings["betas"])
        least = max(
            2 * border * 2 ** (scales - 1) + 1, 11 * max(1, scales - 1) ** 2
        )  # the latter is torchmetrics' own
    else:
        similarity = image_function("ssim", "structural_similarity_index_measure")
        options |= {"return_full_image": True}
        least = 2 * border + 1

    def score(sample: Sample) -> float:
        height, width = sample.frames.shape[1:3]
        if min(height, width) < least:
            raise ValueError(
                f"{name}: expected frames of at least {least} x {least} pixels, got {height} x"
                f" {width}"
            )
        values = []
        # A frame at a time, which holds some twenty more of its size while it is computed.
        references = chunks(need_reference(sample), device, 1)
        pairs = zip(chunks(sample.frames, device, 1), references, strict=True)
        for video, reference in pairs:
            found = similarity(video, reference, **options)
            if name == "ssim":
                found = found[1][..., border:-border, border:-border].mean(dim=(1, 2, 3))
            values += found.double().reshape(-1).tolist()
        return sum(values) / len(values)

    return score
