"""V-JEPA's encoder and attentive probe from their own files: the features of JEDi.

Blocks, patches and pooling have the names of facebookresearch/jepa (vision_transformer.py and
attentive_pooler.py), so that its tensors load as they are.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from sla2_eval.scoring.metrics.loading import IMAGENET_MEAN, IMAGENET_STD, fill, load_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn

# ViT-H/16; patches are of two frames.
HUGE = {"width": 1280, "layers": 32, "heads": 16, "patch": 16}
_TUBELET = 2


class VJEPA:
    """The encoder of settings["model"]'s sizes with the weights `vjepa`, and the pooling of its
    probe, `vjepa_probe`.
    """

    def __init__(self, settings: dict, device: str):
        import torch

        sizes = settings["model"]
        grid = (settings["clip_frames"] // _TUBELET, settings["size"] // sizes["patch"])
        net = encoder(**sizes, tokens=grid[0] * grid[1] ** 2)
        tensors = load_tensors("vjepa", settings)
        tensors = {name.removeprefix("backbone."): t.float() for name, t in tensors.items()}
        self._encoder = fill(net, tensors, "vjepa").to(device)
        probe = {n: t.float() for n, t in load_tensors("vjepa_probe", settings).items()}
        pooled = {
            name.removeprefix("pooler."): tensor
            for name, tensor in probe.items()
            if not name.startswith("linear.")  # the classes of Something-Something V2
        }
        self._pooler = fill(pooler(sizes["width"]), pooled, "vjepa_probe").to(device)
        self._heads = sizes["heads"]
        self._mean, self._std = (
            torch.tensor(values, device=device).view(3, 1, 1)
            for values in (IMAGENET_MEAN, IMAGENET_STD)
        )

    def features(self, clip: Tensor) -> Tensor:
        """The probe's pooled token (d,) of a float (T, 3, size, size) clip in [0, 1]."""
        from torch.nn.functional import scaled_dot_product_attention

        net = self._encoder
        x = net.patch_embed.proj(((clip - self._mean) / self._std).transpose(0, 1)[None])
        x = x.flatten(2).transpose(1, 2) + net.pos_embed
        for block in net.blocks:
            x = block(x)
        x = net.norm(x)

        cross = self._pooler.cross_attention_block
        query, attend = self._pooler.query_tokens, cross.xattn
        key, value = attend.kv(cross.norm1(x)).chunk(2, dim=-1)
        heads = (
            t.unflatten(-1, (self._heads, -1)).transpose(1, 2)
            for t in (attend.q(query), key, value)
        )
        mixed = scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        query = query + attend.proj(mixed)
        return (query + cross.mlp(cross.norm2(query)))[0, 0]


def encoder(width: int, layers: int, heads: int, patch: int, tokens: int) -> Any:
    """Its tensors: patch_embed.proj, pos_embed, blocks of timm's ViT, norm."""
    import torch
    from timm.models.vision_transformer import Block
    from torch import nn

    norm = partial(nn.LayerNorm, eps=1e-6)
    cube = (_TUBELET, patch, patch)
    net: Any = nn.Module()
    net.patch_embed = _holding(proj=nn.Conv3d(3, width, kernel_size=cube, stride=cube))
    net.register_parameter("pos_embed", nn.Parameter(torch.zeros(1, tokens, width)))
    blocks = (Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(layers))
    net.blocks = nn.ModuleList(blocks)
    net.norm = norm(width)
    return net


def pooler(width: int) -> Any:
    """Its tensors: query_tokens, and a block in which one query attends to all tokens."""
    import torch
    from timm.layers import Mlp
    from torch import nn

    attend = {"q": nn.Linear(width, width), "kv": nn.Linear(width, 2 * width)}
    net = _holding(
        cross_attention_block=_holding(
            norm1=nn.LayerNorm(width),
            xattn=_holding(**attend, proj=nn.Linear(width, width)),
            norm2=nn.LayerNorm(width),
            mlp=Mlp(width, 4 * width),
        )
    )
    net.register_parameter("query_tokens", nn.Parameter(torch.zeros(1, 1, width)))
    return net


def _holding(**modules: nn.Module) -> nn.Module:
    from torch import nn

    module = nn.Module()
    for name, child in modules.items():
        module.add_module(name, child)
    return module
