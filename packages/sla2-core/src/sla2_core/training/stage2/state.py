"""Checkpoints of stage 2: weights, optimiser and moving average as one safetensors file, written
whole or not at all.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sla2_core.adapter import read_tensors, write_tensors
from sla2_core.integrations.handle import SLA2Handle
from sla2_core.integrations.lora import save as save_lora
from sla2_core.training.stage2.report import Stage2Report

if TYPE_CHECKING:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

_NAME = re.compile(r"checkpoint-(\d{8})\.safetensors")


def _options() -> StateDictOptions:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, cpu_offload=True)


def latest(folder: Path) -> Path | None:
    """The newest checkpoint of a run; None if there is none."""
    found = sorted(
        path for path in folder.glob("checkpoint-*.safetensors") if _NAME.fullmatch(path.name)
    )
    return found[-1] if found else None


def save(
    folder: Path,
    accelerator: Any,
    model: nn.Module,
    optimizer: Any,
    ema: dict[str, Tensor] | None,
    report: Stage2Report,
    keep: int,
) -> None:
    """Write the checkpoint of `report.steps` and delete all but the last `keep`; all processes call
    it, the first one writes.

    Args:
        folder: of the run. accelerator: accelerate's. model, optimizer: as it prepared them.
        ema: the moving average by parameter name, or None.
        report: what the run did so far. keep: how many checkpoints stay.

    Raises:
        OSError: the file cannot be written; the message names it.
    """
    from torch.distributed.checkpoint.state_dict import get_state_dict

    # Any: get_state_dict's type is a union over everything that a state may hold.
    weights: Any
    optim: Any
    weights, optim = get_state_dict(model, _inner(optimizer), options=_options())
    average = _whole(ema) if ema is not None else {}
    if accelerator.is_main_process:
        tensors = {f"model.{name}": value for name, value in weights.items()}
        for name, values in optim["state"].items():
            tensors |= {f"optimizer.{key}.{name}": value for key, value in values.items()}
        tensors |= {f"ema.{name}": value for name, value in average.items()}
        tensors["loss"] = torch.tensor(report.loss, dtype=torch.float64)
        tensors["grad_norm"] = torch.tensor(report.grad_norm, dtype=torch.float64)
        write_tensors(folder / f"checkpoint-{report.steps:08d}.safetensors", tensors)
        old = sorted(
            path for path in folder.glob("checkpoint-*.safetensors") if _NAME.fullmatch(path.name)
        )
        for path in [
            *old[:-keep],
            *folder.glob(".checkpoint-*.partial"),
        ]:  # the latter of a process that was killed
            path.unlink()
    accelerator.wait_for_everyone()


def load_latest(
    folder: Path, model: nn.Module, optimizer: Any, ema: dict[str, Tensor] | None
) -> tuple[int, list[float], list[float]] | None:
    """Restore model, optimiser and moving average from the newest checkpoint, in place.

    Returns (steps, the loss of each, the gradient norm of each), or None if there is no checkpoint.
    Raises ValueError, naming the file, if it is damaged or of another model.
    """
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_state_dict

    path = latest(folder)
    if path is None:
        return None
    found = read_tensors(path)
    loss, grad_norm = found.pop("loss").tolist(), found.pop("grad_norm").tolist()
    weights: dict[str, Any] = {}
    moments: dict[str, Any] = {}
    average: dict[str, Tensor] = {}
    for name, value in found.items():
        kind, _, rest = name.partition(".")
        if kind == "model":
            weights[rest] = value
        elif kind == "ema":
            average[rest] = value
        else:
            key, _, parameter = rest.partition(".")
            moments.setdefault(parameter, {})[key] = value
    groups = get_optimizer_state_dict(model, _inner(optimizer))[
        "param_groups"
    ]  # gathered, only the first process has them
    try:
        set_state_dict(
            model,
            _inner(optimizer),
            model_state_dict=weights,
            optim_state_dict={"state": moments, "param_groups": groups},
            options=_options(),
        )
    except (KeyError, RuntimeError) as error:
        raise ValueError(
            f"{path}: expected a checkpoint of this model, got: {str(error).splitlines()[0]}"
        ) from None
    if ema is not None:
        for name, value in ema.items():
            _fill(value, average[name])
    return int(path.stem.removeprefix("checkpoint-")), loss, grad_norm


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)  # inside accelerate's wrapper


def _whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in tensors.items()
    }


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite; of a sharded tensor, those of this process."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return bool(torch.isfinite(local).all())


def _fill(target: Tensor, value: Tensor) -> None:
    if hasattr(target, "full_tensor"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(target, DTensor)
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    with torch.no_grad():
        target.copy_(value)


def plain_name(name: str) -> str:
    """A parameter's name in the model itself, out of the wrappers of data parallelism and
    checkpointing.
    """
    return name.removeprefix("module.").replace("_checkpoint_wrapped_module.", "")


def start_ema(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything that is trained, by parameter name (plain_name)."""
    return {
        plain_name(name): p.detach().clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


@torch.no_grad()
def update_ema(ema: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    """Move the average towards what is trained: ema = decay ema + (1 - decay) parameter, in
    place.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            ema[plain_name(name)].lerp_(parameter, 1 - decay)


@torch.no_grad()
def use_ema(ema: dict[str, Tensor], model: nn.Module) -> None:
    """Put the moving average into the model."""
    for name, parameter in model.named_parameters():
        if plain_name(name) in ema:
            parameter.copy_(ema[plain_name(name)])


def save_adapter(
    handle: SLA2Handle, accelerator: Any, model: nn.Module, folder: Path, *, lora: str | None = None
) -> None:
    """Write what was trained as an adapter, gathered from all processes; all call it, the first one
    writes. Raises OSError naming a file that cannot be written.

    Args:
        lora: the name of a LoRA, written as a file of its own in the place of the model's weights.
    """
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    weights: dict[str, Any] = get_model_state_dict(model, options=_options())
    if accelerator.is_main_process:
        handle.save(folder, include_model=lora is None, state=weights)
        if lora is not None:
            save_lora(handle.transformer, lora, folder, weights)
    accelerator.wait_for_everyone()


def open_writer(folder: Path, steps: int) -> Any:
    """A TensorBoard SummaryWriter in folder/tensorboard, for a run that has done `steps`. Steps
    after those, which a killed process had written, are dropped.

    Raises ModuleNotFoundError if tensorboard is missing.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "tensorboard: expected it for tensorboard=True, install sla2-core[train]"
        ) from None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=steps + 1)
