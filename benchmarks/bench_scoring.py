"""Measures scoring on this machine: overhead over bare decoding and arithmetic, one worker against
more, memory over many videos.

Example: python -m benchmarks.bench_scoring --json scoring.json

About forty minutes on two cores; --quick for a try.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

METRICS = ["psnr", "ssim", "temporal_flickering"]
SIZE = (480, 720)
PAIRS = [10, 100, 1000]  # over which memory must not grow
LOADED = 200  # megabytes: a worker with less has not imported torch yet


def note(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def make(folder: Path, count: int, noise: float, frames: int, size: tuple[int, int]) -> Path:
    """`count` videos of a drifting pattern with noise, ten at most of different content; each file
    is different.
    """
    from sla2_eval.videos.video import write_video

    folder.mkdir(parents=True)
    height, width = size
    y, x = np.mgrid[:height, :width]
    for i in range(count):
        path = folder / f"clip {i:03d}-0.mp4"
        if (
            i >= 10
        ):  # the same video with a box that players skip, which is all it takes to be another file
            shutil.copyfile(folder / f"clip {i % 10:03d}-0.mp4", path)
            with path.open("ab") as file:
                file.write((12).to_bytes(4, "big") + b"free" + i.to_bytes(4, "big"))
            continue
        rng = np.random.default_rng([i, int(noise)])
        clip = np.empty((frames, height, width, 3), dtype=np.uint8)
        for t in range(frames):
            wave = 127 + 80 * np.sin((x + 3 * t + 40 * i) / 37) * np.cos((y - 2 * t) / 29)
            clip[t] = np.clip(
                wave[..., None] + rng.normal(0, 2 + noise, (height, width, 1)), 0, 255
            )
        write_video(path, clip, 16)
    return folder


def pair(root: Path, name: str, count: int, frames: int) -> tuple[Path, Path]:
    """A folder of videos and one of their references."""
    note(f"writing {count} pairs of {frames} frames of {SIZE[0]} x {SIZE[1]}")
    return make(root / name / "a", count, 6.0, frames, SIZE), make(
        root / name / "b", count, 0.0, frames, SIZE
    )


def spread(runs: list[dict]) -> dict:
    """Median, least and most of each key, and all values."""
    return {
        key: {
            "median": round(statistics.median(run[key] for run in runs), 4),
            "least": round(min(run[key] for run in runs), 4),
            "most": round(max(run[key] for run in runs), 4),
            "all": [round(run[key], 4) for run in runs],
        }
        for key in runs[0]
    }


def bare(videos: Path, reference: Path, scorers: dict, unpaired: set[str]) -> dict:
    """Seconds of decoding every pair, and of the metrics' arithmetic on it, on one thread in this
    process.
    """
    from sla2_eval.scoring.metrics.base import Sample
    from sla2_eval.videos.video import read_video

    decoding = arithmetic = 0.0
    for path in sorted(videos.iterdir()):
        start = time.perf_counter()
        video, other = read_video(path), read_video(reference / path.name)
        middle = time.perf_counter()
        for name, scorer in scorers.items():
            scorer(Sample(video.frames, video.fps, other.frames))
            if name in unpaired:
                scorer(Sample(other.frames, other.fps))
        decoding += middle - start
        arithmetic += time.perf_counter() - middle
    return {"decoding": decoding, "arithmetic": arithmetic}


def timed(videos: Path, reference: Path, names: list[str], workers: int) -> dict:
    """Seconds of one run of `score`: in all, until each worker did one pair, and a pair
    after that.
    """
    from sla2_eval.scoring.score import score

    moments = []

    def seen(name: str, done: int, total: int) -> None:
        if name == names[0]:
            moments.append(time.perf_counter() - start)

    with tempfile.TemporaryDirectory() as out:
        start = time.perf_counter()
        score(videos, reference, names, out, num_workers=workers, progress=seen)
        total = time.perf_counter() - start
    first, last = moments[workers], moments[-1]
    return {"total": total, "first": first, "a_pair": (last - first) / (len(moments) - 1 - workers)}


def overhead(root: Path, count: int, repeats: int) -> dict:
    """A whole run of one worker against decoding and arithmetic alone, in turn."""
    import torch
    from sla2_eval.scoring import metrics

    videos, reference = pair(root, "overhead", count, 49)
    torch.set_num_threads(1)
    scorers = {name: metrics.load(name, {}) for name in METRICS}
    unpaired = {name for name, spec in metrics.specs().items() if spec.kind == "unpaired"}
    runs = []
    for repeat in range(repeats):
        note(f"overhead, {repeat + 1} of {repeats}")
        alone = bare(videos, reference, scorers, unpaired)
        scored = timed(videos, reference, METRICS, 1)
        least = alone["decoding"] + alone["arithmetic"]
        runs.append(
            {
                **alone,
                "scored": scored["total"],
                "ratio": scored["total"] / least,
                "ratio_once_started": scored["a_pair"] * count / least,
            }
        )
    return {"pairs": count, "frames": 49, **spread(runs)}


def throughput(root: Path, count: int, repeats: int, workers: list[int]) -> dict:
    """One worker against more, in turn: with their start (Ray's, for more than one), and once each
    has done a pair.
    """
    videos, reference = pair(root, f"throughput {count}", count, 17)
    runs: dict[int, list[dict]] = {number: [] for number in workers}
    for repeat in range(repeats):
        for number in workers:
            note(f"throughput of {number} with {count} pairs, {repeat + 1} of {repeats}")
            runs[number].append(timed(videos, reference, METRICS, number))
    one = runs[workers[0]]
    found = {
        "pairs": count,
        "frames": 17,
        "workers": {number: spread(of) for number, of in runs.items()},
    }
    for number in workers[1:]:
        ratios = [
            {"with_start": a["total"] / b["total"], "once_started": a["a_pair"] / b["a_pair"]}
            for a, b in zip(one, runs[number])
        ]
        found[f"{number}_against_{workers[0]}"] = spread(ratios)
    return found


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:
            continue
        for child in children:
            found += family(int(child))
    return found


def proportional(pid: int) -> tuple[float, float]:
    """The megabytes of a process, shared pages divided among those that share them, and those of no
    file; 0 once it ended.
    """
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0, 0.0
    found = {line.partition(":")[0]: int(line.split()[1]) / 1024 for line in lines[1:]}
    return found.get("Pss", 0.0), found.get("Pss_Anon", 0.0)


def is_worker(pid: int) -> bool:
    """Whether a process decodes and scores: a child of sla2_eval's or one of Ray's, before and
    after it has its actor.
    """
    try:
        title = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return False
    return any(
        part in title
        for part in ("--multiprocessing-fork", "default_worker.py", "ray::IDLE", "ray::TaskWorker")
    )


def held(videos: Path, reference: Path, workers: int, out: Path) -> dict:
    """The megabytes that a run of `sla2 score` and all it starts hold: median and most, in all and
    by what holds them.

    Medians are over the time from when each worker holds its libraries to when the first ends.
    "ray": all that is started beside the workers, by Ray or by multiprocessing; "anonymous": what
    of all is no file's, which other programs with the same libraries do not make less.
    """
    names = [
        "psnr",
        "temporal_flickering",
    ]  # SSIM takes long, and its memory does not depend on the number of videos
    command = [
        str(Path(sys.executable).with_name("sla2")),
        "score",
        "--videos",
        str(videos),
        "--reference",
        str(reference),
        "--metrics",
        ",".join(names),
        "--out",
        str(out),
        "--num-workers",
        str(workers),
    ]
    samples: list[dict[str, float]] = []
    full: list[dict[str, float]] = []  # of the samples, those with every worker at work
    seen: set[int] = set()  # workers; a title is empty for the moment in which it changes
    processes = 0
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None:
            sample, working, count = (
                dict.fromkeys(("all", "driver", "workers", "ray", "anonymous"), 0.0),
                0,
                0,
            )
            for pid in family(process.pid):
                if pid != process.pid and is_worker(pid):
                    seen.add(pid)
                megabytes, anonymous = proportional(pid)
                part = "driver" if pid == process.pid else "workers" if pid in seen else "ray"
                sample["all"] += megabytes
                sample[part] += megabytes
                sample["anonymous"] += anonymous
                working += part == "workers" and megabytes > LOADED
                count += megabytes > 0
            samples.append(sample)
            full += [sample] * (working == workers)
            processes = max(processes, count)
            time.sleep(0.2)
        if process.returncode:
            raise RuntimeError(process.stderr.read().strip())
    found = {
        part: {
            "median": round(statistics.median(sample[part] for sample in full or samples)),
            "most": round(max(sample[part] for sample in samples)),
        }
        for part in samples[0]
    }
    return {"megabytes": found, "samples": len(full), "processes": processes}


def memory(root: Path, counts: list[int], workers: list[int]) -> dict:
    """What is held for few and for many videos, by role."""
    rows = []
    for count in counts:
        videos, reference = pair(root, f"memory {count}", count, 17)
        for number in workers:
            note(f"memory of {number} with {count} pairs")
            found = held(videos, reference, number, root / f"out {count} {number}")
            rows.append({"pairs": count, "workers": number, **found})
        shutil.rmtree(videos.parent)
    return {"frames": 17, "metrics": "psnr,temporal_flickering", "rows": rows}


def moment() -> dict:
    """When a part of the measurement begins, in UTC, and how busy the machine is then."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "load_before": round(os.getloadavg()[0], 2),
    }


def machine() -> dict:
    """What the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "torchmetrics", "av", "ray")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        default=["overhead", "throughput", "memory"],
        help="of the measurement",
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="few videos, once: whether it runs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    pairs, runs, counts, repeats = (
        (3, [6], [3, 6], 1) if options.quick else (8, [16, 128], PAIRS, options.repeats)
    )
    found = {"machine": machine(), "size": list(SIZE), "metrics": METRICS}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if "overhead" in options.parts:
            found["overhead"] = moment() | overhead(root, pairs, repeats)
        if "throughput" in options.parts:
            found["throughput"] = [
                moment() | throughput(root, count, repeats, options.workers) for count in runs
            ]
        if "memory" in options.parts:
            found["memory"] = moment() | memory(root, counts, options.workers)
    text = json.dumps(found, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
