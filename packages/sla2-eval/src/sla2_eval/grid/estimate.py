"""What a training would take, from the settings and the model's configuration alone: parameters,
memory and time by the cost model, before any weight is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sla2_eval.generation.sampling import find_model
from sla2_eval.grid.settings import TrainSettings, VideoSettings

# How much smaller latents are than videos, in time and in each direction of the picture.
_COMPRESSION = {
    "wan": (4, 8),
    "hunyuan_video": (4, 8),
    "hunyuan_video15": (4, 16),
    "cogvideox": (4, 8),
    "flux": (1, 8),
    "ltx2": (8, 32),
}
# Wan2.2 5B's own VAE makes latents of 48 channels.
_COMPRESSION_OF_48 = (4, 16)
_FP32 = 4


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a training would take. Everything but the parameters comes from the cost model; nothing
    is measured.

    Attributes:
        model: the transformer's class. tokens: of one sample. gpus: that share the work.
        accumulate: micro-batches a step on each of them: the settings' own, or fewer where GPUs x
            those would not divide the batch. given_accumulate: the settings' own.
        parameters: of the transformer. stage1_parameters, stage2_parameters: those that are
            trained.
        forward_flops: of one sample, with SLA2. dense_flops: with full attention.
        capture_flops, stage2_flops: of the whole part.
        capture_bytes: of the shards on disk, at most.
        weights_bytes, gradients_bytes, optimizer_bytes, average_bytes: in fp32, on each GPU,
            sharded over them. teacher_bytes, activations_bytes: on each GPU, not sharded.
        capture_hours, stage2_hours: at the assumed rate.
    """

    model: str
    tokens: int
    gpus: int
    accumulate: int
    given_accumulate: int
    parameters: int
    stage1_parameters: int
    stage2_parameters: int
    forward_flops: float
    dense_flops: float
    capture_flops: float
    stage2_flops: float
    capture_bytes: int
    weights_bytes: float
    gradients_bytes: float
    optimizer_bytes: float
    average_bytes: float
    teacher_bytes: float
    activations_bytes: float
    capture_hours: float
    stage2_hours: float

    @property
    def memory_bytes(self) -> float:
        """Of stage 2 on each GPU."""
        states = self.weights_bytes + self.gradients_bytes + self.optimizer_bytes
        return states + self.average_bytes + self.teacher_bytes + self.activations_bytes


def estimate(settings: TrainSettings, *, gpus: int = 1, rate: float = 4e14) -> Estimate:
    """The estimate of both stages, from the model's config.json, which is all that is read.

    FLOPs count a multiply-add as two: the linear layers of the blocks for every token (keys and
    values of separate text are left out), and attention by sla2_core.cost. A backward pass counts
    as two forward passes, recomputation with gradient checkpointing as one more, the teacher of the
    loss "distill" as a forward pass with full attention. Activations are the inputs of the linear
    layers and the norms, of one block with gradient checkpointing, else of all; text encoders, VAE
    and the framework's own memory are left out.

    Args:
        gpus: how many share stage 2, its weights, gradients and states sharded over them (FSDP2).
        rate: FLOP/s that one GPU reaches; 4e14 is 40 % of an H100's dense bf16 rate.

    Raises:
        ValueError, FileNotFoundError: a model that is not known or not there, one that fits no
            integration, a video that is missing, or a batch that the GPUs cannot share.
    """
    import torch
    from sla2_core.attention import build_attention
    from sla2_core.cost import sla2_cost
    from sla2_core.integrations.family import family_of
    from sla2_core.integrations.inspect import read_config
    from torch import nn

    accumulate = _accumulate(settings.stage2.batch_size, settings.stage2.accumulate, gpus)
    found = find_model(settings.model)
    config = read_config(found)
    transformer = _on_meta(config)
    family = family_of(transformer)
    layers: dict[str, Any] = family.attention_layers(transformer)
    heads, head_dim = family.heads(next(iter(layers.values())))
    attention = settings.attention.config(head_dim=head_dim, num_heads=heads)
    tokens = family.tokens(
        transformer.config, *_latents(found, family.name, transformer.config, settings.video)
    )
    with torch.device("meta"):
        members = build_attention(attention).members().values()
    of_stage = {
        stage: len(layers)
        * sum(p.numel() for m in members if stage in m.stages for p in m.parameters())
        for stage in ("stage1", "stage2")
    }
    parameters = sum(p.numel() for p in transformer.parameters())
    stage2 = settings.stage2
    prefixes = tuple({f"{name.rpartition('.')[0]}." for name in layers})
    linear = {n: m for n, m in transformer.named_modules() if isinstance(m, nn.Linear)}
    inside = {n: m for n, m in linear.items() if n.startswith(prefixes) and not _of_text(n)}
    trained = parameters if stage2.learning_rate else 0
    if stage2.lora_rank:
        targets = tuple(stage2.lora_targets)
        fits = (m for n, m in linear.items() if n.endswith(targets))
        trained = sum(stage2.lora_rank * (m.in_features + m.out_features) for m in fits)
    alpha = of_stage["stage2"] if stage2.alpha_learning_rate else 0
    cost = sla2_cost(
        n_q=tokens,
        n_k=tokens,
        num_heads=heads,
        head_dim=head_dim,
        topk=attention.topk,
        block_q=attention.block_q,
        block_k=attention.block_k,
        complement=attention.complement,
    )
    rest = 2.0 * tokens * sum(m.in_features * m.out_features for m in inside.values())
    forward, dense = (rest + len(layers) * flops for flops in (cost.flops, cost.full_flops))
    passes = forward * (4 if stage2.gradient_checkpointing else 3)
    passes += dense if stage2.loss == "distill" else 0
    capture = settings.capture
    per_layer = 3 * tokens * head_dim * (capture.heads or heads)
    width = 2 if capture.dtype in ("bfloat16", "float16") else _FP32
    kept = (capture.layers_per_sample or len(layers)) * per_layer * width
    samples = min(capture.samples, max(1, capture.max_bytes // kept))
    whole = stage2.steps * stage2.batch_size * passes
    micro = stage2.batch_size // (gpus * accumulate)
    size = 2 if stage2.autocast in ("bfloat16", "float16") else _FP32
    dim = heads * head_dim
    within = size * sum(m.in_features for m in inside.values()) + 6 * _FP32 * dim * len(layers)
    saved = float(within)
    if stage2.gradient_checkpointing:  # the blocks' inputs, and one block's own
        saved = within / len(layers) + size * dim * len(layers)
    moved = trained + alpha
    return Estimate(
        model=str(config.get("_class_name")),
        tokens=tokens,
        gpus=gpus,
        accumulate=accumulate,
        given_accumulate=stage2.accumulate,
        parameters=parameters,
        stage1_parameters=of_stage["stage1"],
        stage2_parameters=moved,
        forward_flops=forward,
        dense_flops=dense,
        capture_flops=samples * dense,
        stage2_flops=whole,
        capture_bytes=samples * kept,
        weights_bytes=_FP32 * (parameters + sum(of_stage.values())) / gpus,
        gradients_bytes=_FP32 * moved / gpus,
        optimizer_bytes=2 * _FP32 * moved / gpus,
        average_bytes=_FP32 * moved / gpus if stage2.ema is not None else 0.0,
        teacher_bytes=float(_FP32 * parameters) if stage2.loss == "distill" else 0.0,
        activations_bytes=float(micro * tokens * saved),
        capture_hours=samples * dense / rate / 3600,
        stage2_hours=whole / (gpus * rate) / 3600,
    )


def _accumulate(batch_size: int, given: int, gpus: int) -> int:
    """The most micro-batches a step, up to `given`, with which the GPUs share a batch evenly."""
    if batch_size % gpus:
        raise ValueError(f"stage2.batch_size: expected a multiple of {gpus} GPUs, got {batch_size}")
    each = batch_size // gpus
    return max(parts for parts in range(1, min(given, each) + 1) if each % parts == 0)


def rows(found: Estimate) -> list[dict[str, Any]]:
    """The estimate as a table: {"part", "what", "value"}."""
    share = f", on each of {found.gpus}" if found.gpus > 1 else ""
    parts = f"{found.accumulate}"
    if found.accumulate != found.given_accumulate:
        parts += f" (set it: {found.given_accumulate} x {found.gpus} GPUs do not divide the batch)"
    table = (
        ("model", found.model, f"{found.parameters:,} parameters"),
        ("model", "tokens of a sample", f"{found.tokens:,}"),
        ("model", "forward pass, full attention", f"{found.dense_flops / 1e12:.4g} TFLOP"),
        ("model", "forward pass, these settings", f"{found.forward_flops / 1e12:.4g} TFLOP"),
        ("stage 1", "trained parameters", f"{found.stage1_parameters:,}"),
        ("stage 1", "captures on disk", _gb(found.capture_bytes)),
        ("stage 1", "time of the capture", _time(found.capture_hours)),
        ("stage 2", "trained parameters", f"{found.stage2_parameters:,}"),
        ("stage 2", "accumulate", parts),
        ("stage 2", f"weights{share}", _gb(found.weights_bytes)),
        ("stage 2", f"gradients{share}", _gb(found.gradients_bytes)),
        ("stage 2", f"optimizer{share}", _gb(found.optimizer_bytes)),
        ("stage 2", f"moving average{share}", _gb(found.average_bytes)),
        ("stage 2", "teacher, whole on each" if share else "teacher", _gb(found.teacher_bytes)),
        ("stage 2", "activations", _gb(found.activations_bytes)),
        ("stage 2", "memory of a GPU", _gb(found.memory_bytes)),
        ("stage 2", "work", f"{found.stage2_flops / 1e18:.4g} EFLOP"),
        ("stage 2", f"time on {found.gpus} GPU", _time(found.stage2_hours)),
    )
    return [{"part": part, "what": what, "value": value} for part, what, value in table]


def _on_meta(config: dict[str, Any]) -> Any:
    import torch
    from sla2_core.integrations.family import transformer_class

    kind = transformer_class(config.get("_class_name"), "model")
    with torch.device("meta"):
        return kind.from_config(config)


def _latents(
    model: Path | str, family: str, config: Any, video: VideoSettings | None
) -> tuple[int, int, int]:
    """(frames, height, width) of the latents."""
    if isinstance(model, Path) and not (model / "model_index.json").exists():
        from sla2_eval.tiny.model import LATENT_SHAPE

        return LATENT_SHAPE[1:]
    if video is None:
        raise ValueError("video: expected num_frames, height and width, got none")
    if family not in _COMPRESSION:
        raise ValueError(f"model: expected one of {', '.join(_COMPRESSION)}, got {family}")
    time, space = _COMPRESSION[family]
    if family == "wan" and config.in_channels == 48:
        time, space = _COMPRESSION_OF_48
    return (video.num_frames - 1) // time + 1, video.height // space, video.width // space


def _of_text(name: str) -> bool:
    """Whether a linear layer of a block sees separate text or an image's embedding, few tokens."""
    parts = name.split(".")
    return "attn2" in parts and parts[-1] in ("to_k", "to_v", "add_k_proj", "add_v_proj")


def _gb(count: float) -> str:
    return f"{count / 1e9:.3g} GB"


def _time(hours: float) -> str:
    return f"{hours:.3g} h" if hours >= 1 else f"{60 * hours:.3g} min"
