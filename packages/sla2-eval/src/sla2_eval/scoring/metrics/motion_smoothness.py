"""VBench's motion smoothness: how well the even frames foretell the odd ones, with a linear or a
learned interpolator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sla2_eval.scoring.metrics.base import MetricSpec, Sample, need_frames
from sla2_eval.scoring.metrics.loading import fill, load_tensors

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

SPECS = (
    MetricSpec(
        name="motion_smoothness",
        kind="unpaired",
        title="Motion smoothness",
        definition=(
            "1 - mean |odd frame - its interpolation from the even ones| / 255; the interpolator is"
            " AMT-S"
        ),
        source="VBench, motion_smoothness.py",
        value_range=(0.0, 1.0),
        higher_is_better=True,
        licence="CC-BY-NC-4.0 (AMT)",
        weights=("amt_s",),
        # Its own pins cannot live beside ours; AMT needs torch alone.
        packages=("vbench (pip install --no-deps vbench decord)",),
        vbench="motion_smoothness",
        settings={"model": {"corr_radius": 3, "corr_lvls": 4, "num_flows": 3}},
    ),
    MetricSpec(
        name="motion_smoothness_linear",
        kind="unpaired",
        title="Motion smoothness (linear)",
        definition=(
            "1 - mean |odd frame - mean of its two neighbours| / 255; not VBench's number, whose"
            " interpolator is AMT-S"
        ),
        source="VBench, motion_smoothness.py, with a linear interpolator",
        value_range=(0.0, 1.0),
        higher_is_better=True,
    ),
)


def load(name: str, settings: dict, device: str) -> Callable[[Sample], float]:
    """The scorer, three frames at a time."""
    difference = _linear() if name == "motion_smoothness_linear" else _amt(settings, device)

    def score(sample: Sample) -> float:
        need_frames(sample, 3)
        frames = sample.frames
        middles = range(1, len(frames) - 1, 2)
        doubled = sum(difference(frames[i - 1], frames[i], frames[i + 1]) for i in middles)
        return 1.0 - doubled / (2 * 255.0 * frames[0].size * len(middles))

    return score


def _linear() -> Callable:
    """Twice the summed absolute difference of a frame to the mean of its neighbours, an exact
    integer.
    """
    import numpy as np

    def difference(before: np.ndarray, now: np.ndarray, after: np.ndarray) -> int:
        before, now, after = (frame.astype(np.int32) for frame in (before, now, after))
        return int(np.abs(2 * now - before - after).sum(dtype=np.int64))

    return difference


def _amt(settings: dict, device: str) -> Callable:
    """The same to AMT-S's interpolation, cut to whole grey levels as VBench does; the network is
    VBench's own copy.
    """
    import importlib

    import numpy as np
    import torch
    from torch.nn.functional import pad

    network = importlib.import_module("vbench.third_party.amt.networks.AMT-S").Model(
        **settings["model"]
    )
    network = fill(network, load_tensors("amt_s", settings), "amt_s").to(device)
    half = torch.full((1, 1, 1, 1), 0.5, device=device)

    def padded(frame: np.ndarray) -> Tensor:
        x = torch.from_numpy(frame).to(device).permute(2, 0, 1)[None].float() / 255.0
        down, across = -x.shape[-2] % 16, -x.shape[-1] % 16
        return pad(
            x, (across // 2, across - across // 2, down // 2, down - down // 2), mode="replicate"
        )

    def difference(before: np.ndarray, now: np.ndarray, after: np.ndarray) -> int:
        with torch.inference_mode():
            found = network(padded(before), padded(after), half, scale_factor=1.0, eval=True)[
                "imgt_pred"
            ][0]
        top, left = (-now.shape[0] % 16) // 2, (-now.shape[1] % 16) // 2
        found = found[:, top : top + now.shape[0], left : left + now.shape[1]].permute(1, 2, 0)
        grey = (found * 255.0).clamp(0, 255).to(torch.uint8).cpu().numpy()
        return 2 * int(np.abs(grey.astype(np.int32) - now.astype(np.int32)).sum(dtype=np.int64))

    return difference
