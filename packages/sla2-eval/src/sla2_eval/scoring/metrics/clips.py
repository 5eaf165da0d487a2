"""Clips of a video as the metrics of sets see them: which frames, which square of them, and what is
said where there are few.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sla2_eval.scoring.metrics.base import Sample, need_frames

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

# What StyleGAN-V does, and what else can be asked for. "crop": the centre square, its side first
# made `resolution` pixels, or the whole frame squeezed into a square, of which `resolution` is not
# used. "clips": of each video the first, or all that follow one another.
PROTOCOL = {"crop": "centre", "resolution": 256, "clips": "first"}
CHOICES = {"crop": ("centre", "none"), "clips": ("first", "all")}


def centre(frames: np.ndarray, side: int) -> np.ndarray:
    """The centre square of uint8 (T, H, W, 3) frames whose short side is first made `side` pixels,
    by Pillow's Lanczos filter: how StyleGAN-V prepares its data sets.
    """
    import numpy as np
    from PIL import Image

    height, width = frames.shape[1:3]
    size = (side * width // min(height, width), side * height // min(height, width))
    left, top = (round((length - side) / 2) for length in size)
    images = (Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS) for frame in frames)
    return np.stack([np.asarray(i.crop((left, top, left + side, top + side))) for i in images])


def square(frames: np.ndarray, device: str, side: int) -> Tensor:
    """Float (T, 3, side, side) in [0, 1], bilinear."""
    import torch
    from torch.nn.functional import interpolate

    x = torch.from_numpy(frames).to(device).permute(0, 3, 1, 2).float().div_(255.0)
    return interpolate(x, (side, side), mode="bilinear", align_corners=False)


def extractor(
    features: Callable[[np.ndarray], Tensor],
    settings: dict,
    cut: Callable[[np.ndarray, int], np.ndarray] = centre,
) -> Callable[[Sample], np.ndarray]:
    """A function of a video: `features` (d,) of its clips of settings["clip_frames"] frames, cut by
    PROTOCOL's settings, as (clips, d). It raises ValueError for a video shorter than a clip.
    """
    import numpy as np
    import torch

    length = settings["clip_frames"]

    def extract(sample: Sample) -> np.ndarray:
        need_frames(sample, length)
        last = len(sample.frames) - length if settings["clips"] == "all" else 0
        found = []
        with torch.inference_mode():
            for start in range(0, last + 1, length):
                clip = sample.frames[start : start + length]
                if settings["crop"] == "centre":
                    clip = cut(clip, settings["resolution"])
                found.append(features(clip).float().cpu().numpy())
        return np.stack(found)

    return extract


def in_order(features: np.ndarray, name: str) -> np.ndarray:
    """Features (n, d) in float64, rows sorted, so that the order of the videos does not change a
    bit of what is computed of them. Raises ValueError, for the metric `name`, below two rows.
    """
    import numpy as np

    if features.ndim != 2 or len(features) < 2:
        raise ValueError(
            f"{name}: expected at least 2 clips a side, got features of shape {features.shape}"
        )
    x = np.asarray(features, dtype=np.float64)
    return x[np.lexsort(x.T[::-1])]


def few(features: np.ndarray, reference: np.ndarray) -> list[str]:
    """A warning for each side with so few clips that a distance of the sets is worth little."""
    return [
        f"{len(found)} clips of the {side}: under 256 the distance says little, and is biased"
        " upwards"
        for side, found in (("videos", features), ("references", reference))
        if len(found) < 256
    ]
