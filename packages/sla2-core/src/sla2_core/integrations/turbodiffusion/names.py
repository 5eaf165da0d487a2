"""The layouts of a TurboDiffusion checkpoint, and its tensors under diffusers' names.

Three layouts are passed on. They differ in the names of the model's own tensors and of SLA's
projection, which is one a layer and shared by the heads:

| layout | the model's names | the projection |
|---|---|---|
| turbodiffusion | Wan's own | blocks.<i>.self_attn.attn_op.local_attn.proj_l |
| fastvideo | diffusers' | blocks.<i>.attn1.attn_impl.proj_l |
| sglang | diffusers' | blocks.<i>.attn1.attn_op.local_attn.proj_l |

A quantised checkpoint holds int8_weight and scale in the place of a weight.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 128  # rows and columns that share a scale
_PROJECTIONS = {
    "turbodiffusion": re.compile(
        r"blocks\.(\d+)\.self_attn\.attn_op\.local_attn\.proj_l\.(weight|bias)"
    ),
    "fastvideo": re.compile(r"blocks\.(\d+)\.attn1\.attn_impl\.proj_l\.(weight|bias)"),
    "sglang": re.compile(r"blocks\.(\d+)\.attn1\.attn_op\.local_attn\.proj_l\.(weight|bias)"),
}
# Wan's names -> diffusers', of the whole model and inside a block.
_MODEL = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
_ATTENTION = {
    **{name: f"to_{name}" for name in "qkv"},
    "o": "to_out.0",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
}
_INSIDE = {
    **{f"self_attn.{name}": f"attn1.{other}" for name, other in _ATTENTION.items()},
    **{f"cross_attn.{name}": f"attn2.{other}" for name, other in _ATTENTION.items()},
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}
_IN_A_BLOCK = re.compile(r"(blocks\.\d+\.)(.+)")


class Checkpoint(NamedTuple):
    """A checkpoint's tensors.

    Attributes:
        layout: "turbodiffusion", "fastvideo" or "sglang".
        weights: of the model, by diffusers' names, dequantised.
        projections: SLA's, {layer: {"weight": (d, d), "bias": (d,)}}, for layers 0, 1, ...
    """

    layout: str
    weights: dict[str, Tensor]
    projections: dict[int, dict[str, Tensor]]


def convert(source: str, tensors: Mapping[str, Tensor]) -> Checkpoint:
    """Tell the layout of a checkpoint and bring its tensors under diffusers' names.

    Args:
        source: the file they come from, for messages. tensors: by name, as it holds them.

    Raises:
        ValueError: no projection, names of several layouts, another name with proj_l in it, a
            layer without a projection, or a weight that is not quantised as `dequantized` says.
    """
    layouts: dict[str, str] = {}  # layout -> the first key that shows it
    projections: dict[int, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if "proj_l" not in key:
            rest[key] = value
            continue
        found = {name: m for name, p in _PROJECTIONS.items() if (m := p.fullmatch(key))}
        if not found:
            raise ValueError(
                f"{source}: expected SLA's projections at the names of TurboDiffusion, FastVideo"
                f" or sglang, got the key {key!r}"
            )
        ((name, match),) = found.items()
        layouts.setdefault(name, key)
        projections.setdefault(int(match[1]), {})[match[2]] = value
    if not layouts:
        raise ValueError(
            f"{source}: expected SLA's projections (blocks.0.self_attn.attn_op.local_attn.proj_l"
            ".weight or as FastVideo or sglang name it), found none"
        )
    if len(layouts) > 1:
        raise ValueError(
            f"{source}: expected one layout of names, got {' and '.join(layouts.values())}"
        )
    layout = next(iter(layouts))
    numbers = [int(m[1]) for key in rest if (m := re.match(r"blocks\.(\d+)\.", key))]
    for layer in range(max([*numbers, *projections]) + 1):
        lack = {"weight", "bias"} - set(projections.get(layer, {}))
        if lack:
            raise ValueError(
                f"{source}: expected proj_l.{min(lack)} of every layer, found none of layer {layer}"
            )
    weights = {}
    own = layout == "turbodiffusion"
    for key, value in dequantized(source, rest).items():
        renamed = _diffusers_name(key)
        target = renamed if own else key
        if target is None or not (own or renamed in (None, key)):
            kind = "Wan's own" if own else "diffusers'"
            raise ValueError(
                f"{source}: expected {kind} names beside {layouts[layout]}, got the key {key!r}"
            )
        weights[target] = value
    return Checkpoint(layout, weights, projections)


def _diffusers_name(key: str) -> str | None:
    """diffusers' name of a tensor that Wan's own code names `key`; None for one it does not
    have.
    """
    inside = _IN_A_BLOCK.fullmatch(key)
    prefix, own = inside.groups() if inside else ("", key)
    known = _INSIDE if inside else _MODEL
    if own in known:
        return prefix + known[own] if own.endswith("modulation") else None
    module, _, leaf = own.rpartition(".")
    return f"{prefix}{known[module]}.{leaf}" if module in known else None


def dequantized(source: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with a `weight` for each `int8_weight` and its `scale`: the product of both, in
    the dtype of the layer's bias (bf16 without one).

    Args:
        source: the file they come from, for messages.
        tensors: int8_weight int8 (out, in), scale fp32 (ceil(out / 128), ceil(in / 128)): one for
            128 x 128 weights.

    Raises:
        ValueError: a scale without int8 weights or the reverse, another shape or dtype, or a weight
            beside them.
    """
    out = {}
    for key, value in tensors.items():
        module, _, leaf = key.rpartition(".")
        if leaf == "scale" and f"{module}.int8_weight" not in tensors:
            raise ValueError(f"{source}: expected {module}.int8_weight beside {key}, found none")
        if leaf == "scale":
            continue
        if leaf != "int8_weight":
            out[key] = value
            continue
        if f"{module}.weight" in tensors:
            raise ValueError(f"{source}: expected no {module}.weight beside {key}, found one")
        scale = tensors.get(f"{module}.scale")
        if scale is None:
            raise ValueError(f"{source}: expected {module}.scale beside {key}, found none")
        blocks = tuple(-(-n // BLOCK) for n in value.shape)
        for name, given, dtype, shape in (
            (key, value, torch.int8, tuple(value.shape)),
            (f"{module}.scale", scale, torch.float32, blocks),
        ):
            if given.dtype != dtype or tuple(given.shape) != shape or len(shape) != 2:
                raise ValueError(
                    f"{source}: expected {dtype} in two dimensions for {name}"
                    f"{'' if given is value else f', shape {shape}'}, got {given.dtype} of shape"
                    f" {tuple(given.shape)}"
                )
        bias = tensors.get(f"{module}.bias")
        dtype = torch.bfloat16 if bias is None else bias.dtype
        out[f"{module}.weight"] = _product(value, scale).to(dtype)
    return out


def _product(weight: Tensor, scale: Tensor) -> Tensor:
    """int8 (out, in) times its scales, fp32."""
    rows, columns = weight.shape
    wide = scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return weight.float() * wide
