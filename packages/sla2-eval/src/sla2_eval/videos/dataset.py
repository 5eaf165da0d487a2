"""A folder of mp4 files with captions, as training data: read once into memory, or written from the
built-in scenes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sla2_eval.videos.video import read_video, write_video

MANIFEST = "metadata.jsonl"


@dataclass(frozen=True)
class CaptionedVideos:
    """Videos of one size, uint8 (n, T, H, W, 3), and their captions."""

    videos: np.ndarray
    captions: list[str]


def write_folder(
    folder: Path, samples: Iterable[tuple[np.ndarray, str]], *, fps: float, upscale: int = 1
) -> None:
    """Write uint8 videos with captions as `folder`/NNNNN.mp4 and a manifest; what is there already
    is kept.

    `upscale` repeats each pixel that many times in both directions, which spares small videos the
    chroma subsampling.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index, (video, caption) in enumerate(samples):
        name = f"{index:05d}.mp4"
        if not (folder / name).exists():
            write_video(folder / name, video.repeat(upscale, 1).repeat(upscale, 2), fps)
        rows.append(json.dumps({"file_name": name, "caption": caption}))
    partial = folder / f".{MANIFEST}.{os.getpid()}"
    partial.write_text("\n".join(rows) + "\n", encoding="utf-8")
    os.replace(partial, folder / MANIFEST)


def captioned_files(folder: Path) -> list[tuple[Path, str]]:
    """Pairs of video and caption: from the manifest if there is one, else from NAME.txt beside each
    NAME.mp4.

    Raises ValueError naming the file for a missing caption or a manifest line of another form.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: expected a folder of mp4 files with captions, got nothing there"
        )
    manifest = folder / MANIFEST
    pairs = []
    if manifest.exists():
        for number, line in enumerate(manifest.read_text(encoding="utf-8-sig").split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                path, caption = folder / row["file_name"], row["caption"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f'{manifest} line {number}: expected {{"file_name": ..., "caption": ...}}, got'
                    f" {line[:80]!r}"
                ) from error
            if not path.resolve().is_relative_to(folder.resolve()):
                raise ValueError(
                    f"{manifest} line {number}: expected a file inside the folder, got"
                    f" {row['file_name']!r}"
                )
            pairs.append((path, caption))
    else:
        for path in sorted(
            p for p in folder.iterdir() if p.suffix.lower() == ".mp4" and not p.name.startswith(".")
        ):
            text = path.with_suffix(".txt")
            if not text.exists():
                raise ValueError(
                    f"{path}: expected a caption in {text.name} or {MANIFEST}, got neither"
                )
            pairs.append((path, text.read_text(encoding="utf-8-sig").strip()))
    if not pairs:
        raise ValueError(f"{folder}: expected mp4 files with captions, got none")
    return pairs


def read_frames(path: Path, *, num_frames: int, height: int, width: int) -> np.ndarray:
    """The first `num_frames` frames of a video, area-resized to (height, width): uint8 (num_frames,
    height, width, 3).

    Raises ValueError naming the file if it is broken or too short.
    """
    import torch
    from torch.nn.functional import interpolate

    frames = read_video(path).frames
    if len(frames) < num_frames:
        raise ValueError(f"{path}: expected at least {num_frames} frames, got {len(frames)}")
    frames = frames[:num_frames]
    if frames.shape[1:3] == (height, width):
        return frames
    planar = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    planar = interpolate(planar, (height, width), mode="area").round_()
    return planar.permute(0, 2, 3, 1).to(torch.uint8).numpy()


def read_folder(
    folder: str | Path,
    *,
    num_frames: int,
    height: int,
    width: int,
    progress: Callable[[int, int], None] | None = None,
) -> CaptionedVideos:
    """Decode every video of a folder, area-resized to (height, width) and cut to its first
    `num_frames` frames.

    Raises ValueError naming the file for a missing caption, a broken or too short video, or a
    manifest line of another form.
    """
    pairs = captioned_files(Path(folder))
    videos = np.empty((len(pairs), num_frames, height, width, 3), dtype=np.uint8)
    for index, (path, _) in enumerate(pairs):
        videos[index] = read_frames(path, num_frames=num_frames, height=height, width=width)
        if progress:
            progress(index + 1, len(pairs))
    return CaptionedVideos(videos=videos, captions=[caption for _, caption in pairs])
