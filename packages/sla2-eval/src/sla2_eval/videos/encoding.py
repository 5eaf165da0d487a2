"""A folder of mp4 files with captions as latents and text embeddings of a diffusers pipeline,
computed once and cached.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sla2_core.integrations.encoding import encoder_of
from sla2_core.training.cache import CachedData, check_keys, encode_samples
from torch import Tensor

from sla2_eval.runs.store import digest
from sla2_eval.videos.dataset import captioned_files, read_frames


def encode_video(
    path: Path, caption: str, pipe: Any, *, num_frames: int, height: int, width: int
) -> dict[str, Tensor]:
    """The latents and conditions of one video, without a batch dimension, as encode_folder makes
    them; its arguments and errors.
    """
    encoder = encoder_of(pipe)
    check_size(pipe, num_frames, height, width)
    frames = read_frames(path, num_frames=num_frames, height=height, width=width)
    pixels = torch.as_tensor(frames).permute(3, 0, 1, 2)[None].float().div(127.5).sub(1.0)
    return {**encoder.video(pipe, pixels), **encoder.text(pipe, caption)}


def check_size(pipe: Any, num_frames: int, height: int, width: int) -> None:
    """Whether VAE and patches of a pipeline divide a video of this size: they would cut off the
    rest. What the pipeline does not say is not checked.

    Raises:
        ValueError: naming the setting, the step that it goes in, and its value.
    """
    time = getattr(pipe, "vae_scale_factor_temporal", None) or 1
    space = getattr(pipe, "vae_scale_factor_spatial", None) or 1
    patch = getattr(getattr(pipe.transformer, "config", None), "patch_size", 1)
    space *= patch[-1] if isinstance(patch, tuple | list) else patch or 1
    if (num_frames - 1) % time:
        raise ValueError(
            f"video.num_frames: expected 1 more than a multiple of {time}, got {num_frames}"
        )
    for name, value in (("height", height), ("width", width)):
        if value % space:
            raise ValueError(f"video.{name}: expected a multiple of {space}, got {value}")


def check_videos(videos: Path, folder: Path) -> None:
    """Check that encode_folder made the cache `folder` from these videos and captions; their sizes
    in bytes stand for the files. Raises ValueError naming what differs.
    """
    pairs = captioned_files(videos)
    check_keys(folder, [path.name for path, _ in pairs], _keys(pairs))


def _keys(pairs: list[tuple[Path, str]]) -> list[str]:
    return [digest([path.stat().st_size, caption])[:16] for path, caption in pairs]


def encode_folder(
    videos: str | Path,
    pipe: Any,
    folder: str | Path,
    *,
    num_frames: int,
    height: int,
    width: int,
    model: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> CachedData:
    """Encode a folder that dataset.captioned_files accepts, for stage 2; started again, it goes on
    where it was.

    Args:
        videos: the folder. num_frames, height, width: of the training videos, in pixels.
        pipe: a pipeline that sla2_core.integrations.encoding knows, whose VAE and text encoders are
            used. model: its name, to notice another one on a second run.
        folder: the cache.

    Raises:
        ValueError: another kind of pipeline, a cache of other videos or captions, a size that the
            pipeline would cut down, a broken or short video, or a missing caption; names the file,
            keeps what is done.
    """
    encoder = encoder_of(pipe)
    check_size(pipe, num_frames, height, width)
    pairs = captioned_files(Path(videos))
    settings = {"model": model, "num_frames": num_frames, "height": height, "width": width}

    def encode(index: int) -> dict[str, Tensor]:
        path, caption = pairs[index]
        return encode_video(path, caption, pipe, num_frames=num_frames, height=height, width=width)

    return encode_samples(
        [path.name for path, _ in pairs],
        encode,
        folder,
        settings=settings,
        keys=_keys(pairs),
        unconditional=lambda: encoder.text(pipe, ""),
        progress=progress,
    )
