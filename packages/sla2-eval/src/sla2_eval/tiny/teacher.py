"""Trains a tiny teacher: flow matching on captioned mp4 files, Muon for the matrices and AdamW for
the rest.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sla2_core.adapter import read_tensors, write_atomically, write_tensors
from sla2_core.training.settings import check_fields
from torch import Tensor

from sla2_eval.runs.folders import note_settings
from sla2_eval.tiny import model as tiny
from sla2_eval.tiny.shapes import FPS, NUM_FRAMES, SIZE, sample
from sla2_eval.videos.dataset import read_folder, write_folder

Optimizers = list[torch.optim.Optimizer]
DTYPES = ("float32", "bfloat16", "float16")
CACHED_SCORES = 2**21  # of a head: 512 rows of 4,096 keys


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Settings of `sla2 train teacher`. `videos`: a folder that `dataset.read_folder` accepts; None
    takes `num_videos` of the built-in scenes. `model`: which of the built-in models' form. `start`:
    a built-in model of larger patches, or a folder of one, to start from; None starts from random
    weights. `steps` includes the linear cooldown of the last `cooldown` steps.
    """

    model: str = "tiny-1k"
    start: str | None = None
    videos: Path | None = None
    num_videos: int = 6000
    seed: int = 0
    steps: int = 6000
    batch_size: int = 8
    learning_rate: float = 2e-3
    warmup: int = 100
    cooldown: int = 2000
    weight_decay: float = 0.01
    caption_dropout: float = 0.1
    ema: float = 0.999
    checkpoint_every: int = 250
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        whole = ("num_videos", "steps", "batch_size", "warmup", "cooldown", "checkpoint_every")
        check_fields(
            self,
            {
                "an integer >= 1": whole,
                "an integer >= 0": ("seed",),
                "a number > 0": ("learning_rate",),
                "a number >= 0": ("weight_decay",),
                "a number in [0, 1]": ("caption_dropout",),
                "a number in [0, 1)": ("ema",),
            },
        )
        for name, allowed in (("dtype", DTYPES), ("model", tuple(tiny.PATCHES))):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )


def cached_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Full attention on (B, N, H, d), so many rows of a head at a time that their scores stay in
    the CPU's cache.
    """
    batch, length, heads, _ = query.shape
    rows = max(1, CACHED_SCORES // length)
    query = query * query.shape[-1] ** -0.5
    out = []
    for video in range(batch):
        for head in range(heads):
            keys, values = key[video, :, head].transpose(0, 1), value[video, :, head]
            parts = [
                torch.matmul(torch.softmax(torch.matmul(part, keys), dim=-1), values)
                for part in query[video, :, head].split(rows)
            ]
            out.append(torch.cat(parts))
    return torch.stack(out).unflatten(0, (batch, heads)).transpose(1, 2)


def _start(config: TeacherConfig) -> dict[str, Tensor]:
    """The weights of `config.start` for patches of `config.model`'s size."""
    start = str(config.start)
    folder = tiny.weights_of(start) if start in tiny.NAMES else Path(start)
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    if not path.is_file():
        raise ValueError(f"start: expected a tiny model's weights at {path}, got none")
    return tiny.with_smaller_patches(read_tensors(path), config.model)


def _optimizers(transformer: Any, config: TeacherConfig) -> Optimizers:
    matrices: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for name, parameter in transformer.named_parameters():
        hidden = (
            parameter.ndim == 2 and name.startswith("blocks.") and "scale_shift_table" not in name
        )
        (matrices if hidden else rest).append(parameter)
    return [
        torch.optim.Muon(
            matrices,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(
            rest, lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.98)
        ),
    ]


def _rate(step: int, config: TeacherConfig) -> float:
    return min(1.0, (step + 1) / config.warmup, (config.steps - step) / config.cooldown)


def _draw(
    step: int, config: TeacherConfig, num_videos: int
) -> tuple[np.ndarray, Tensor, Tensor, Tensor]:
    """Everything random about one step, from (seed, step) alone, so that a resumed run repeats the
    original.
    """
    rng = np.random.default_rng([config.seed, 1, step])
    index = rng.integers(num_videos, size=config.batch_size)
    u = 1 / (1 + np.exp(-rng.normal(size=config.batch_size)))
    sigma = torch.from_numpy(tiny.SHIFT * u / (1 + (tiny.SHIFT - 1) * u)).float()
    dropped = torch.from_numpy(rng.random(config.batch_size) < config.caption_dropout)
    noise = torch.from_numpy(
        rng.standard_normal((config.batch_size, *tiny.LATENT_SHAPE), dtype=np.float32)
    )
    return index, sigma, dropped, noise


def _save(
    folder: Path, step: int, transformer: Any, ema: dict[str, Tensor], optimizers: Optimizers
) -> None:
    tensors = {f"model.{k}": v for k, v in transformer.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in ema.items()}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {
                f"opt{number}.{index}.{k}": v for k, v in state.items() if isinstance(v, Tensor)
            }
    tensors["step"] = torch.tensor(step)
    write_tensors(folder / "checkpoint.safetensors", tensors)


def _load(path: Path, transformer: Any, ema: dict[str, Tensor], optimizers: Optimizers) -> int:
    tensors = read_tensors(path)
    transformer.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    for name in ema:
        ema[name].copy_(tensors[f"ema.{name}"])
    for number, optimizer in enumerate(optimizers):
        state = optimizer.state_dict()
        for key, value in tensors.items():
            if key.startswith(f"opt{number}."):
                _, index, field = key.split(".")
                state["state"].setdefault(int(index), {})[field] = value
        optimizer.load_state_dict(state)
    return int(tensors["step"])


def _cut(log: Path, step: int) -> None:
    """Leave out the lines behind the step of the checkpoint: those steps are run again."""
    if log.exists():
        lines = log.read_text().splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        write_atomically(log, lambda partial: partial.write_text("".join(kept)))


def write_dataset(folder: Path, config: TeacherConfig) -> None:
    """The built-in data set as mp4 files of 128 x 128 pixels with a manifest."""
    scenes = (sample(config.seed, index) for index in range(config.num_videos))
    write_folder(
        folder, (((v * 255).round().astype(np.uint8), c) for v, c in scenes), fps=FPS, upscale=4
    )


def train_teacher(
    config: TeacherConfig,
    out: Path,
    *,
    report: Callable[[int, float], None] | None = None,
) -> Path:
    """Train and return the folder of the finished transformer; run again, it goes on from its last
    checkpoint.

    The built-in data set is written to `out`/data first. Raises ValueError for an `out` of a
    training with other settings.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler
    from sla2_core.integrations.families.wan import WanSelfAttnProcessor

    out.mkdir(parents=True, exist_ok=True)
    videos = config.videos
    settings = {**asdict(config), "videos": None if videos is None else str(videos.resolve())}
    del settings["checkpoint_every"]  # which may change
    made = any((out / name).exists() for name in ("data", "checkpoint.safetensors"))
    note_settings(out / "training.json", settings, replace=not made)
    if videos is None:
        videos = out / "data"
        write_dataset(videos, config)
    data = read_folder(videos, num_frames=NUM_FRAMES, height=SIZE, width=SIZE)
    captions = tiny.encode_captions(data.captions)
    torch.manual_seed(config.seed)
    transformer = tiny.build_transformer(config.model)
    if config.start is not None:
        transformer.load_state_dict(_start(config))
    for block in transformer.blocks:
        block.attn1.set_processor(WanSelfAttnProcessor(cached_attention))
    ema = {k: v.detach().clone() for k, v in transformer.state_dict().items()}
    optimizers = _optimizers(transformer, config)
    checkpoint = out / "checkpoint.safetensors"
    first = _load(checkpoint, transformer, ema, optimizers) if checkpoint.exists() else 0
    log, started, recent = out / "log.jsonl", time.time(), []
    _cut(log, first)
    for step in range(first, config.steps):
        index, sigma, dropped, noise = _draw(step, config, len(data.captions))
        clean, text = tiny.to_latents(data.videos[index]), captions[index].clone()
        text[dropped] = 0
        weight = sigma.view(-1, 1, 1, 1, 1)
        with torch.autocast("cpu", getattr(torch, config.dtype), enabled=config.dtype != "float32"):
            velocity = transformer(
                torch.lerp(clean, noise, weight), sigma * 1000, text, return_dict=False
            )[0]
        loss = torch.nn.functional.mse_loss(velocity.float(), noise - clean)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"step {step}: the loss is {loss.item()}; the last good checkpoint is {checkpoint}"
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * _rate(step, config)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(config.ema, (1 + step) / (10 + step))
        for name, value in transformer.state_dict().items():
            ema[name].lerp_(value, 1 - decay)
        recent.append(loss.item())
        if (step + 1) % 50 == 0:
            mean, recent = float(np.mean(recent)), []
            with log.open("a") as file:
                file.write(
                    json.dumps(
                        {"step": step + 1, "loss": mean, "seconds": round(time.time() - started)}
                    )
                    + "\n"
                )
            if report:
                report(step + 1, mean)
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
            _save(out, step + 1, transformer, ema, optimizers)
    transformer = tiny.build_transformer(config.model)
    transformer.load_state_dict(ema)
    transformer.save_pretrained(out / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=tiny.SHIFT).save_pretrained(out / "scheduler")
    return out
