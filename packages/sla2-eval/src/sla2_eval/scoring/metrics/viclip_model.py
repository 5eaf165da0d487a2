"""ViCLIP of InternVid from its own file, of open_clip's parts: features of eight frames and of a
text. The tensors have the names of VBench's copy (third_party/ViCLIP).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sla2_eval.scoring.metrics.loading import fill, load_tensors

if TYPE_CHECKING:
    from torch import Tensor

# ViT-L/14, and the text tower of 32 tokens; 224 x 224 pixels are 16 x 16 patches a frame.
LARGE = {
    "vision": {"width": 1024, "layers": 24, "heads": 16, "patch": 14, "patches": 256},
    "text": {"width": 768, "layers": 12, "heads": 12, "context_length": 32},
    "features": 768,
}


class ViCLIP:
    """The two towers of settings["model"]'s sizes with the weights `viclip`, for
    settings["frames"] frames.
    """

    def __init__(self, settings: dict, device: str):
        import open_clip

        sizes = settings["model"]
        tensors = load_tensors("viclip", settings)
        tensors = {n: t.float() for n, t in tensors.items() if n != "temp"}  # of training
        net = towers(**sizes, frames=settings["frames"])
        net = fill(net, tensors, "viclip").to(device)
        self._vision, self._text = net.vision_encoder, net.text_encoder
        length = sizes["text"]["context_length"]
        self._tokenizer = open_clip.SimpleTokenizer(context_length=length)
        self._device = device

    def video(self, frames: Tensor) -> Tensor:
        """The normalised feature (d,) of float (T, 3, H, W) frames: all patches of all frames
        attend to one another and to one class token.
        """
        import torch
        from torch.nn.functional import normalize

        net = self._vision
        x = net.conv1(frames.transpose(0, 1)[None])[0].flatten(2).permute(1, 2, 0)  # (T, n, d)
        positions = net.positional_embedding
        x = x + positions[1:] + net.temporal_positional_embedding[0][:, None]
        first = (net.class_embedding + positions[0])[None]
        x = net.ln_pre(torch.cat((first, x.flatten(0, 1))))[None]
        x = net.ln_post(net.transformer(x))[0, 0]
        return normalize(x @ net.proj, dim=-1)

    def text(self, prompt: str) -> Tensor:
        """The normalised feature (d,) of a prompt, cut to the tower's length."""
        from torch.nn.functional import normalize

        return normalize(self._text(self._tokenizer([prompt]).to(self._device))[0], dim=-1)


def towers(vision: dict, text: dict, features: int, frames: int) -> Any:
    """vision_encoder and text_encoder, empty."""
    from open_clip.transformer import QuickGELU, TextTransformer
    from torch import nn

    net: Any = nn.Module()
    net.vision_encoder = _vision(**vision, features=features, frames=frames)
    net.text_encoder = TextTransformer(**text, output_dim=features, act_layer=QuickGELU)
    return net


def _vision(
    width: int, layers: int, heads: int, patch: int, patches: int, features: int, frames: int
) -> Any:
    import torch
    from open_clip.transformer import QuickGELU, Transformer
    from torch import nn

    net: Any = nn.Module()
    cube = (1, patch, patch)
    net.conv1 = nn.Conv3d(3, width, cube, cube, bias=False)
    shapes = {
        "class_embedding": (width,),
        "positional_embedding": (patches + 1, width),
        "temporal_positional_embedding": (1, frames, width),
        "proj": (width, features),
    }
    for name, shape in shapes.items():
        net.register_parameter(name, nn.Parameter(torch.zeros(shape)))
    net.ln_pre, net.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
    net.transformer = Transformer(width, layers, heads, act_layer=QuickGELU)
    return net
