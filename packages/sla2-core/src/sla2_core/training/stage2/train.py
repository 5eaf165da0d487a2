"""Stage 2 (Alg. 1): fine-tune the model and alpha with hard top-k, a frozen router and the low-bit
forward switched on.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sla2_core.adapter import write_json
from sla2_core.integrations.handle import SLA2Handle
from sla2_core.integrations.lora import freeze_others as freeze_loras
from sla2_core.integrations.quantized import check_plain
from sla2_core.training.data import as_dataset, collate
from sla2_core.training.settings import check_fields, check_same
from sla2_core.training.stage2 import lora, state
from sla2_core.training.stage2.objectives import draw_sigma, noisy_and_target
from sla2_core.training.stage2.report import Stage2Report

SETTINGS_NAME = "stage2.json"
Progress = Callable[[int, int, dict[str, float]], None]  # see train_stage2


class TrainingStopped(FloatingPointError):
    """A loss or gradient was not finite; the message names the step, the layer and the last good
    checkpoint.
    """


@dataclass(frozen=True, kw_only=True)
class Stage2Config:
    """Settings of stage 2.

    Args:
        steps, batch_size: optimiser steps and samples in each (over all processes); the paper: 500,
            64 for 1.3B.
        learning_rate: of the model's weights. alpha_learning_rate: of alpha and of SLA's
            projection. 0 freezes.
        topk_steps: steps over which k% falls linearly from 1 to the layers' own, as VSA raises its
            sparsity; 0 trains at the layers' own throughout.
        draws: steps whose samples, noise and noise levels differ; they then come again in the same
            order. Where the predictions of the full-attention model are kept (targets.py), it is
            asked in so many steps alone. None draws anew in every step.
        warmup: steps of linear warm-up. decay: "constant" or "cosine" (to 0) afterwards.
        weight_decay, beta2, grad_clip: of AdamW; alpha is not decayed.
        loss: "diffusion" (the family's objective) or "distill" (the velocity of the frozen
            full-attention model).
        sigma: noise levels, "logit_normal" or "uniform", moved by `shift` as in the scheduler.
        sigma_range: the levels that are drawn, the distribution's share between these two: an
            expert of Wan2.2 trains on its own.
        caption_dropout: share of the samples trained without their condition.
        autocast: "bfloat16", "float16" (without loss scaling: small gradients vanish), "auto"
            (bfloat16 where the device computes it natively) or None, of the forward pass.
        accumulate: micro-batches per step. gradient_checkpointing: recompute the blocks in the
            backward pass.
        lora_rank: train LoRA matrices of this rank on the layers named `lora_targets` instead of
            the model's weights, beside a LoRA that is loaded, which stays as it is. None trains
            the weights.
        lora_merge: in the end they are merged into the weights, which the adapter then holds; False
            keeps them as a LoRA file beside the adapter's own tensors.
        ema: decay of an exponential moving average of what is trained, saved instead of the last
            weights; None is off.
        checkpoint_every, keep: steps between checkpoints, and how many to keep. seed: of every
            draw.
        tensorboard: also write the metrics as TensorBoard events.
    """

    steps: int = 500
    batch_size: int = 64
    learning_rate: float = 1e-5
    alpha_learning_rate: float = 1e-3
    topk_steps: int = 0
    draws: int | None = None
    warmup: int = 10
    decay: str = "constant"
    weight_decay: float = 0.0
    beta2: float = 0.99
    grad_clip: float = 1.0
    loss: str = "diffusion"
    sigma: str = "logit_normal"
    shift: float = 3.0
    sigma_range: tuple[float, float] = (0.0, 1.0)
    caption_dropout: float = 0.1
    autocast: str | None = None
    accumulate: int = 1
    gradient_checkpointing: bool = False
    lora_rank: int | None = None
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    lora_merge: bool = True
    ema: float | None = None
    checkpoint_every: int = 50
    keep: int = 2
    seed: int = 0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        check_fields(
            self,
            {
                "an integer >= 1": (
                    "steps",
                    "batch_size",
                    "accumulate",
                    "checkpoint_every",
                    "keep",
                    "lora_rank",
                    "draws",
                ),
                "an integer >= 0": ("topk_steps", "warmup", "seed"),
                "a number >= 0": ("learning_rate", "alpha_learning_rate", "weight_decay"),
                "a number > 0": ("grad_clip", "shift"),
                "a number in [0, 1]": ("caption_dropout", "ema"),
                "a number in [0, 1)": ("beta2",),
                "True or False": ("gradient_checkpointing", "tensorboard", "lora_merge"),
                "a list of names": ("lora_targets",),
                "a range in [0, 1]": ("sigma_range",),
            },
            optional=("lora_rank", "ema", "draws"),
        )
        if self.topk_steps >= self.steps:
            raise ValueError(
                f"topk_steps: expected fewer than the {self.steps} steps, got {self.topk_steps}"
            )
        for name, allowed in (
            ("loss", ("diffusion", "distill")),
            ("sigma", ("logit_normal", "uniform")),
            ("decay", ("constant", "cosine")),
            ("autocast", ("bfloat16", "float16", "auto", None)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}: expected one of {', '.join(map(str, allowed))}, got"
                    f" {getattr(self, name)!r}"
                )

    def to_dict(self) -> dict[str, Any]:
        """The fields. Those that version 0.1 did not have are left out where they have its
        behaviour, so that a run in its folders goes on.
        """
        found = asdict(self)
        ours = (
            ("sigma_range", (0.0, 1.0)),
            ("lora_merge", True),
            ("topk_steps", 0),
            ("draws", None),
        )
        for name, before in ours:
            value = found[name]
            if (tuple(value) if isinstance(value, list) else value) == before:
                del found[name]
        return found


def autocast_dtype(name: str | None, device: torch.device) -> torch.dtype | None:
    """What a forward pass computes in, for a value of Stage2Config.autocast: None is the dtype of
    its inputs. "auto" is bfloat16 where `device` computes it natively, else None.
    """
    if name == "auto":
        if device.type == "cpu":
            native = torch.cpu._is_avx512_bf16_supported()
        else:
            native = device.type != "cuda" or torch.cuda.is_bf16_supported(False)
        name = "bfloat16" if native else None
    return None if name is None else getattr(torch, name)


def train_stage2(
    handle: SLA2Handle,
    data: Any,
    config: Stage2Config,
    folder: str | Path,
    *,
    teacher: nn.Module | None = None,
    accelerator: Any = None,
    progress: Progress | None = None,
) -> Stage2Report:
    """Fine-tune; started again with the same folder, it goes on from its last checkpoint, to the
    bit in one process.

    Args:
        handle: SLA2 on the model to train, its k% and precision in force. The router is frozen
            meanwhile. The weights are best held in fp32, with `autocast` for the forward: in bf16
            small updates round away.
        data: (latents, text embeddings) tensors, or a data set with len() whose items are
            {"latents": ..., condition: ...}; an attribute `unconditional` = {condition: ...}
            replaces dropped conditions (zeros without it).
        folder: checkpoints, metrics, and in the end adapter/ with the model's weights.
        teacher: the full-attention model for loss="distill"; None copies the model as it is now, so
            a run that goes on needs its handle on the model it began with, not on one trained in
            part.
        accelerator: accelerate's Accelerator; None makes one, which reads `accelerate launch`'s or
            torchrun's environment. Under FSDP2 checkpoints and adapter are gathered whole, so that
            another number of processes can go on.
        progress: called as progress(step, steps, {"loss": ..., "grad_norm": ...}), by the main
            process.

    Raises:
        TrainingStopped: loss or gradients are not finite. ValueError: a disabled handle, a model
            with quantised weights, batch_size that the processes and `accumulate` do not divide, a
            folder of a run with other settings, data of the wrong form, FSDP settings that cannot
            work here. ModuleNotFoundError: no accelerate.
    """
    folder = Path(folder)
    if not isinstance(handle, SLA2Handle):
        raise TypeError(
            f"handle: expected what apply_sla2 returns, got {type(handle).__name__}; a model of"
            " your own is trained by a loop of your own"
        )
    if not handle.enabled:
        raise ValueError("handle: expected SLA2 enabled, got it disabled; call handle.enable()")
    check_plain("handle", handle.model_tensors())
    if accelerator is None:
        accelerator = _accelerator()
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if (
        plugin is not None and plugin.cpu_ram_efficient_loading
    ):  # of which accelerate asks methods that diffusers lacks
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading: expected false for a diffusers model, got true"
        )
    parts = accelerator.num_processes * config.accumulate
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size: expected a multiple of processes x accumulate = {parts}, got"
            f" {config.batch_size}"
        )
    data = as_dataset(data)
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps({"config": config.to_dict(), "sla2": handle.config.to_dict()}))
    _check_settings(folder / SETTINGS_NAME, settings, accelerator)
    if config.loss == "distill" and teacher is None:
        teacher = handle.dense_copy()
    run = _Run(handle, data, config, folder, teacher, accelerator)
    return run.train(progress)


def _accelerator() -> Any:
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "accelerate: expected it for stage 2, install sla2-core[train]"
        ) from None
    # The last block of a joint model computes text, and LTX-2 audio, that no loss reads.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    return Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[unused])


def _check_settings(path: Path, settings: dict[str, Any], accelerator: Any) -> None:
    if path.exists():
        sla2 = {name: value for name, value in settings["sla2"].items() if name != "backend"}
        check_same(path, settings | {"sla2": sla2})
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and not path.exists():
        write_json(path, settings)


class _Run:
    """The training loop: everything random about a step follows from the seed and the step, or
    from the step modulo `draws`.
    """

    def __init__(
        self,
        handle: SLA2Handle,
        data: Any,
        config: Stage2Config,
        folder: Path,
        teacher: nn.Module | None,
        accelerator: Any,
    ):
        self.handle, self.data, self.config, self.folder, self.accelerator = (
            handle,
            data,
            config,
            folder,
            accelerator,
        )
        self.family, self.transformer = handle.family, handle.transformer
        schedule = self.family.alphas_cumprod
        self.alphas_cumprod = None if schedule is None else schedule(self.transformer.config)
        self.dtype = autocast_dtype(config.autocast, accelerator.device)
        self.flags = _freeze(handle, config)
        if config.lora_rank:
            lora.add(self.transformer, config.lora_rank, config.lora_targets, config.seed)
            for parameter in handle.trained_in("stage2"):  # peft froze all of them
                parameter.requires_grad_(config.alpha_learning_rate > 0)
        if config.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        alphas = [p for p in handle.trained_in("stage2") if p.requires_grad]
        model = [p for p in handle.parameters()["model"] if p.requires_grad]
        wanted: list[dict[str, Any]] = [
            {"params": model, "lr": config.learning_rate, "peak": config.learning_rate},
            {
                "params": alphas,
                "lr": config.alpha_learning_rate,
                "peak": config.alpha_learning_rate,
                "weight_decay": 0.0,
            },
        ]
        wanted = [group for group in wanted if group["params"]]
        if not wanted:
            raise ValueError(
                "learning_rate, alpha_learning_rate: expected something to train, got nothing"
            )
        optimizer = torch.optim.AdamW(
            wanted,
            lr=config.learning_rate,
            betas=(0.9, config.beta2),
            weight_decay=config.weight_decay,
        )
        self.model, self.optimizer = accelerator.prepare(self.transformer, optimizer)
        self.teacher = (
            None if teacher is None else teacher.to(accelerator.device).eval().requires_grad_(False)
        )
        self.ema = state.start_ema(self.model) if config.ema is not None else None
        self.report = Stage2Report()
        self.topk = handle.config.topk

    def train(self, progress: Progress | None) -> Stage2Report:
        config, report = self.config, self.report
        last = state.load_latest(self.folder, self.model, self.optimizer, self.ema)
        if last is not None:
            report.steps, report.loss, report.grad_norm = last
        self.model.train()
        writer = None
        if config.tensorboard and self.accelerator.is_main_process:
            writer = state.open_writer(self.folder, report.steps)
        try:
            while report.steps < config.steps:
                loss, norm = self._one_step(report.steps)
                report.steps += 1
                report.loss.append(loss)
                report.grad_norm.append(norm)
                if report.steps % config.checkpoint_every == 0 or report.steps == config.steps:
                    state.save(
                        self.folder,
                        self.accelerator,
                        self.model,
                        self.optimizer,
                        self.ema,
                        report,
                        config.keep,
                    )
                if writer:
                    writer.add_scalar("loss", loss, report.steps)
                    writer.add_scalar("grad_norm", norm, report.steps)
                if progress and self.accelerator.is_main_process:
                    progress(report.steps, config.steps, {"loss": loss, "grad_norm": norm})
        finally:
            if writer:
                writer.close()
            if config.topk_steps:
                self.handle.configure(topk=self.topk)
            _restore(self.transformer, self.flags)
            self.model.eval()
        report.adapter = str(self.folder / "adapter")
        if self.ema is not None:
            state.use_ema(self.ema, self.model)
        kept = lora.NAME if config.lora_rank and not config.lora_merge else None
        if config.lora_rank and not kept:
            lora.merge(self.transformer)
        adapter = self.folder / "adapter"
        state.save_adapter(self.handle, self.accelerator, self.model, adapter, lora=kept)
        return report

    def _one_step(self, step: int) -> tuple[float, float]:
        config, accelerator = self.config, self.accelerator
        draw = step if config.draws is None else step % config.draws
        rng = np.random.default_rng([config.seed, 3, draw])
        index = rng.integers(len(self.data), size=config.batch_size)
        between = (config.sigma_range[0], config.sigma_range[1])
        sigma = draw_sigma(rng, config.batch_size, config.sigma, config.shift, between)
        dropped = rng.random(config.batch_size) < config.caption_dropout
        torch.manual_seed(int(rng.integers(2**62)))  # of dropout inside the model, if it has any
        if config.topk_steps:
            self.handle.configure(topk=_topk(step, self.topk, config.topk_steps))
        rate = _rate(step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        size = config.batch_size // (accelerator.num_processes * config.accumulate)
        total, batches = torch.zeros((), device=accelerator.device), []
        for part in range(config.accumulate):
            first = (accelerator.process_index * config.accumulate + part) * size
            mine = slice(first, first + size)
            batches.append(self._batch(draw, index[mine], sigma[mine], dropped[mine], first))
            with self._sync(part):
                loss = self._loss(batches[-1]) / config.accumulate
                total += loss.detach()
                accelerator.backward(loss)
        mean = float(accelerator.reduce(total, "mean"))
        norm = float(accelerator.clip_grad_norm_(self.model.parameters(), config.grad_clip))
        if not (np.isfinite(mean) and np.isfinite(norm)):
            self._stop(step, mean, norm, batches)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None and config.ema is not None:
            state.update_ema(self.ema, self.model, min(config.ema, (1 + step) / (10 + step)))
        return mean, norm

    def _sync(self, part: int) -> contextlib.AbstractContextManager[Any]:
        """Gradients are exchanged with the last micro-batch only."""
        return (
            contextlib.nullcontext()
            if part == self.config.accumulate - 1
            else self.accelerator.no_sync(self.model)
        )

    def _batch(
        self, draw: int, index: np.ndarray, sigma: Tensor, dropped: np.ndarray, first: int
    ) -> dict[str, Any]:
        """Clean and noisy latents, noise levels, target and conditions of a micro-batch, on the
        device.
        """
        device = self.accelerator.device
        items = collate(
            [self.data[int(i)] for i in index],
            dropped.tolist(),
            getattr(self.data, "unconditional", None),
        )
        clean = items.pop("latents").to(device).float()
        noise = []
        for place in range(
            len(index)
        ):  # by the sample's place in the whole batch: any number of processes draws the same
            rng = np.random.default_rng([self.config.seed, 4, draw, first + place])
            noise.append(torch.from_numpy(rng.standard_normal(clean.shape[1:], dtype=np.float32)))
        noisy, target = noisy_and_target(
            clean, torch.stack(noise).to(device), sigma.to(device), self.alphas_cumprod
        )
        conditions = {name: value.to(device) for name, value in items.items()}
        return {
            "noisy": noisy,
            "sigma": sigma.to(device),
            "target": target,
            "conditions": conditions,
        }

    def _predict(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        own = next(self.transformer.parameters()).dtype
        cast = {
            k: v.to(own) if v.dtype.is_floating_point else v for k, v in batch["conditions"].items()
        }
        with torch.autocast(batch["noisy"].device.type, self.dtype, enabled=self.dtype is not None):
            return self.family.predict(model, batch["noisy"].to(own), batch["sigma"], cast).float()

    def _loss(self, batch: Mapping[str, Any]) -> Tensor:
        target = batch["target"]
        if self.teacher is not None and self.config.loss == "distill":
            with torch.no_grad():
                target = self._predict(self.teacher, batch)
        return torch.nn.functional.mse_loss(self._predict(self.model, batch), target)

    def _stop(self, step: int, loss: float, norm: float, batches: list[dict[str, Any]]) -> None:
        """Raise TrainingStopped, naming the first weight, data or layer whose numbers are not
        finite.
        """
        layer = self._first_bad_layer(batches)
        good = state.latest(self.folder)
        last = str(good) if good else "none yet"
        raise TrainingStopped(
            f"step {step + 1}: loss {loss}, gradient norm {norm}, first not finite in {layer}; last"
            f" good checkpoint: {last}"
        )

    def _first_bad_layer(self, batches: list[dict[str, Any]]) -> str:
        found: list[str] = []

        def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                outputs = output if isinstance(output, (tuple, list)) else (output,)
                if any(
                    isinstance(x, Tensor) and not bool(torch.isfinite(x).all()) for x in outputs
                ):
                    found.append(name)

            return hook

        modules = [(name, m) for name, m in self.transformer.named_modules() if name]
        for name, parameter in self.transformer.named_parameters():
            if not state.is_finite(parameter):
                return f"the weight {name}"
        for batch in batches:
            for name, x in {"latents": batch["noisy"], **batch["conditions"]}.items():
                if not state.is_finite(x):
                    return f"the data's {name}"
        hooks = [module.register_forward_hook(watch(name)) for name, module in modules]
        try:
            with torch.no_grad():
                for batch in batches:
                    self._predict(self.transformer, batch)
        finally:
            for hook in hooks:
                hook.remove()
        if found:
            return found[0]
        graded = [(n, p.grad) for n, p in self.transformer.named_parameters() if p.grad is not None]
        bad = [name for name, grad in graded if not state.is_finite(grad)]
        if bad and len(bad) == len(graded):  # clipping spreads a NaN over all of them
            return "the gradients"
        return f"the gradient of {bad[-1]}" if bad else "the loss"


def _freeze(handle: SLA2Handle, config: Stage2Config) -> dict[str, bool]:
    """Set requires_grad for stage 2; returns what it was before, by name. A model parameter frozen
    before stays frozen.
    """
    own = {id(p) for p in handle.trained_in("stage2")}
    groups = handle.parameters()
    before = {name: p.requires_grad for name, p in handle.transformer.named_parameters()}
    for group, parameters in groups.items():
        for parameter in parameters if group != "model" else ():
            trained = id(parameter) in own and config.alpha_learning_rate > 0
            parameter.requires_grad_(trained)
    if config.learning_rate == 0 or config.lora_rank:
        for parameter in groups["model"]:
            parameter.requires_grad_(False)
    freeze_loras(handle.transformer)
    return before


def _restore(transformer: nn.Module, flags: dict[str, bool]) -> None:
    """Set requires_grad as it was; by name, since sharding replaces the parameters and LoRA moves
    them.
    """
    for name, parameter in transformer.named_parameters():
        own = state.plain_name(name)
        plain = own.replace(".base_layer.", ".")
        parameter.requires_grad_(flags.get(own, flags.get(plain, parameter.requires_grad)))


def _rate(step: int, config: Stage2Config) -> float:
    rise = min(1.0, (step + 1) / max(1, config.warmup))
    if config.decay == "constant":
        return rise
    return rise * 0.5 * (1 + float(np.cos(np.pi * step / config.steps)))


def _topk(step: int, last: float, steps: int) -> float:
    """k% of a step that falls linearly from 1 to `last` over `steps`."""
    return 1 + (last - 1) * min(1.0, step / steps)
