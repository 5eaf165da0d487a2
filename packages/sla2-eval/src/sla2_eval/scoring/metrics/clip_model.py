"""OpenAI's CLIP through open_clip, from a local file: image and text features, normalised. Used by
several metrics.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sla2_eval.scoring.metrics.loading import CLIP_MEAN, CLIP_STD, fill, load_tensors, prepared

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

_CHUNK = 16
_EXTRA = (
    "input_resolution",
    "context_length",
    "vocab_size",
)  # of OpenAI's archives; not parameters


class Clip:
    """A CLIP model built from settings["model"] (a name of open_clip's, or its configuration) and
    the weights `name`.
    """

    def __init__(self, name: str, settings: dict, device: str):
        import open_clip

        model = settings["model"]
        config = dict(model) if isinstance(model, dict) else open_clip.get_model_config(model)
        self.side = config["vision_cfg"]["image_size"]
        tensors = {k: v.float() for k, v in load_tensors(name, settings).items() if k not in _EXTRA}
        config.pop("custom_text", None)
        self.model = fill(open_clip.CLIP(**config), tensors, name).to(device)
        self.tokenizer = open_clip.SimpleTokenizer(
            context_length=config["text_cfg"]["context_length"]
        )
        self.device = device

    def images(self, frames: np.ndarray, antialias: bool = True) -> Tensor:
        """Normalised features (n, d) of uint8 (n, H, W, 3) frames, in chunks of bounded memory."""
        import torch

        found = []
        with torch.inference_mode():
            for start in range(0, len(frames), _CHUNK):
                x = prepared(
                    frames[start : start + _CHUNK],
                    self.device,
                    self.side,
                    CLIP_MEAN,
                    CLIP_STD,
                    mode="bicubic",
                    crop=True,
                    antialias=antialias,
                )
                found.append(self.model.encode_image(x, normalize=True))
        return torch.cat(found)

    def text(self, prompt: str) -> Tensor:
        """The normalised feature (d,) of a prompt."""
        import torch

        with torch.inference_mode():
            return self.model.encode_text(self.tokenizer([prompt]).to(self.device), normalize=True)[
                0
            ]
