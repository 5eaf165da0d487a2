"""Learned perceptual image patch similarity to the reference video."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sla2_eval.scoring.metrics.base import (
    MetricSpec,
    MetricUnavailable,
    Sample,
    chunks,
    need_reference,
)
from sla2_eval.scoring.metrics.loading import load_tensors

if TYPE_CHECKING:
    from torch import nn

_NETS = {"lpips": ("alex", "AlexNet", "alexnet"), "lpips_vgg": ("vgg", "VGG-16", "vgg16")}
_NETS |= {"lpips_squeeze": ("squeeze", "SqueezeNet", "squeezenet")}

SPECS = tuple(
    MetricSpec(
        name=name,
        kind="paired",
        title="LPIPS" if name == "lpips" else f"LPIPS ({title})",
        definition=(
            f"distance of {title} features per frame, linearly weighted, mean over frames; input in"
            " [-1, 1]"
        ),
        source="Zhang et al. 2018; lpips 0.1",
        value_range=(0.0, None),
        higher_is_better=False,
        licence="BSD-2-Clause (lpips), BSD-3-Clause (torchvision)",
        weights=(weights,),
        packages=("lpips",),
        settings={"net": net},
    )
    for name, (net, title, weights) in _NETS.items()
)


def load(name: str, settings: dict, device: str) -> Callable[[Sample], float]:
    """The scorer. The linear heads come with the package; the network's features from torchvision's
    file.
    """
    import warnings

    import lpips
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = lpips.LPIPS(net=settings["net"], pnet_rand=True, verbose=False)
    _fill_features(model.net, load_tensors(_NETS[name][2], settings), name)
    model = model.to(device).eval().requires_grad_(False)

    def score(sample: Sample) -> float:
        values = []
        with torch.inference_mode():
            references = chunks(need_reference(sample), device, 8)
            for video, reference in zip(chunks(sample.frames, device, 8), references, strict=True):
                values += model(video * 2 - 1, reference * 2 - 1).double().reshape(-1).tolist()
        return sum(values) / len(values)

    return score


def _fill_features(net: nn.Module, tensors: dict, name: str) -> None:
    """Put torchvision's `features.N.*` into lpips's slices, which name the same layers
    `sliceK.N.*`.
    """
    state = {}
    for key, value in net.state_dict().items():
        source = "features." + key.partition(".")[2]
        if source not in tensors or tensors[source].shape != value.shape:
            raise MetricUnavailable(
                f"unavailable: {name}: expected {source} of shape {tuple(value.shape)} in its"
                " weights"
            )
        state[key] = tensors[source]
    net.load_state_dict(state)
