"""JEDi: maximum mean discrepancy between V-JEPA's features of the videos and of the references."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sla2_eval.scoring.metrics import clips
from sla2_eval.scoring.metrics.base import MetricSpec, Sample
from sla2_eval.scoring.metrics.vjepa_model import HUGE

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

SPECS = (
    MetricSpec(
        name="jedi",
        kind="set",
        title="JEDi (V-JEPA)",
        definition=(
            "100 times the squared maximum mean discrepancy with the kernel (x y / d)^2, each clip"
            " with itself included, of V-JEPA ViT-H/16 features pooled by its Something-Something"
            " V2 probe (1280-d) of the first 16 frames, at fvd's squares"
        ),
        source="Luo et al. 2024 (Beyond FVD); videojedi 1.1.0, JEDi.py and mmd_polynomial.py",
        value_range=(0.0, None),
        higher_is_better=False,
        licence="CC-BY-NC-4.0 (V-JEPA)",
        weights=("vjepa", "vjepa_probe"),
        packages=("timm",),
        settings={"clip_frames": 16, "size": 224, "model": HUGE, **clips.PROTOCOL},
        choices=clips.CHOICES,
    ),
)
_SCALE = 100.0  # of the distance, as the paper prints it


def load(name: str, settings: dict, device: str) -> Callable[[Sample], np.ndarray]:
    """The extractor: features (clips, d) of a video. It raises ValueError for a video shorter than
    a clip.
    """
    from sla2_eval.scoring.metrics.vjepa_model import VJEPA

    model = VJEPA(settings, device)

    def features(frames: np.ndarray) -> Tensor:
        return model.features(clips.square(frames, device, settings["size"]))

    return clips.extractor(features, settings)


def discrepancy(first: np.ndarray, second: np.ndarray) -> float:
    """The squared maximum mean discrepancy of two sets of features (n, d) and (m, d), in float64:
    mean k(x, x') + mean k(y, y') - 2 mean k(x, y) with k(x, y) = (x y / d)^2.

    That kernel's feature map is x x' / d, so it is the squared distance of the mean outer products,
    which never is below 0. Raises ValueError below two rows.
    """
    x, y = (clips.in_order(features, "jedi") for features in (first, second))
    apart = (x.T @ x / len(x) - y.T @ y / len(y)) / x.shape[1]
    return float((apart * apart).sum())


def reduce(name: str, features: np.ndarray, reference: np.ndarray, settings: dict) -> dict:
    """JEDi of the videos' and the references' features, and a warning for each side with few."""
    value = _SCALE * discrepancy(features, reference)
    return {"value": value, "warnings": clips.few(features, reference)}
