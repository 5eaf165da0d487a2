"""The steps from a model to a trained variant, each resumable in its own folder: data, capture,
stage 1, stage 2.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sla2_eval.generation.sampling import Generator, TinyGenerator, autocast_dtype
from sla2_eval.runs.folders import note_settings
from sla2_eval.runs.progress import Report, silent
from sla2_eval.runs.store import write_atomic

if TYPE_CHECKING:
    from torch import Tensor

    from sla2_eval.runs.settings import (
        AttentionSettings,
        CaptureSettings,
        DataSettings,
        Stage1Settings,
        Stage2Settings,
    )


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


def write_data(data: DataSettings, folder: Path, *, report: Report = silent) -> Path:
    """The folder of captioned mp4 files: the user's own, or the built-in scenes, written to
    `folder` once.
    """
    from sla2_eval.tiny.shapes import FPS, sample
    from sla2_eval.videos.dataset import MANIFEST, write_folder

    if data.videos is not None:
        return data.videos
    if not (folder / MANIFEST).exists():

        def scenes():
            for index in range(data.num_videos):
                video, caption = sample(data.seed, index)
                yield (video * 255).round().astype("uint8"), caption
                report("training videos", index + 1, data.num_videos)

        write_folder(folder, scenes(), fps=FPS, upscale=4)
    return folder


def read_data(generator: Generator, folder: Path) -> tuple[Tensor, Tensor]:
    """Latents (n, C, T, H, W) and text embeddings (n, L, D) of a folder of captioned videos.

    Raises ValueError for a model other than the tiny one: real pipelines encode with their VAE and
    text encoder first and call `sla2_core.training` with the tensors.
    """
    from sla2_eval.tiny import model as tiny
    from sla2_eval.tiny.shapes import NUM_FRAMES, SIZE
    from sla2_eval.videos.dataset import read_folder

    _expect_tiny(generator)
    found = read_folder(folder, num_frames=NUM_FRAMES, height=SIZE, width=SIZE)
    return tiny.to_latents(found.videos), tiny.encode_captions(found.captions)


def apply(generator: Generator, attention: AttentionSettings):
    """SLA2 (or SLA) on the model's self-attention; returns the handle."""
    from sla2_core.config import SLA2Config
    from sla2_core.integrations.diffusers import apply_sla2
    from sla2_core.integrations.family import family_of

    family = family_of(generator.transformer)
    heads, head_dim = family.heads(
        next(iter(family.attention_layers(generator.transformer).values()))
    )
    return apply_sla2(
        generator.transformer,
        SLA2Config(num_heads=heads, head_dim=head_dim, **attention.model_dump()),
    )


def is_captured(capture: CaptureSettings, folder: Path) -> bool:
    """Whether `folder` holds all the captures."""
    from sla2_core.training.capture import INDEX_NAME, Captures

    return (folder / INDEX_NAME).exists() and len(Captures(folder).samples) == capture.samples


def capture_qkv(
    generator: Generator,
    data: Path,
    capture: CaptureSettings,
    folder: Path,
    *,
    report: Report = silent,
) -> None:
    """Q, K, V of every layer in `capture.samples` forward passes of the dense model at random noise
    levels.
    """
    import numpy as np
    import torch
    from sla2_core.training.capture import CaptureConfig
    from sla2_core.training.capture import capture as record

    from sla2_eval.runs.settings import AttentionSettings
    from sla2_eval.tiny.model import SHIFT

    latents, text = read_data(generator, data)
    handle = apply(generator, AttentionSettings())

    def run(index: int) -> None:
        rng = np.random.default_rng([capture.seed, 2, index])
        chosen = rng.integers(len(latents))
        clean, caption = latents[chosen][None], text[chosen][None]
        u = (
            index + rng.random()
        ) / capture.samples  # stratified, so that few samples cover the noise levels
        sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
        noise = torch.from_numpy(rng.standard_normal(clean.shape, dtype=np.float32))
        generator.transformer(
            torch.lerp(clean, noise, sigma),
            torch.tensor([sigma * 1000]),
            caption,
            return_dict=False,
        )

    record(
        handle,
        run,
        folder,
        samples=capture.samples,
        config=CaptureConfig(seed=capture.seed),
        progress=lambda done, total: report("capture Q, K, V", done, total),
    )


def stage1(
    generator: Generator,
    attention: AttentionSettings,
    captures: Path,
    settings: Stage1Settings,
    seed: int,
    folder: Path,
    *,
    stage: str = "stage 1",
    report: Report = silent,
) -> dict:
    """Router and alpha on the captured Q, K, V, and their adapter; returns the report of
    `train_stage1` as a dict.
    """
    from sla2_core.training.capture import Captures
    from sla2_core.training.stage1.train import Stage1Config, train_stage1

    handle = apply(generator, attention)
    config = Stage1Config(topk=settings.topk, steps=settings.steps, seed=seed, max_scores=1 << 22)
    found = train_stage1(
        handle,
        Captures(captures),
        config,
        folder,
        progress=lambda done, total, _: report(stage, done, total),
    )
    handle.save(
        folder / "adapter"
    )  # of a finished run too: k% and precision may be others than before
    return found.to_dict()


def stage2(
    generator: Generator,
    attention: AttentionSettings,
    router: Path | None,
    data: Path,
    settings: Stage2Settings,
    seed: int,
    folder: Path,
    *,
    stage: str = "stage 2",
    report: Report = silent,
) -> dict:
    """Fine-tune model and alpha from the stage 1 in `router` (None: from the initial state);
    returns the report as a dict.

    The sparse branch computes in `attention.precision`: quantisation-aware training where that is a
    low one. Raises ValueError for a folder trained with other settings.
    """
    from sla2_core.training.stage1.train import load_stage1
    from sla2_core.training.stage2.train import Stage2Config, train_stage2

    from sla2_eval.tiny.model import SHIFT

    done = folder / "finished.json"
    wanted = {
        "attention": attention.model_dump(exclude={"backend"}),
        "stage2": settings.model_dump(),
        "seed": seed,
    }
    note_settings(folder / "settings.json", wanted)
    if done.exists():
        report(stage, settings.steps, settings.steps)
        return json.loads(done.read_text())
    latents, text = read_data(generator, data)
    handle = apply(generator, attention)
    if router is not None:
        load_stage1(handle, router)
    dtype = autocast_dtype(settings.dtype)
    config = Stage2Config(
        **settings.model_dump(exclude={"dtype"}),
        autocast=str(dtype).removeprefix("torch.") if dtype else None,
        shift=SHIFT,
        seed=seed,
    )
    found = train_stage2(
        handle,
        (latents, text),
        config,
        folder,
        progress=lambda step, total, _: report(stage, step, total),
    )
    summary = found.to_dict()
    write_atomic(done, json.dumps(summary, indent=1) + "\n")
    return summary


def block_maps(generator: Generator, handle, video: Path, prompt: str) -> dict:
    """The block map of every layer and head while the model denoises `video`, half noise: what the
    report draws over it.
    """
    import torch

    from sla2_eval.tiny import model as tiny
    from sla2_eval.videos.video import read_video

    _expect_tiny(generator)
    _, frames, height, width = tiny.LATENT_SHAPE
    written = read_video(video).frames  # each pixel `upscale` times in both directions
    small = written.reshape(frames, height, generator.upscale, width, generator.upscale, 3).mean(
        (2, 4)
    )
    clean = tiny.to_latents(small[None])
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))

    def run() -> None:
        with torch.inference_mode():
            half, time = torch.lerp(clean, noise, 0.5), torch.tensor([500.0])
            generator.transformer(half, time, tiny.encode_captions([prompt]), return_dict=False)

    maps = handle.block_maps(run)
    config: Any = generator.transformer.config  # of diffusers, whose models have no types
    layers = []
    for layer, found in maps.items():
        for head in range(found.indices.shape[1]):
            rows = [
                indices[:count]
                for indices, count in zip(
                    found.indices[0, head].tolist(), found.counts[0, head].tolist()
                )
            ]
            layers.append({"layer": layer, "head": head, "map": rows})
    return {
        "grid": [size // p for size, p in zip(tiny.LATENT_SHAPE[1:], config.patch_size)],
        "block_q": handle.config.block_q,
        "block_k": handle.config.block_k,
        "sparsity": sum(found.sparsity for found in maps.values()) / len(maps),
        "frame_of": video.name,
        "layers": layers,
    }


def _expect_tiny(generator: Generator) -> None:
    if not isinstance(generator, TinyGenerator):
        raise ValueError(
            "model: expected the tiny model or one of its form; see sla2_core.training for other"
            " pipelines"
        )
