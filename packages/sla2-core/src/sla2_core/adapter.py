"""Saves and loads what was trained: sla2_adapter.safetensors beside sla2_config.json, written whole
or not at all.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sla2_core.config import SLA2Config

WEIGHTS_NAME = "sla2_adapter.safetensors"
CONFIG_NAME = "sla2_config.json"
FORMAT_VERSION = 2  # 1: SLA's projection was called proj, and `method` chose the variant


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter in memory.

    Args:
        config: the layers' configuration, with the k% and precision it was trained for.
        layers: which of the model's self-attention layers carry SLA2.
        model: {"class": transformer class, "config": its public configuration}.
        base_model: id or folder the weights belong to; None if the user gave none.
        dense_steps: denoising steps that ran with full attention.
        tensors: "layers.<i>.<parameter>" fp32; with fine-tuned weights also "model.<parameter>".
    """

    config: SLA2Config
    layers: tuple[int, ...]
    model: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    base_model: str | None = None
    dense_steps: int = 0


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Call write(temporary path) in the same folder, then rename the file to `path`. If write
    fails, its error comes through, `path` is as it was, and no temporary file stays. Others may
    read the file as the umask says, also where `write` makes it for its owner alone.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        write(partial)
        partial.chmod(mode)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically."""
    write_atomically(path, lambda partial: partial.write_text(json.dumps(content, indent=2) + "\n"))


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors as safetensors, atomically; tensors that share storage are copied.

    Raises OSError naming the file if it cannot be written, as on a full disk.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    whole = {
        name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()
    }
    try:
        write_atomically(path, lambda partial: save_file(whole, partial, metadata=metadata))
    except SafetensorError as error:
        raise OSError(f"{path}: expected to write it, got: {error}") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file to the CPU, by tensor name.

    Raises FileNotFoundError if it is missing and ValueError if it is damaged; both name the file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a safetensors file, found none")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a readable safetensors file, got: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises FileNotFoundError if the file is missing and ValueError if it holds something else; both
    name the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a JSON file, found none")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def save_adapter(adapter: Adapter, folder: str | Path) -> Path:
    """Write the two files into `folder`, which is made if need be; returns the folder.

    The weights are written first and the configuration last, so a folder with a configuration is
    complete. Raises OSError naming the file that cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_NAME).unlink(missing_ok=True)
    write_tensors(folder / WEIGHTS_NAME, adapter.tensors, {"format": "pt"})
    content = {
        "format_version": FORMAT_VERSION,
        "sla2": adapter.config.to_dict(),
        "layers": list(adapter.layers),
        "dense_steps": adapter.dense_steps,
        "base_model": adapter.base_model,
        "model": dict(adapter.model),
    }
    write_json(folder / CONFIG_NAME, content)
    return folder


def load_adapter(folder: str | Path) -> Adapter:
    """Read an adapter folder, its tensors to the CPU; files of format_version 1 are read too.

    Raises FileNotFoundError or ValueError, in one line that names the file and what is wrong.
    """
    folder = Path(folder)
    path = folder / CONFIG_NAME
    content = read_json(path)
    version = content.get("format_version")
    if version not in (1, FORMAT_VERSION):
        raise ValueError(f"{path}: expected format_version {FORMAT_VERSION}, got {version!r}")
    missing = [key for key in ("sla2", "layers", "model") if key not in content]
    if missing:
        raise ValueError(f"{path}: expected the key {missing[0]!r}, found none")
    steps = content.get("dense_steps", 0)
    for key, value, what, fits in (
        ("sla2", content["sla2"], "an object", isinstance(content["sla2"], dict)),
        ("layers", content["layers"], "layer numbers", _are_layers(content["layers"])),
        ("model", content["model"], "an object", isinstance(content["model"], dict)),
        ("dense_steps", steps, "an integer >= 0", isinstance(steps, int) and steps >= 0),
    ):
        if not fits:
            raise ValueError(f"{path}: expected {what} at {key!r}, got {value!r}")
    try:
        # Which files name that were written before there was another order.
        config = SLA2Config.from_dict({"token_order": "raster", **content["sla2"]})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    tensors = read_tensors(folder / WEIGHTS_NAME)
    return Adapter(
        config=config,
        layers=tuple(content["layers"]),
        model=content["model"],
        tensors={_upgraded(name, version): x for name, x in tensors.items()},
        base_model=content.get("base_model"),
        dense_steps=steps,
    )


def _upgraded(name: str, version: int) -> str:
    """The name of a tensor as it is today."""
    if version == 1 and name.startswith("layers."):
        return name.replace(".proj.", ".complement.")
    return name


def _are_layers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(i, int) for i in value)


def check_geometry(source: str, found: SLA2Config, expected: SLA2Config) -> None:
    """Raise ValueError unless both configurations have parameters of the same shape and meaning.

    Args:
        source: the file that `found` was read from, for the message.
    """
    theirs = found.geometry()
    for name, value in expected.geometry().items():
        if theirs.get(name) != value:
            raise ValueError(
                f"{source}: expected {name}={value!r} as applied, got {theirs.get(name)!r}"
            )


def check_tensors(source: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless `found` has exactly the keys of `expected`, in their shapes and
    dtypes.

    Args:
        source: the file that `found` was read from, for the message.
    """
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing:
        raise ValueError(
            f"{source}: expected the key {missing[0]!r}, found none ({len(missing)} missing)"
        )
    if extra:
        raise ValueError(
            f"{source}: expected no key {extra[0]!r}, found one ({len(extra)} unknown)"
        )
    for name, value in expected.items():
        if found[name].shape != value.shape:
            raise ValueError(
                f"{source}: expected shape {tuple(value.shape)} for {name}, got"
                f" {tuple(found[name].shape)}"
            )
        if found[name].dtype != value.dtype:
            raise ValueError(
                f"{source}: expected {value.dtype} for {name}, got {found[name].dtype}"
            )


def copy_tensors(found: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    """Copy the values of `found` into the tensors of `into`, in place and without gradients. The
    names and shapes are those that check_tensors has checked.
    """
    with torch.no_grad():
        for name, value in into.items():
            value.copy_(found[name])
