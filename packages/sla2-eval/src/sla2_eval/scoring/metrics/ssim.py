"""Structural similarity against the reference video, at one scale and at five."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sla2_eval.scoring.metrics.base import MetricSpec, Sample, chunks, need_reference

if TYPE_CHECKING:
    from torch import Tensor

_BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)

SPECS = (
    MetricSpec(
        name="ssim",
        kind="paired",
        title="SSIM",
        definition=(
            "structural similarity per frame (Gaussian, sigma 1.5; a border of half the window left"
            " out), mean over frames; data range 1, float64"
        ),
        source="Wang et al. 2004",
        value_range=(-1.0, 1.0),
        higher_is_better=True,
        settings={"data_range": 1.0, "sigma": 1.5},
        revision=2,
    ),
    MetricSpec(
        name="ms_ssim",
        kind="paired",
        title="MS-SSIM",
        definition=(
            "structural similarity at five scales per frame, then mean over frames; frames of at"
            " least 176 x 176; data range 1, float64"
        ),
        source="Wang et al. 2003",
        value_range=(0.0, 1.0),
        higher_is_better=True,
        settings={"data_range": 1.0, "sigma": 1.5, "betas": list(_BETAS)},
        revision=2,
    ),
)


def load(name: str, settings: dict, device: str) -> Callable[[Sample], float]:
    """The scorer. It raises ValueError for frames smaller than the window (at five scales, 16 times
    it).
    """
    import torch
    from torch.nn.functional import avg_pool2d

    border = int(3.5 * settings["sigma"] + 0.5)
    offsets = torch.arange(-border, border + 1, dtype=torch.float64)
    window = torch.exp(-(offsets**2) / (2 * settings["sigma"] ** 2))
    taps = (window / window.sum()).tolist()
    betas = settings["betas"] if name == "ms_ssim" else (1.0,)
    least = len(taps) * 2 ** (len(betas) - 1)

    def of_frame(x: Tensor, y: Tensor) -> float:
        value = 1.0
        for scale, beta in enumerate(betas):
            if scale:
                x, y = avg_pool2d(x, 2), avg_pool2d(y, 2)
            whole, structure = similarity(x, y, taps, settings["data_range"])
            found = float((whole if scale == len(betas) - 1 else structure).mean())
            # A negative mean has no power; at one scale it stands as it is.
            value *= found if len(betas) == 1 else max(0.0, found) ** beta
        return value

    def score(sample: Sample) -> float:
        height, width = sample.frames.shape[1:3]
        if min(height, width) < least:
            raise ValueError(
                f"{name}: expected frames of at least {least} x {least} pixels, got {height} x"
                f" {width}"
            )
        # A frame at a time, which holds some ten more of its size while it is computed.
        references = chunks(need_reference(sample), device, 1)
        pairs = zip(chunks(sample.frames, device, 1), references, strict=True)
        values = [of_frame(video.double(), reference.double()) for video, reference in pairs]
        return sum(values) / len(values)

    return score


def similarity(x: Tensor, y: Tensor, taps: list[float], data_range: float) -> tuple[Tensor, Tensor]:
    """The SSIM of each window of two float64 frames (1, 3, H, W), and its contrast and structure
    without luminance: float64 (1, 3, H - t + 1, W - t + 1) for t taps.

    Variances are differences of squares, which in float32 leave nothing of a bright flat frame:
    torchmetrics gives such a frame less than 1 with itself. In float64 the formula is exactly 1
    where x is y. torchmetrics in float64 is the same to rounding, at many times the time and
    memory.
    """
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mx, my = _blurred(x, taps), _blurred(y, taps)
    vx, vy = _blurred(x * x, taps) - mx * mx, _blurred(y * y, taps) - my * my
    vxy = _blurred(x * y, taps) - mx * my
    structure = (2 * vxy + c2) / (vx + vy + c2)
    return structure * (2 * mx * my + c1) / (mx * mx + my * my + c1), structure


def _blurred(x: Tensor, taps: list[float]) -> Tensor:
    """Weighted means along rows and columns, of whole windows alone. Shifted sums, as torch's
    convolution is slow on a CPU in float64.
    """
    for dim in (-2, -1):
        length = x.shape[dim] - len(taps) + 1
        found = x.narrow(dim, 0, length) * taps[0]
        for start, tap in enumerate(taps[1:], 1):
            found.add_(x.narrow(dim, start, length), alpha=tap)
        x = found
    return x
