"""Frechet video distance between the videos and the references, as sets."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sla2_eval.scoring.metrics import clips, videomae_model
from sla2_eval.scoring.metrics.base import MetricSpec, Sample
from sla2_eval.scoring.metrics.videomae_model import GIANT

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

# "covariance": divided by n, as StyleGAN-V does, or by n - 1.
_PROTOCOL = {**clips.PROTOCOL, "covariance": "population"}
_CHOICES = {**clips.CHOICES, "covariance": ("population", "sample")}

SPECS = (
    MetricSpec(
        name="fvd",
        kind="set",
        title="FVD (I3D)",
        definition=(
            "Frechet distance of I3D Kinetics-400 logits (400-d) of the first 16 frames, their"
            " centre square at 256 x 256, then 224 x 224 in [-1, 1]; covariances over n; float64,"
            " by eigenvalues"
        ),
        source="Unterthiner et al. 2018; StyleGAN-V, frechet_video_distance.py and its I3D",
        value_range=(0.0, None),
        higher_is_better=False,
        licence="Apache-2.0 (Kinetics-400 I3D)",
        weights=("i3d",),
        settings={"clip_frames": 16, "size": 224, **_PROTOCOL},
        choices=_CHOICES,
        revision=2,
    ),
    MetricSpec(
        name="fvd_videomae",
        kind="set",
        title="FVD (VideoMAE)",
        definition=(
            "the same distance of VideoMAE V2's ViT-g features (1408-d, fine-tuned on Something-"
            "Something V2), which see motion more than I3D does; frames in [0, 1]"
        ),
        source="Ge et al. 2024 (content-debiased FVD)",
        value_range=(0.0, None),
        higher_is_better=False,
        licence="MIT (VideoMAE V2)",
        weights=("videomae",),
        packages=("transformers",),
        settings={"clip_frames": 16, "size": 224, "model": GIANT, **_PROTOCOL},
        choices=_CHOICES,
        revision=3,
    ),
)


def load(name: str, settings: dict, device: str) -> Callable[[Sample], np.ndarray]:
    """The extractor: features (clips, d) of a video. It raises ValueError for a video shorter than
    a clip.
    """
    if name == "fvd":
        return clips.extractor(_i3d(settings, device), settings)
    return clips.extractor(_videomae(settings, device), settings, videomae_model.prepared)


def _i3d(settings: dict, device: str) -> Callable:
    from sla2_eval.scoring.metrics.loading import load_script

    detector = load_script("i3d", settings, device)

    def features(frames: np.ndarray) -> Tensor:
        clip = clips.square(frames, device, settings["size"]).permute(1, 0, 2, 3)[None] * 2 - 1
        return detector(clip, rescale=False, resize=False, return_features=True)[0]

    return features


def _videomae(settings: dict, device: str) -> Callable:
    model = videomae_model.VideoMAE(settings, device)

    def features(frames: np.ndarray) -> Tensor:
        return model.features(clips.square(frames, device, settings["size"]))

    return features


def frechet(first: np.ndarray, second: np.ndarray, *, ddof: int = 0) -> float:
    """The squared Frechet distance of the Gaussians fitted to two sets of features (n, d) and (m,
    d), in float64; covariances are divided by n - `ddof`.

    |mean1 - mean2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2)). With S = R'R, the eigenvalues of S1
    S2 are the squared singular values of R1 R2', so their roots come without a matrix square root,
    which rank-deficient sets would break. Rows are sorted first, so that the order of the videos
    does not change a bit. Raises ValueError below two rows.
    """
    import numpy as np

    means, roots = [], []
    for features in (first, second):
        x = clips.in_order(features, "fvd")
        means.append(x.mean(axis=0))
        roots.append(np.linalg.qr(x - means[-1], mode="r") / np.sqrt(len(x) - ddof))
    shared = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    spread = sum(float((root * root).sum()) for root in roots)
    return max(0.0, float(((means[0] - means[1]) ** 2).sum()) + spread - 2.0 * float(shared))


def reduce(name: str, features: np.ndarray, reference: np.ndarray, settings: dict) -> dict:
    """The distance between the videos' and the references' features, and warnings where few clips
    make it worth little.
    """
    warnings = clips.few(features, reference)
    for side, found in (("videos", features), ("references", reference)):
        count, dimension = found.shape
        if count <= dimension:
            warnings.append(
                f"{count} clips of the {side} for {dimension} dimensions: the covariance is"
                " rank-deficient"
            )
    ddof = 1 if settings["covariance"] == "sample" else 0
    return {"value": frechet(features, reference, ddof=ddof), "warnings": warnings}
