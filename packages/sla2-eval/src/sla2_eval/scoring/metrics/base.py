"""What a metric is: its description, what it is given, and how it says that it cannot run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sla2_eval.scoring.vbench_dimensions import DIMENSIONS

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

KINDS = ("paired", "unpaired", "set")


class MetricUnavailable(RuntimeError):
    """A metric that cannot run here; the message is one line that says what is missing and how to
    get it.
    """


class LeftOut(Exception):
    """A video that a metric's protocol does not count; the message is one line that says why."""


@dataclass(frozen=True, kw_only=True)
class MetricSpec:
    """The description of a metric, which `sla2 score --list` prints and every result refers to.

    A module of this package describes its metrics in `SPECS`, may say in `lacks()` what they need
    that is neither package nor weights (None: it is there), and offers `load(name, settings,
    device)`, which returns a function of one Sample: a float, or for `kind="set"` float features
    (n, d), which `reduce(name, features, reference_features, settings)` of the same module turns
    into {"value": float, "warnings": [str, ...]}. The function raises LeftOut for a video that
    does not count.
    """

    name: str
    # "paired": against the reference of the same name; "unpaired": by itself; "set": all videos
    # against all references
    kind: str
    title: str
    definition: str
    source: str
    value_range: tuple[float | None, float | None]
    higher_is_better: bool
    licence: str = "none needed"  # of the weights
    weights: tuple[str, ...] = ()  # names in sla2_eval.scoring.weights
    # optional Python packages, by import name; what no package index has, as "name (what it is)"
    packages: tuple[str, ...] = ()
    needs_prompt: bool = False
    binary: bool = False  # 0 or 1 a video, so that its mean is a proportion
    tiny_only: bool = False  # understands the captions of the built-in data set alone
    vbench: str | None = None  # the VBench dimension this is
    # what VBench's total of the dimension is a mean over: every video counts alike, or every pair
    # of neighbouring frames, so that long videos count more
    vbench_mean_over: str = "videos"  # or "frame pairs"
    vbench_scale: float = 1.0  # of VBench's values of single videos, over its total and ours
    settings: dict[str, Any] = field(
        default_factory=dict
    )  # defaults; a result is stored under the hash of what was used
    choices: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # of settings with names
    revision: int = 1  # raised when the same settings give another number

    def normalised(self, value: float) -> float | None:
        """VBench's normalisation, (value - min) / (max - min), unclipped; None for metrics that
        VBench does not have.
        """
        return None if self.vbench is None else DIMENSIONS[self.vbench].normalised(value)


@dataclass(frozen=True)
class Sample:
    """One decoded video: uint8 (T, H, W, 3) RGB frames, the reference's frames for paired metrics,
    and the prompt.
    """

    frames: np.ndarray
    fps: float
    reference: np.ndarray | None = None
    prompt: str | None = None


def chunks(frames: np.ndarray, device: str, size: int) -> Iterator[Tensor]:
    """Float32 (n, 3, H, W) pieces of uint8 (T, H, W, 3) frames in [0, 1], n <= `size`, so that
    memory stays bounded.
    """
    import torch

    for start in range(0, len(frames), size):
        piece = torch.from_numpy(frames[start : start + size]).to(device)
        yield piece.permute(0, 3, 1, 2).to(torch.float32).div_(255.0)


def need_frames(sample: Sample, least: int) -> None:
    """Raise ValueError if the video has fewer than `least` frames."""
    if len(sample.frames) < least:
        raise ValueError(f"expected at least {least} frames, got {len(sample.frames)}")


def need_reference(sample: Sample) -> np.ndarray:
    """The reference's frames. Raises ValueError if the video has no reference."""
    if sample.reference is None:
        raise ValueError("expected a reference video, got none")
    return sample.reference


def need_prompt(sample: Sample) -> str:
    """The prompt. Raises ValueError if the video has none."""
    if sample.prompt is None:
        raise ValueError("expected a prompt, got none")
    return sample.prompt
