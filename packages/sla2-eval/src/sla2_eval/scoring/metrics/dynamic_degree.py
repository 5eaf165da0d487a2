"""VBench's dynamic degree: whether a video moves, by optical flow."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

from sla2_eval.scoring.metrics.base import MetricSpec, Sample, need_frames

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

SPECS = (
    MetricSpec(
        name="dynamic_degree",
        kind="unpaired",
        title="Dynamic degree",
        definition=(
            "1 if at least round(4 T / 16) pairs of frames, at about 8 a second, have a mean top-5"
            " % flow above 6 min(H, W) / 256"
        ),
        source="VBench, dynamic_degree.py; torchvision RAFT",
        value_range=(0.0, 1.0),
        higher_is_better=True,
        licence="BSD-3-Clause (torchvision)",
        weights=("raft",),
        packages=("torchvision",),
        vbench="dynamic_degree",
        settings={"model": "raft_large", "iterations": 20},
        revision=2,
    ),
)


def load(name: str, settings: dict, device: str) -> Callable[[Sample], float]:
    """The scorer: torchvision's RAFT, whose C_T_V2 weights were trained as the original raft-things
    was.
    """
    import torch
    import torchvision

    from sla2_eval.scoring.metrics.loading import fill, load_tensors

    model = getattr(torchvision.models.optical_flow, settings["model"])(
        weights=None, progress=False
    )
    model = fill(model, load_tensors("raft", settings), "raft").to(device)

    def flow(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            pair = [_padded(frame, device) for frame in (first, second)]
            return model(*pair, num_flow_updates=settings["iterations"])[-1][0].cpu().numpy()

    def score(sample: Sample) -> float:
        need_frames(sample, 2)
        frames = sample.frames[:: max(1, round(sample.fps / 8))]
        moved = [strongest(flow(a, b)) for a, b in pairwise(frames)]
        return float(moves(moved, len(frames), frames.shape[1:3], sample.fps))

    return score


def _padded(frame: np.ndarray, device: str) -> Tensor:
    """A uint8 (H, W, 3) frame as float (1, 3, h, w) in [-1, 1], replicated at its borders to
    multiples of 8.
    """
    import torch
    from torch.nn.functional import pad

    x = torch.from_numpy(frame).to(device).permute(2, 0, 1)[None].float() / 127.5 - 1
    down, across = -x.shape[-2] % 8, -x.shape[-1] % 8
    return pad(
        x, (across // 2, across - across // 2, down // 2, down - down // 2), mode="replicate"
    )


def strongest(flow: np.ndarray) -> float:
    """Mean length of the longest 5 % of the vectors of a flow (2, H, W), in pixels."""
    import numpy as np

    lengths = np.sqrt((flow.astype(np.float64) ** 2).sum(0)).reshape(-1)
    count = max(1, int(0.05 * lengths.size))
    return float(np.sort(lengths)[-count:].mean())


def moves(strengths: list[float], num_frames: int, size: tuple[int, int], fps: float) -> bool:
    """VBench's verdict: at least round(4 T / 16) pairs above 6 min(H, W) / 256 pixels; below 8 a
    second, 8 / fps times that.

    As there, a video without any pair does not move.
    """
    least = max(1.0, 8.0 / fps) * 6.0 * min(size) / 256.0
    return bool(strengths) and sum(strength > least for strength in strengths) >= round(
        4 * num_frames / 16.0
    )
