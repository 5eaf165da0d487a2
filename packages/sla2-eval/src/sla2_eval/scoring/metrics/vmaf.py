"""VMAF against the reference video, by ffmpeg's libvmaf filter."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sla2_eval.scoring.metrics.base import MetricSpec, Sample, need_reference

if TYPE_CHECKING:
    import numpy as np

MODELS = ("vmaf_v0.6.1", "vmaf_v0.6.1neg", "vmaf_4k_v0.6.1")
SPECS = (
    MetricSpec(
        name="vmaf",
        kind="paired",
        title="VMAF",
        definition=(
            "Netflix's VMAF of the luma (BT.709, limited range), model vmaf_v0.6.1 by default, mean"
            " over frames"
        ),
        source="the libvmaf filter of the ffmpeg on the path",
        value_range=(0.0, 100.0),
        higher_is_better=True,
        licence="BSD-2-Clause-Patent, inside libvmaf",
        settings={"model": MODELS[0]},
        choices={"model": MODELS},
    ),
)
# Luma is all that VMAF looks at; 4:4:4 takes odd sizes as they are.
_LUMA = "scale=out_color_matrix=bt709:out_range=tv,format=yuv444p"


@functools.cache
def lacks() -> str | None:
    """What is missing here, or None."""
    if shutil.which("ffmpeg") is None:
        return "needs ffmpeg with libvmaf on the path, got none"
    done = subprocess.run(
        ["ffmpeg", "-hide_banner", "-filters"], capture_output=True, text=True, errors="replace"
    )
    if " libvmaf " not in done.stdout:
        return "needs an ffmpeg with libvmaf on the path, got one without"
    return None


def load(name: str, settings: dict, device: str) -> Callable[[Sample], float]:
    """The scorer. It raises ValueError with what ffmpeg says where that fails."""

    def score(sample: Sample) -> float:
        reference = need_reference(sample)
        with tempfile.TemporaryDirectory(prefix="sla2-vmaf-") as folder:
            inputs = []
            for file_name, frames in (("video", sample.frames), ("reference", reference)):
                inputs += _written(Path(folder) / file_name, frames)
            log = Path(folder) / "log.json"
            filters = f"[0:v]{_LUMA}[a];[1:v]{_LUMA}[b];[a][b]libvmaf=model=version="
            filters += f"{settings['model']}:log_fmt=json:log_path={log.name}:n_threads=1"
            command = ["ffmpeg", "-v", "error", "-nostdin", *inputs, "-lavfi", filters]
            done = subprocess.run(
                [*command, "-f", "null", "-"],
                cwd=folder,
                capture_output=True,
                text=True,
                errors="replace",
            )
            if done.returncode or not log.is_file():
                said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
                raise ValueError(f"ffmpeg: {said[-1]}")
            found = json.loads(log.read_text(encoding="utf-8"))
        if len(found["frames"]) != len(sample.frames):
            raise ValueError(
                f"ffmpeg: expected VMAF of {len(sample.frames)} frames, got {len(found['frames'])}"
            )
        return float(found["pooled_metrics"]["vmaf"]["mean"])

    return score


def _written(path: Path, frames: np.ndarray) -> list[str]:
    """Write uint8 (T, H, W, 3) frames as they are; returns the input of ffmpeg."""
    with path.open("wb") as file:
        for frame in frames:
            file.write(frame.tobytes())
    size = f"{frames.shape[2]}x{frames.shape[1]}"
    form = ["-f", "rawvideo", "-pixel_format", "rgb24", "-video_size", size, "-framerate", "8"]
    return [*form, "-i", path.name]
