"""Loading from a folder or a hub id: adapters onto a model, and whole models saved with SLA2 folded
in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from sla2_core import adapter as files
from sla2_core.integrations import lora
from sla2_core.integrations.diffusers import apply_sla2
from sla2_core.integrations.family import family_of, transformer_class
from sla2_core.integrations.handle import SLA2Handle
from sla2_core.integrations.quantized import check_plain


def local_folder(source: str | Path, patterns: list[str], revision: str | None = None) -> Path:
    """`source` itself if it is a folder, else the folder of the hub's snapshot of that id.

    Args:
        source: a folder, or a hub id. revision: of the hub repository.
        patterns: the files to get from the hub, such as "*.json".

    Raises:
        FileNotFoundError: it is neither, or the hub cannot be reached.
    """
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=patterns))
    except Exception as error:  # every failure of the hub means the same here
        reason = str(error).strip().splitlines()[0].removeprefix("Got: ")
        raise FileNotFoundError(
            f"{source}: expected a folder or a hub id (owner/name) that can be reached, got:"
            f" {reason}"
        ) from None


def apply_adapter(
    transformer: nn.Module,
    source: str | Path,
    *,
    base_model: str | None = None,
    revision: str | None = None,
) -> SLA2Handle:
    """Apply SLA2 as an adapter says (configuration, layers, dense steps) and load its weights, and
    its LoRA where it has one.

    Args:
        transformer: the model the adapter was trained on.
        source: adapter folder or hub id. revision: of the hub repository.
        base_model: id of the transformer's weights, compared with the adapter's; None takes the
            adapter's.

    Raises:
        FileNotFoundError, ValueError: as SLA2Handle.load; the transformer is left as it was.
    """
    folder = local_folder(source, [files.CONFIG_NAME, files.WEIGHTS_NAME, lora.FILE], revision)
    found = files.load_adapter(folder)
    try:
        handle = _apply(transformer, found, base_model)
    except ValueError as error:
        raise ValueError(f"{folder / files.CONFIG_NAME}: {error}") from None
    added = None
    try:
        added = lora.load(transformer, folder)
        handle.load(folder)  # the weights come last: nothing takes them back
    except Exception:
        if added is not None:
            lora.take_out(transformer, added)
        handle.remove()
        raise
    return handle


def _apply(transformer: nn.Module, found: files.Adapter, base_model: str | None) -> SLA2Handle:
    count = len(family_of(transformer).attention_layers(transformer))
    unknown = [i for i in found.layers if not 0 <= i < count]
    if unknown:
        raise ValueError(
            f"transformer: expected at least {max(unknown) + 1} self-attention layers, got {count}"
        )
    skip = [i for i in range(count) if i not in found.layers]
    return apply_sla2(
        transformer,
        found.config,
        skip_layers=skip,
        dense_steps=found.dense_steps,
        base_model=base_model or found.base_model,
    )


def save_pretrained(handle: SLA2Handle, folder: str | Path, **options: Any) -> Path:
    """Save the transformer with SLA2 folded in: diffusers' own files, which hold SLA2's weights
    too, and the adapter's.

    diffusers alone loads such a folder as the plain model; from_pretrained loads it with SLA2.
    `options` go to the transformer's save_pretrained.

    Raises:
        ValueError: a LoRA is loaded, whose layers diffusers would save under names that it does not
            load; or its weights are quantised.
    """
    if found := lora.active(handle.transformer):
        raise ValueError(
            f"transformer: expected no LoRA in save_pretrained, got {found[0]!r}; fuse and unload"
            " it, or keep it apart and use handle.save"
        )
    check_plain("transformer", handle.model_tensors())
    handle.transformer.save_pretrained(folder, **options)
    return handle.save(folder)


def from_pretrained(
    source: str | Path,
    *,
    subfolder: str | None = None,
    torch_dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> SLA2Handle:
    """Load a transformer saved by save_pretrained; the handle's `transformer` goes into a pipeline.

    Args:
        source: folder of the transformer, or of a pipeline with `subfolder` in it, or a hub id of
            one.
        torch_dtype: of the model; router and alpha stay fp32.

    Raises:
        FileNotFoundError, ValueError: no such folder, no SLA2 in it, or files that do not fit; each
            names the file.
    """
    prefix = f"{subfolder}/" if subfolder else ""
    folder = local_folder(source, [f"{prefix}*.json", f"{prefix}*.safetensors"], revision) / prefix
    found = files.load_adapter(folder)
    name = files.read_json(folder / "config.json").get("_class_name")
    transformer = transformer_class(name, str(folder / "config.json")).from_pretrained(
        folder, torch_dtype=torch_dtype, use_safetensors=True
    )
    handle = _apply(transformer, found, found.base_model)
    files.check_tensors(str(folder / files.WEIGHTS_NAME), found.tensors, handle.adapter_tensors())
    files.copy_tensors(found.tensors, handle.adapter_tensors())
    return handle
