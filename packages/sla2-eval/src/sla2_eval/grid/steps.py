"""The steps from a model to a trained variant, each resumable in its own folder: capture, stage 1,
stage 2; and the block maps of a video that a variant generated.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sla2_eval.parallel.launch import is_first_process
from sla2_eval.runs.folders import note_settings
from sla2_eval.runs.progress import Report, silent
from sla2_eval.runs.store import write_atomic

if TYPE_CHECKING:
    import numpy as np
    from sla2_core.integrations.handle import SLA2Handle
    from sla2_core.training.stage1.train import Stage1Config
    from sla2_core.training.stage2.train import Stage2Config
    from torch import Tensor, nn

    from sla2_eval.grid.settings import Attention, CaptureSettings
    from sla2_eval.grid.source import TrainSource

_SHOWN = 4  # layers, and heads of each, whose block maps the report gets
_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # noise at which sparsity is measured; maps of the middle one


def builtin_prompts(count: int, seed: int = 0) -> list[str]:
    """The first `count` different captions of the built-in data set's distribution."""
    import numpy as np

    from sla2_eval.tiny.shapes import sample_scene

    rng = np.random.default_rng(seed)
    found: list[str] = []
    while len(found) < count:
        caption = sample_scene(rng).caption
        if caption not in found:
            found.append(caption)
    return found


def apply(
    transformer: nn.Module, attention: Attention, *, base_model: str | None = None
) -> SLA2Handle:
    """The configuration on the model's self-attention; returns the handle."""
    from sla2_core.integrations.diffusers import apply_sla2
    from sla2_core.integrations.family import family_of

    family = family_of(transformer)
    layers = family.attention_layers(transformer)
    heads, head_dim = family.heads(next(iter(layers.values())))
    config = attention.config(head_dim=head_dim, num_heads=heads)
    return apply_sla2(transformer, config, base_model=base_model)


def _base_model(source: TrainSource) -> str | None:
    return None if source.tiny else source.name


def _predict(
    handle: SLA2Handle, item: Mapping[str, Tensor], sigma: float, noise: np.ndarray | Tensor
) -> None:
    """Run the transformer on one item of a data set at the noise level sigma in [0, 1]. `noise` is
    of its latents' shape.
    """
    import torch
    from sla2_core.training.stage2.objectives import noisy_and_target

    transformer: Any = handle.transformer  # of diffusers, whose models have no types
    first = next(p for p in handle.parameters()["model"])
    conditions = {name: value[None].to(first.device) for name, value in item.items()}
    clean = conditions.pop("latents")
    conditions = {
        k: v.to(first.dtype) if v.is_floating_point() else v for k, v in conditions.items()
    }
    alphas = handle.family.alphas_cumprod
    schedule = None if alphas is None else alphas(transformer.config)
    # In fp64, so that the timestep is that of sigma to the last bit.
    level = torch.tensor([sigma], dtype=torch.float64, device=first.device)
    noisy, _ = noisy_and_target(clean, torch.as_tensor(noise)[None].to(clean), level, schedule)
    handle.family.predict(transformer, noisy.to(first.dtype), level, conditions)


def is_captured(capture: CaptureSettings, folder: Path) -> bool:
    """Whether `folder` holds all the captures, or as many as they may take."""
    from sla2_core.training.capture import INDEX_NAME, Captures

    if not (folder / INDEX_NAME).exists():
        return False
    found = Captures(folder)
    return found.full or len(found.samples) == capture.samples


def capture_qkv(
    source: TrainSource,
    data: Any,
    capture: CaptureSettings,
    folder: Path,
    *,
    shift: float,
    order: Mapping[str, Any],
    sigma_range: tuple[float, float] = (0.0, 1.0),
    report: Report = silent,
) -> None:
    """Q, K, V in `capture.samples` forward passes of the dense model on items of `data`, at random
    noise levels of the schedule that `shift` moves, those in `sigma_range`; in bf16 on a GPU.
    `order` is Attention.order().
    """
    import numpy as np
    import torch
    from sla2_core.training.capture import capture as record
    from sla2_core.training.stage2.objectives import shifted, unshifted

    from sla2_eval.grid.settings import Attention

    transformer = source.transformer.to(source.device)
    low, high = (unshifted(level, shift) for level in sigma_range)
    handle = apply(transformer, Attention({"topk": 1.0, **order}))

    def run(index: int) -> None:
        rng = np.random.default_rng([capture.seed, 2, index])
        item = data[int(rng.integers(len(data)))]
        # stratified, so that few samples cover the noise levels
        u = low + (high - low) * (index + rng.random()) / capture.samples
        sigma = shifted(u, shift)
        noise = rng.standard_normal(item["latents"].shape, dtype=np.float32)
        kind = source.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
            _predict(handle, item, sigma, noise)

    record(
        handle,
        run,
        folder,
        samples=capture.samples,
        config=capture.config(),
        progress=lambda done, total: report("capture Q, K, V", done, total),
    )
    handle.remove()


def stage1(
    source: TrainSource,
    attention: Attention,
    captures: Path,
    config: Stage1Config,
    folder: Path,
    *,
    stage: str = "stage 1",
    report: Report = silent,
) -> dict[str, Any]:
    """What stage 1 trains, on the captured Q, K, V, and its adapter; returns the report of
    `train_stage1` as a dict.
    """
    from sla2_core.training.capture import Captures
    from sla2_core.training.stage1.train import train_stage1

    handle = apply(source.transformer, attention, base_model=_base_model(source))
    for module in handle.attentions.values():
        module.to(source.device)
    found = train_stage1(
        handle,
        Captures(captures),
        config,
        folder,
        progress=lambda done, total, _: report(stage, done, total),
    )
    if is_first_process():  # of a finished run too: k% and precision may be others than before
        handle.save(folder / "adapter")
    handle.remove()
    return found.to_dict()


def stage2(
    source: TrainSource,
    attention: Attention,
    router: Path | None,
    data: Callable[[], Any],
    config: Stage2Config,
    folder: Path,
    *,
    start: Path | None = None,
    targets: Path | None = None,
    stage: str = "stage 2",
    report: Report = silent,
) -> dict[str, Any]:
    """Fine-tune the source's model and SLA2's own parameters from the stage 1 in `router` (None:
    from the initial state), on what data() gives; returns the report as a dict. `start`: a trained
    adapter to go on from instead, whose teacher is the source's model all the same. `targets`:
    where the teacher of loss="distill" keeps its predictions, for trainings on the same data and
    seed.

    The sparse branch computes in the attention's precision: quantisation-aware training where that
    is a low one. The transformer is left trained. Raises ValueError for a folder trained with other
    settings.
    """
    from sla2_core.training.stage1.train import load_stage1
    from sla2_core.training.stage2.targets import KeptTargets
    from sla2_core.training.stage2.train import train_stage2

    done = folder / "finished.json"
    fields = {name: v for name, v in attention.fields().items() if name != "backend"}
    values = config.to_dict()
    seed = values.pop("seed")
    wanted = {"attention": fields, "stage2": values, "seed": seed}
    note_settings(folder / "settings.json", wanted)
    if done.exists():
        report(stage, config.steps, config.steps)
        return json.loads(done.read_text())
    found = data()
    handle = apply(source.transformer, attention, base_model=_base_model(source))
    if router is not None:
        load_stage1(handle, router)
    teacher = None
    if config.loss == "distill":
        teacher = handle.dense_copy()
        if targets is not None:
            teacher = KeptTargets(teacher, targets)
    if start is not None:  # after the teacher's copy: the adapter may hold the model's weights
        handle.load(start, keep_settings=True)
    trained = train_stage2(
        handle,
        found,
        config,
        folder,
        teacher=teacher,
        progress=lambda step, total, _: report(stage, step, total),
    )
    summary = trained.to_dict()
    if is_first_process():
        write_atomic(done, json.dumps(summary, indent=1) + "\n")
    return summary


def block_maps(source: TrainSource, handle: SLA2Handle, video: Path, prompt: str) -> dict[str, Any]:
    """The block maps of a few layers and heads while the model denoises `video`, half noise: what
    the report draws over it. `order` says which token of the raster order stands at each place; it
    is None for the raster order itself. So many `text_tokens` come after them. `grid` is None, and
    `layers` empty, where it is not known how tokens lie in the video.

    `sparsity` and `flops`, of attention as a share of full attention's, are what the maps of all
    layers have on average over five noise levels, for a router may select more at one than at
    another.
    """
    import torch
    from sla2_core.cost import measured_share
    from sla2_core.integrations.family import grid_of
    from sla2_core.order import Grid

    item = source.encode_video(video, prompt)
    noise = torch.randn((1, *item["latents"].shape), generator=torch.Generator().manual_seed(0))[0]
    grids: list[Grid | None] = []

    def note(transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        grids.append(grid_of(handle.family, transformer, args, kwargs))

    def run(sigma: float) -> None:
        with torch.inference_mode():
            _predict(handle, item, sigma, noise)

    # Before the handle's own hooks, which put the tokens in order.
    hook = handle.transformer.register_forward_pre_hook(note, with_kwargs=True, prepend=True)
    try:
        found = [handle.block_maps(functools.partial(run, sigma)) for sigma in _LEVELS]
    finally:
        hook.remove()
    every = [block_map for maps in found for block_map in maps.values()]
    # Text tokens are keys of the routed queries too, and see every key themselves.
    shares = [measured_share(m, handle.config, max(0, m.n_k - m.n_q)) for m in every]
    maps = found[len(found) // 2]
    grid, order, layers = grids[0], None, []
    if grid is not None:
        order = next(iter(handle.attentions.values())).order.places(grid, torch.device("cpu"))
    for layer in _spread(list(maps)) if grid else []:
        shown = maps[layer]
        for head in _spread(list(range(shown.indices.shape[1]))):
            chosen, counts = shown.indices[0, head].tolist(), shown.counts[0, head].tolist()
            rows = [indices[:count] for indices, count in zip(chosen, counts)]
            layers.append({"layer": layer, "head": head, "map": rows})
    return {
        "grid": None if grid is None else list(grid),
        "order": None if order is None else order.tolist(),
        "text_tokens": every[0].n_k - every[0].n_q,
        "block_q": handle.config.block_q,
        "block_k": handle.config.block_k,
        "sparsity": sum(block_map.sparsity for block_map in every) / len(every),
        "flops": sum(shares) / len(shares),
        "frame_of": video.name,
        "layers": layers,
    }


def _spread(values: list[int]) -> list[int]:
    """At most _SHOWN of the values, from the first to the last."""
    if len(values) <= _SHOWN:
        return values
    return [values[round(i * (len(values) - 1) / (_SHOWN - 1))] for i in range(_SHOWN)]
