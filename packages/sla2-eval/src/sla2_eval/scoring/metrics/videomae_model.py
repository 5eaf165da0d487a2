"""VideoMAE V2 through transformers, from its own file: the features of content-debiased FVD."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sla2_eval.scoring.metrics.loading import fill, load_tensors

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

# ViT-g. The original's layer norms have this epsilon, the last one too; transformers' default is
# another.
GIANT = {
    "hidden_size": 1408,
    "num_hidden_layers": 40,
    "num_attention_heads": 16,
    "intermediate_size": 6144,
    "patch_size": 14,
}
_EPSILON = 1e-6
_NAMES = {
    r"patch_embed\.proj": "embeddings.patch_embeddings.projection",
    r"blocks\.(\d+)\.norm1": r"encoder.layer.\1.layernorm_before",
    r"blocks\.(\d+)\.norm2": r"encoder.layer.\1.layernorm_after",
    r"blocks\.(\d+)\.attn\.proj": r"encoder.layer.\1.attention.output.dense",
    r"blocks\.(\d+)\.mlp\.fc1": r"encoder.layer.\1.intermediate.dense",
    r"blocks\.(\d+)\.mlp\.fc2": r"encoder.layer.\1.output.dense",
}


class VideoMAE:
    """The encoder built from settings["model"] (sizes under the names of VideoMAEConfig) and the
    weights `videomae`.
    """

    def __init__(self, settings: dict, device: str):
        from transformers import VideoMAEConfig, VideoMAEModel

        config = VideoMAEConfig(
            image_size=settings["size"],
            num_frames=settings["clip_frames"],
            layer_norm_eps=_EPSILON,
            **settings["model"],
        )
        model = VideoMAEModel(config)
        tensors = {k: v.float() for k, v in load_tensors("videomae", settings).items()}
        self._norm = [tensors.pop(f"fc_norm.{n}").to(device) for n in ("weight", "bias")]
        named = as_transformers(tensors, model.state_dict())
        self._model = fill(model, named, "videomae").to(device)
        self.device = device

    def features(self, clip: Tensor) -> Tensor:
        """The normalised mean over tokens (d,) of a float (T, 3, size, size) clip in [0, 1]."""
        from torch.nn.functional import layer_norm

        tokens = self._model(clip[None]).last_hidden_state[0]
        weight, bias = self._norm
        return layer_norm(tokens.mean(0), tokens.shape[1:], weight, bias, eps=_EPSILON)


def as_transformers(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The original's tensors, without its classifier, under transformers' names: there each of
    query, key and value has a matrix of its own. Where `expected` has a bias for the keys it is 0.
    """
    found = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        if stem == "head":
            continue
        for pattern, renamed in _NAMES.items():
            if re.fullmatch(pattern, stem):
                found[f"{re.sub(pattern, renamed, stem)}.{kind}"] = tensor
                break
        else:
            _add_attention(found, name, tensor)
    keys = [name for name in expected if name.endswith(".key.bias")]
    return found | {name: 0 * expected[name] for name in keys}


def _add_attention(found: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    """Query, key and value of one layer; another name is kept, and refused later."""
    match = re.fullmatch(r"blocks\.(\d+)\.attn\.(qkv\.weight|q_bias|v_bias)", name)
    if match is None:
        found[name] = tensor
        return
    to = f"encoder.layer.{match[1]}.attention.attention"
    if match[2] == "qkv.weight":
        for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
            found[f"{to}.{part}.weight"] = rows
    else:
        found[f"{to}.{'query' if match[2] == 'q_bias' else 'value'}.bias"] = tensor


def prepared(frames: np.ndarray, resolution: int) -> np.ndarray:
    """The centre square of uint8 (T, H, W, 3) frames whose short side is first made `resolution`
    pixels, bilinear and antialiased, the long one rounded up, grey levels down.
    """
    import math

    import torch
    from torch.nn.functional import interpolate

    height, width = frames.shape[1:3]
    short = min(height, width)
    size = [math.ceil(length * (resolution / short)) for length in (height, width)]
    size[0 if height <= width else 1] = resolution
    x = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255.0
    x = interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)
    top, left = (size[0] - resolution) // 2, (size[1] - resolution) // 2
    square = x[..., top : top + resolution, left : left + resolution]
    return (square * 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
