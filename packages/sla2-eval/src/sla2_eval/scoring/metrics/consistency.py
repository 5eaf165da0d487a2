"""VBench's subject and background consistency: how alike the frames' features are."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sla2_eval.scoring.metrics.base import MetricSpec, Sample, need_frames

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

SPECS = (
    MetricSpec(
        name="subject_consistency",
        kind="unpaired",
        title="Subject consistency",
        definition=(
            "mean over i >= 1 of (max(0, cos(f_i-1, f_i)) + max(0, cos(f_0, f_i))) / 2 of DINO"
            " ViT-B/16 features"
        ),
        source="VBench, subject_consistency.py",
        value_range=(0.0, 1.0),
        higher_is_better=True,
        licence="Apache-2.0 (DINO)",
        weights=("dino_b16",),
        packages=("timm",),
        vbench="subject_consistency",
        vbench_mean_over="frame pairs",
        settings={"model": "vit_base_patch16_224", "size": 224},
        revision=3,
    ),
    MetricSpec(
        name="background_consistency",
        kind="unpaired",
        title="Background consistency",
        definition="the same of CLIP ViT-B/32 image features",
        source="VBench, background_consistency.py",
        value_range=(0.0, 1.0),
        higher_is_better=True,
        licence="MIT (OpenAI CLIP)",
        weights=("clip_b32",),
        packages=("open_clip",),
        vbench="background_consistency",
        vbench_mean_over="frame pairs",
        settings={"model": "ViT-B-32-quickgelu"},
        revision=2,
    ),
)


def load(name: str, settings: dict, device: str) -> Callable[[Sample], float]:
    """The scorer over DINO's or CLIP's features of every frame."""
    if name == "subject_consistency":
        features = _dino(settings, device)
    else:
        from sla2_eval.scoring.metrics.clip_model import Clip

        clip = Clip("clip_b32", settings, device)

        def features(frames: np.ndarray) -> Tensor:
            return clip.images(frames, antialias=False)

    def score(sample: Sample) -> float:
        need_frames(sample, 2)
        return consistency(features(sample.frames).double().cpu().numpy())

    return score


def consistency(features: np.ndarray) -> float:
    """Mean over i >= 1 of (max(0, cos(f_i-1, f_i)) + max(0, cos(f_0, f_i))) / 2 of
    features (T, d).
    """
    import numpy as np

    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    before = np.maximum(0.0, (unit[:-1] * unit[1:]).sum(1))
    first = np.maximum(0.0, unit[1:] @ unit[0])
    return float(((before + first) / 2).mean())


def _dino(settings: dict, device: str) -> Callable:
    """Class-token features of DINO's ViT; frames keep their shape, with the short side 224, as
    VBench feeds them.
    """
    import timm
    import torch

    from sla2_eval.scoring.metrics.loading import (
        IMAGENET_MEAN,
        IMAGENET_STD,
        fill,
        load_tensors,
        prepared,
    )

    options = {"pretrained": False, "num_classes": 0, "dynamic_img_size": True}
    model = timm.create_model(settings["model"], **options)
    model = fill(model, load_tensors("dino_b16", settings), "dino_b16").to(device)
    patch = model.patch_embed.patch_size[0]

    def class_tokens(x: Tensor) -> Tensor:
        patches = model.patch_embed(x)  # (n, rows, columns, d)
        first, others = (
            model.pos_embed[:, :1],
            positions(model.pos_embed[:, 1:], patches.shape[1:3]),
        )
        first = (model.cls_token + first).expand(len(x), -1, -1)
        return model.norm(model.blocks(torch.cat((first, patches.flatten(1, 2) + others), 1)))[:, 0]

    def features(frames: np.ndarray) -> Tensor:
        found = []
        with torch.inference_mode():
            for start in range(0, len(frames), 8):
                x = prepared(
                    frames[start : start + 8],
                    device,
                    settings["size"],
                    IMAGENET_MEAN,
                    IMAGENET_STD,
                    mode="bilinear",
                    crop=False,
                    antialias=False,
                )
                found.append(
                    class_tokens(
                        x[..., : x.shape[-2] // patch * patch, : x.shape[-1] // patch * patch]
                    )
                )
        return torch.cat(found)

    return features


def positions(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """DINO's position embeddings (1, n, d) of a square grid for another `grid`: bicubic, by its
    scale with 0.1 patch added.

    Source: facebookresearch/dino, vision_transformer.py, interpolate_pos_encoding. timm's own
    resizing is antialiased.
    """
    from torch.nn.functional import interpolate

    side = round(table.shape[1] ** 0.5)
    if tuple(grid) == (side, side):
        return table
    square = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    scale = tuple((length + 0.1) / side for length in grid)
    return interpolate(square, scale_factor=scale, mode="bicubic").flatten(2).transpose(1, 2)
