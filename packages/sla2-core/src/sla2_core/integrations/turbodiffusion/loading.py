"""A TurboDiffusion checkpoint as a diffusers transformer with SLA, and SLA2 from there on."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sla2_core import variants
from sla2_core.adapter import check_tensors, copy_tensors, read_tensors
from sla2_core.config import SLA2Config
from sla2_core.integrations.diffusers import apply_sla2
from sla2_core.integrations.handle import SLA2Handle
from sla2_core.integrations.turbodiffusion.names import Checkpoint, convert

PATCH = (1, 2, 2)
_LAYERS = {1536: 30, 5120: 40}  # by the width, of the models that TurboDiffusion publishes


def load_turbodiffusion(
    path: str | Path,
    *,
    topk: float = 0.1,
    block_q: int = 128,
    block_k: int = 64,
    torch_dtype: torch.dtype = torch.bfloat16,
) -> SLA2Handle:
    """Load an SLA checkpoint of TurboDiffusion: a WanTransformer3DModel with the variant
    "sla_published", in raster order.

    The files do not say which blocks they were trained with. The defaults are TurboDiffusion's own
    for inference (128 x 64, k% 0.1; it recommends 0.15); trained were 64 x 64. Its denominator of
    the linear branch has 1e-5 added, which is left out here: the branch changes by less than the
    rounding of bf16. Quantised checkpoints are dequantised; TurboDiffusion also rounds activations
    to int8 there, which is left out.

    Args:
        path: a .pth file (TurboDiffusion's own layout), a .safetensors file, or a folder of these
            (as converted for FastVideo or sglang; with transformer/ in it or not).
        topk: k% in (0, 1]. block_q, block_k: tokens in a query block and in a key block.
        torch_dtype: of the model. The projections and what diffusers keeps in fp32 are fp32.

    Returns:
        The handle; its `transformer` goes into a pipeline.

    Raises:
        FileNotFoundError, ValueError: no such file, one that is damaged or no mapping of names to
            tensors, names of several layouts, missing layers or tensors, tensors of other shapes,
            other names. One line that names the file.
    """
    source = str(path)
    found = convert(source, _read(Path(path)))
    transformer, head_dim = _transformer(source, found, torch_dtype)
    base = SLA2Config(
        head_dim=head_dim,
        num_heads=transformer.config.num_attention_heads,
        topk=topk,
        block_q=block_q,
        block_k=block_k,
        token_order="raster",
    )
    handle = apply_sla2(transformer, variants.sla_published(base))
    projections = {
        f"layers.{layer}.complement.{name}": value.float()
        for layer, values in found.projections.items()
        for name, value in values.items()
    }
    check_tensors(source, projections, handle.adapter_tensors())
    copy_tensors(projections, handle.adapter_tensors())
    return handle


def restart_as_sla2(handle: SLA2Handle, **changes: Any) -> SLA2Handle:
    """SLA2 in the place of SLA on the same weights, to be trained: the projection is dropped,
    router and alpha start anew.

    Args:
        handle: of load_turbodiffusion; of no use afterwards.
        changes: fields of SLA2Config that differ from the handle's, such as topk.

    Raises:
        ValueError: a field with a bad value; the handle is left as it was.
    """
    config = variants.sla2(handle.config).replaced(**changes)
    count = len(handle.family.attention_layers(handle.transformer))
    skipped = [i for i in range(count) if i not in handle.layers]
    dense_steps, base_model = handle.dense_steps, handle.base_model
    handle.remove()
    return apply_sla2(
        handle.transformer,
        config,
        skip_layers=skipped,
        dense_steps=dense_steps,
        base_model=base_model,
    )


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, or of all safetensors files of a folder, on the CPU."""
    if path.is_dir():
        folder = path / "transformer" if (path / "transformer").is_dir() else path
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{folder}: expected safetensors files, found none")
        found: dict[str, Tensor] = {}
        for file in files:
            part = read_tensors(file)
            if twice := sorted(set(part) & set(found)):
                raise ValueError(f"{file}: expected each tensor once, got {twice[0]!r} again")
            found |= part
        return found
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a checkpoint, found none")
    if path.suffix == ".safetensors":
        return read_tensors(path)
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path}: expected a checkpoint of torch.save or a .safetensors file, got another kind"
            " of file, or part of one"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged file fails in as many ways as it has parts
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: expected a readable checkpoint, got: {reason}") from None
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: expected tensors by name, got {type(content).__name__}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"{path}: expected tensors by name, got {type(value).__name__} at {name!r}"
            )
    return content


def _transformer(source: str, found: Checkpoint, dtype: torch.dtype) -> tuple[Any, int]:
    """The model of a checkpoint in eval mode, its sizes read off the tensors, and its head
    dimension.
    """
    from diffusers import WanTransformer3DModel

    weights = dict(found.weights)
    layers, head_dim = len(found.projections), len(found.projections[0]["bias"])

    def size(name: str, axis: int) -> int:
        value = weights.get(name)
        if value is None or value.ndim <= axis:
            raise ValueError(
                f"{source}: expected a tensor of the whole model under diffusers' name {name}, got"
                f" {'none' if value is None else f'shape {tuple(value.shape)}'}"
            )
        return value.shape[axis]

    width = size("patch_embedding.weight", 0)
    if layers != _LAYERS.get(width, layers):
        raise ValueError(
            f"{source}: expected {_LAYERS[width]} layers of a model of width {width}, got {layers}"
        )
    if width % head_dim:
        raise ValueError(
            f"{source}: expected projections of a head dimension that divides {width}, got"
            f" {head_dim}"
        )
    patch = weights["patch_embedding.weight"]
    channels = patch[0].numel() // math.prod(PATCH)
    # A linear layer over (channel, frame, row, column): what a convolution of that stride does.
    if patch.ndim == 2 and patch.shape[1] == channels * math.prod(PATCH):
        weights["patch_embedding.weight"] = patch.unflatten(1, (channels, *PATCH))
    config = {
        "patch_size": PATCH,
        "num_attention_heads": width // head_dim,
        "attention_head_dim": head_dim,
        "in_channels": channels,
        "out_channels": size("proj_out.weight", 0) // math.prod(PATCH),
        "text_dim": size("condition_embedder.text_embedder.linear_1.weight", 1),
        "freq_dim": size("condition_embedder.time_embedder.linear_1.weight", 1),
        "ffn_dim": size("blocks.0.ffn.net.0.proj.weight", 0),
        "num_layers": layers,
    }
    with torch.device("meta"):
        transformer = WanTransformer3DModel(**config)
    state = transformer.state_dict()
    expected = {
        name: value.to(weights[name].dtype) if name in weights else value
        for name, value in state.items()
    }
    check_tensors(source, weights, expected)
    kept = transformer._keep_in_fp32_modules
    for name, value in weights.items():
        if not value.is_floating_point():
            raise ValueError(f"{source}: expected floating numbers for {name}, got {value.dtype}")
        high = any(part in kept for part in name.split("."))
        weights[name] = value.to(torch.float32 if high else dtype)
    transformer.load_state_dict(weights, assign=True)
    _fill_buffers(transformer, config)
    return transformer.eval().requires_grad_(True), head_dim


def _fill_buffers(transformer: Any, config: dict[str, Any]) -> None:
    """Make what is computed and not stored, the rotary table, which lies on the meta device."""
    rope = type(transformer.rope)(config["attention_head_dim"], PATCH, transformer.rope.max_seq_len)
    transformer.rope = rope
