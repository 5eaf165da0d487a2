"""Measures scoring on this machine: overhead over the bare arithmetic, one worker against more, memory over many videos.

Example: python tools/bench_scoring.py --videos 16 --workers 1 2 --repeats 3 --json scoring.json
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

METRICS = ["psnr", "ssim", "temporal_flickering"]


def make(folder: Path, count: int, noise: float, frames: int, height: int, width: int) -> Path:
    """`count` videos of a drifting pattern, with noise."""
    from sla2_eval.video import write_video

    folder.mkdir()
    y, x = np.mgrid[:height, :width]
    for i in range(count):
        rng = np.random.default_rng([i, int(noise)])
        clip = np.empty((frames, height, width, 3), dtype=np.uint8)
        for t in range(frames):
            wave = 127 + 80 * np.sin((x + 3 * t + 40 * i) / 37) * np.cos((y - 2 * t) / 29)
            clip[t] = np.clip(wave[..., None] + rng.normal(0, 2 + noise, (height, width, 1)), 0, 255)
        write_video(folder / f"clip {i:03d}-0.mp4", clip, 16)
    return folder


def cpu_seconds() -> float:
    """Processor time of this process and of its ended children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def bare(videos: Path, reference: Path, names: list[str], count: int) -> tuple[float, float]:
    """Processor seconds a pair for decoding alone, and for the metrics' arithmetic alone, on one thread in this process."""
    import torch
    from sla2_eval import metrics
    from sla2_eval.metrics.base import Sample
    from sla2_eval.video import read_video

    torch.set_num_threads(1)
    scorers = {name: metrics.load(name, {}) for name in names}
    kinds = {name: spec.kind for name, spec in metrics.specs().items()}
    decoding = arithmetic = 0.0
    for path in sorted(videos.iterdir())[:count]:
        start = cpu_seconds()
        video, other = read_video(path), read_video(reference / path.name)
        middle = cpu_seconds()
        for name, scorer in scorers.items():
            scorer(Sample(video.frames, video.fps, other.frames))
            if kinds[name] == "unpaired":
                scorer(Sample(other.frames, other.fps))
        decoding += middle - start
        arithmetic += cpu_seconds() - middle
    return decoding / count, arithmetic / count


def timed(videos: Path, reference: Path, names: list[str], workers: int) -> dict:
    """One run of `score`: seconds in all, until each worker did one, a video after that; processor seconds (of one worker)."""
    from sla2_eval.scoring import score

    moments, used = [], cpu_seconds()
    with tempfile.TemporaryDirectory() as out:
        start = time.perf_counter()
        score(
            videos, reference, names, out, num_workers=workers,
            progress=lambda name, done, total: moments.append(time.perf_counter() - start) if name == names[0] else None,
        )  # fmt: skip
        total = time.perf_counter() - start
    first, last = moments[workers], moments[-1]
    per_video = (last - first) / (len(moments) - 1 - workers)
    return {"seconds": total, "first": first, "per_video": per_video, "cpu": cpu_seconds() - used}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--videos", type=int, default=16)
    parser.add_argument("--frames", type=int, default=49)
    parser.add_argument("--size", type=int, nargs=2, default=(480, 720))
    parser.add_argument("--metrics", default=",".join(METRICS))
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    names = options.metrics.split(",")
    with tempfile.TemporaryDirectory() as root:
        a = make(Path(root) / "a", options.videos, 6.0, options.frames, *options.size)
        b = make(Path(root) / "b", options.videos, 0.0, options.frames, *options.size)
        decoding, arithmetic = bare(a, b, names, min(3, options.videos))
        found = {"metrics": names, "decoding": decoding, "arithmetic": arithmetic, "runs": {}}
        for workers in options.workers:
            runs = [timed(a, b, names, workers) for _ in range(options.repeats)]
            found["runs"][workers] = {
                key: {"median": statistics.median(r[key] for r in runs), "all": [round(r[key], 3) for r in runs]}
                for key in runs[0]
            }
        one = found["runs"][options.workers[0]]["per_video"]["median"]
        found["speedup"] = {w: one / run["per_video"]["median"] for w, run in found["runs"].items()}
        cpu = found["runs"][options.workers[0]]["cpu"]["median"]
        found["cpu_over_bare"] = cpu / ((decoding + arithmetic) * options.videos)
        found["worker_peak_mb"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    text = json.dumps(found, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
