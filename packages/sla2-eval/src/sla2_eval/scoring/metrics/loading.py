"""Reads weight files for the metrics: digest checked, tensors only, and never a download."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from sla2_eval.scoring import weights
from sla2_eval.scoring.metrics.base import MetricUnavailable

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn
    from torch.jit import ScriptModule

Network = TypeVar("Network", bound="nn.Module")

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def weight_path(name: str, settings: dict) -> Path:
    """The verified weight file `name`, or the one that settings["files"] names. Raises
    MetricUnavailable if it is not right.
    """
    try:
        return weights.verified(name, settings.get("files"), settings.get("digests"))
    except weights.WeightsError as error:
        raise MetricUnavailable(f"unavailable: {error}") from error


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("constants.pkl") for name in archive.namelist())


def load_tensors(name: str, settings: dict) -> dict[str, Tensor]:
    """The state dict in a weight file: safetensors, a pickle of tensors alone, or a TorchScript
    archive's tensors.

    Raises MetricUnavailable if the file is missing, has another digest, or holds anything else.
    """
    import torch

    path = weight_path(name, settings)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if _is_torchscript(path):
            return dict(torch.jit.load(path, map_location="cpu").state_dict())
        # Mapped, not read: a trainer's file holds more than the tensors that are taken of it.
        mapped = zipfile.is_zipfile(path)
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        raise MetricUnavailable(
            f"unavailable: {path}: expected tensors, got {str(error).splitlines()[0]}"
        ) from error
    # as the trainers of AMT, pyiqa, VideoMAE and V-JEPA wrap them
    for key in ("state_dict", "params", "model", "module", "target_encoder", "classifier"):
        found = found.get(key, found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(
        isinstance(value, torch.Tensor) for value in found.values()
    ):
        raise MetricUnavailable(
            f"unavailable: {path}: expected a state dict, got {type(found).__name__}"
        )
    return {name.removeprefix("module."): tensor for name, tensor in found.items()}


def load_script(name: str, settings: dict, device: str) -> ScriptModule:
    """The TorchScript module in a weight file of pinned digest, in evaluation mode."""
    import torch

    path = weight_path(name, settings)
    try:
        return torch.jit.load(path, map_location=device).eval()
    except Exception as error:
        raise MetricUnavailable(
            f"unavailable: {path}: expected TorchScript, got {str(error).splitlines()[0]}"
        ) from error


def fill(module: Network, tensors: dict[str, Tensor], path: str) -> Network:
    """Load every tensor of `module`, no more and no fewer, and freeze it. Raises MetricUnavailable
    for another model's.
    """
    try:
        module.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise MetricUnavailable(f"unavailable: {path}: {' '.join(lines)[:300]}") from error
    return module.eval().requires_grad_(False)


def prepared(
    frames: np.ndarray,
    device: str,
    side: int,
    mean: tuple,
    std: tuple,
    *,
    mode: str,
    crop: bool,
    antialias: bool,
    whole: bool = False,
) -> Tensor:
    """Frames as a network takes them: float (n, 3, h, w), the short side `side`, perhaps
    centre-cropped, normalised.

    `frames` is uint8 (n, H, W, 3). `antialias=False` is how VBench resizes; the original CLIP does
    it with. `whole`: rounded to whole grey levels in 0 to 255 once resized, as torchvision leaves
    uint8 images.
    """
    import torch
    from torch.nn.functional import interpolate

    x = torch.from_numpy(frames).to(device).permute(0, 3, 1, 2).float()
    height, width = x.shape[-2:]
    size = (side * height // min(height, width), side * width // min(height, width))
    if size != (height, width):
        x = interpolate(x, size, mode=mode, align_corners=False, antialias=antialias)
        x = x.clamp_(0, 255).round_() if whole else x
    if crop:
        top, left = round((size[0] - side) / 2), round((size[1] - side) / 2)
        x = x[..., top : top + side, left : left + side]
    return (x / 255.0 - torch.tensor(mean, device=device).view(3, 1, 1)) / torch.tensor(
        std, device=device
    ).view(3, 1, 1)
