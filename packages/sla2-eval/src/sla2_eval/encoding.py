"""A folder of mp4 files with captions as latents and text embeddings of a diffusers pipeline, computed once and cached."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from sla2_core.training.cache import CachedData, encode_samples
from torch import Tensor

from sla2_eval.dataset import captioned_files, read_frames


def encode_folder(
    videos: str | Path,
    pipe,
    folder: str | Path,
    *,
    num_frames: int,
    height: int,
    width: int,
    model: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> CachedData:
    """Encode a folder that dataset.captioned_files accepts, for stage 2; started again, it goes on where it was.

    Args:
        videos: the folder. num_frames, height, width: of the training videos, in pixels.
        pipe: a WanPipeline, whose VAE and text encoder are used. model: its name, to notice another one on a second run.
        folder: the cache.

    Raises:
        ValueError: another kind of pipeline, a broken or short video, or a missing caption; names the file, keeps what is done.
    """
    if type(pipe).__name__ != "WanPipeline":
        raise ValueError(f"pipe: expected a WanPipeline, got {type(pipe).__name__}")
    pairs = captioned_files(Path(videos))
    settings = {"model": model, "num_frames": num_frames, "height": height, "width": width}

    def encode(index: int) -> dict[str, Tensor]:
        path, caption = pairs[index]
        frames = read_frames(path, num_frames=num_frames, height=height, width=width)
        return {"latents": _latents(pipe.vae, frames), **_text(pipe, caption)}

    return encode_samples(
        [path.name for path, _ in pairs], encode, folder, settings=settings, unconditional=lambda: _text(pipe, ""),
        progress=progress,
    )  # fmt: skip


@torch.no_grad()
def _latents(vae, frames) -> Tensor:
    """uint8 (T, H, W, 3) -> the normalised latents Wan is trained on, fp32 (C, t, h, w): the mode of the VAE's posterior."""
    pixels = torch.as_tensor(frames).permute(3, 0, 1, 2)[None].to(vae.device).float().div(127.5).sub(1.0)
    latents = vae.encode(pixels.to(vae.dtype)).latent_dist.mode()[0].float()
    mean, std = (
        torch.tensor(x, device=latents.device).view(-1, 1, 1, 1)
        for x in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (latents - mean) / std


@torch.no_grad()
def _text(pipe, caption: str) -> dict[str, Tensor]:
    embeds, _ = pipe.encode_prompt(caption, do_classifier_free_guidance=False, device=pipe.text_encoder.device)
    return {"encoder_hidden_states": embeds[0].float()}
