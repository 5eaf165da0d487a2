"""Faults that scoring survives: killed workers, poison videos, a killed driver, a full disk, two
runs at once, broken files.

The faults come from a metric of the tests' own, which the drivers and their workers have.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import mp4, toy_metric
from sla2_eval.videos.video import write_video

HOOK = """
import os, signal, time
from pathlib import Path

def load(name, settings, device):
    return score

def score(sample):
    here, prompt = Path(os.environ["FAULTS"]), sample.prompt
    with (here / "calls").open("a") as log:
        log.write(prompt + "\\n")
    if (here / "kill once").exists() and prompt.endswith("002"):
        (here / "kill once").unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    if (here / "poison").exists() and prompt.endswith("001"):
        os.kill(os.getpid(), signal.SIGKILL)
    if (here / "fail").exists() and prompt.endswith("001"):
        raise ValueError("no score today\\nnor tomorrow")
    if (here / "fail once").exists() and prompt.endswith("002"):
        (here / "fail once").unlink()
        raise ValueError("not yet")
    if (here / "slow").exists():
        time.sleep(0.4)
    return float(sample.frames.mean())
"""

DRIVER = """
import sys
from sla2_eval.scoring.score import ScoringError, score
videos, out, workers = sys.argv[1:4]
try:
    score(videos, None, ["toy_metrics:toy", "temporal_flickering"], out, num_workers=int(workers))
except ScoringError as error:
    print(error)
    sys.exit(1)
"""

# seconds for one run, which takes some ten where nothing else does; Ray's start is most of it
PATIENCE = 600
WORKERS = [1, pytest.param(2, marks=[pytest.mark.slow, pytest.mark.timeout(4 * PATIENCE)])]


class Runs:
    """Starts drivers of scoring as processes of their own, with the hook on their path."""

    def __init__(self, root: Path):
        self.root = root
        path = toy_metric.write(root / "hook", HOOK)
        self.environment = {**os.environ, "PYTHONPATH": path, "FAULTS": str(root)}

    def fault(self, name: str) -> Path:
        (self.root / name).touch()
        return self.root / name

    def calls(self) -> list[str]:
        return (self.root / "calls").read_text().split("\n")[:-1]

    def start(self, videos: Path, out: Path, workers: int = 1, **options) -> subprocess.Popen:
        command = [sys.executable, "-c", DRIVER, str(videos), str(out), str(workers)]
        return subprocess.Popen(
            command,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    def finish(self, process: subprocess.Popen, expected: int = 0) -> str:
        said, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == expected, errors
        return said + errors

    def score(self, videos: Path, out: Path, workers: int = 1, expected: int = 0) -> str:
        return self.finish(self.start(videos, out, workers), expected)


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path)


def partials(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if ".partial" in path.name]


@pytest.mark.parametrize("workers", WORKERS)
def test_a_killed_worker_costs_nothing_but_its_video_again(make_folder, tmp_path, runs, workers):
    videos = make_folder("a", 5, height=32, width=32)
    runs.score(videos, tmp_path / "clean")
    kill = runs.fault("kill once")
    runs.score(videos, tmp_path / "out", workers)
    assert not kill.exists()
    assert (tmp_path / "out" / "results.json").read_bytes() == (
        tmp_path / "clean" / "results.json"
    ).read_bytes()
    assert json.loads((tmp_path / "out" / "timing.json").read_text())["deaths"] == 1


def test_a_worker_that_cannot_start_says_why(make_folder, tmp_path, runs):
    videos = make_folder("a", 1, height=32, width=32)
    with (tmp_path / "hook" / "sitecustomize.py").open("a") as site:
        site.write("import sys\nif '--multiprocessing-fork' in sys.orig_argv:\n")
        site.write("    raise SystemExit('no room for a worker')\n")
    said = runs.score(videos, tmp_path / "out", expected=1)
    assert "got a worker that died 3 times (exit code 1)" in said
    assert "\nSystemExit: no room for a worker\n" in said


@pytest.mark.parametrize("workers", WORKERS)
def test_a_poison_video_is_tried_three_times_and_listed(make_folder, tmp_path, runs, workers):
    videos = make_folder("a", 4, height=32, width=32)
    runs.fault("poison")
    said = runs.score(videos, tmp_path / "out", workers, expected=1)
    assert "1 of 4 videos failed" in said
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    (row,) = results["failed"]
    assert row["file_name"] == "pattern 001-0.mp4"
    assert row["error"].endswith("expected a video that scores, got a worker that died 3 times")
    assert runs.calls().count("pattern 001") == 3
    scored = {row["file_name"] for row in results["videos"] if len(row["scores"]) == 2}
    assert scored == {f"pattern {i:03d}-0.mp4" for i in (0, 2, 3)}


@pytest.mark.parametrize("workers", WORKERS)
def test_a_metric_that_fails_is_tried_three_times_and_costs_its_video_nothing_else(
    make_folder, tmp_path, runs, workers
):
    videos = make_folder("a", 4, height=32, width=32)
    runs.fault("fail")
    once = runs.fault("fail once")
    assert "1 of 4 videos failed" in runs.score(videos, tmp_path / "out", workers, expected=1)
    assert not once.exists()
    assert [runs.calls().count(f"pattern {i:03d}") for i in range(4)] == [1, 3, 2, 1]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    (row,) = results["failed"]
    assert (row["file_name"], row["metric"], row["error"]) == (
        "pattern 001-0.mp4",
        "toy",
        "no score today",
    )
    assert sorted(results["videos"][1]["scores"]) == ["temporal_flickering"]
    assert results["metrics"]["toy"]["num_videos"] == 3


@pytest.mark.parametrize("workers", WORKERS)
def test_a_killed_driver_is_run_again_to_an_identical_report(make_folder, tmp_path, runs, workers):
    videos = make_folder("a", 7, height=32, width=32)
    runs.score(videos, tmp_path / "clean")
    runs.fault("slow")
    process = runs.start(videos, tmp_path / "out", workers)
    store = tmp_path / "out" / "store" / "toy"
    end = time.time() + PATIENCE / 2
    while len(list(store.rglob("*.json"))) < 2 and time.time() < end:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "results.json").exists()
    kept = len(list(store.rglob("*.json")))
    assert 2 <= kept < 7
    runs.score(videos, tmp_path / "out", workers)
    assert (tmp_path / "out" / "results.json").read_bytes() == (
        tmp_path / "clean" / "results.json"
    ).read_bytes()
    assert json.loads((tmp_path / "out" / "timing.json").read_text())["tasks"] <= 7 - kept


def test_a_full_disk_ends_the_run_and_leaves_nothing_half_written(make_folder, tmp_path, runs):
    """A limit on file size stands for the disk: the first result that is too long fails in the
    middle of its write.
    """
    import resource

    videos = make_folder("a", 3, height=32, width=32)
    runs.score(videos, tmp_path / "clean")

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))

    said = runs.finish(runs.start(videos, tmp_path / "out", preexec_fn=limit), expected=1)
    assert "File too large" in said
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []
    runs.score(videos, tmp_path / "out")
    assert (tmp_path / "out" / "results.json").read_bytes() == (
        tmp_path / "clean" / "results.json"
    ).read_bytes()


@pytest.mark.parametrize("workers", WORKERS)
def test_a_full_tmpfs_ends_the_run_and_what_was_written_is_kept(
    make_folder, tmp_path, runs, workers
):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        videos = make_folder("a", 12, height=32, width=32)
        said = runs.score(videos, disk / "out", workers, expected=1)
        assert "No space left on device" in said
        assert partials(disk) == []
        stored = [json.loads(path.read_text()) for path in (disk / "out").rglob("*.json")]
        assert stored
        assert all(set(entry) == {"key", "result", "digest"} for entry in stored)
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        runs.score(videos, disk / "out", workers)
        runs.score(videos, tmp_path / "clean")
        assert (disk / "out" / "results.json").read_bytes() == (
            tmp_path / "clean" / "results.json"
        ).read_bytes()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("workers", WORKERS)
def test_two_runs_into_one_folder_at_once(make_folder, tmp_path, runs, workers):
    videos = make_folder("a", 6, height=32, width=32)
    runs.score(videos, tmp_path / "clean")
    runs.fault("slow")
    both = [runs.start(videos, tmp_path / "out", workers) for _ in range(2)]
    for process in both:
        runs.finish(process)
    assert (tmp_path / "out" / "results.json").read_bytes() == (
        tmp_path / "clean" / "results.json"
    ).read_bytes()
    assert partials(tmp_path / "out") == []


def broken(folder: Path, names: list[str], good: np.ndarray) -> dict[str, str]:
    """Break ten videos of a folder in ten ways; returns what each error must say."""
    paths = [folder / name for name in names]
    paths[0].write_bytes(b"")
    paths[1].write_bytes(paths[1].read_bytes()[:-400])
    paths[2].write_text("not a video at all\n" * 40)
    mp4.sound_alone(paths[3])
    mp4.no_frames(paths[4])
    paths[5].unlink()
    paths[6].unlink()
    paths[6].mkdir()
    write_video(paths[7], good[:, :16, :16], 8)
    write_video(paths[8], good[:2], 8)
    write_video(paths[9], good, 25)
    errors = [
        "got an empty file",
        "expected",
        "decoding error",
        "got 1 audio stream(s)",
        "expected",
        "got nothing there",
        "got Is a directory",
        "got 3 frames of 16 x 16",
        "got 2 frames of 32 x 32",
        "at 25 a second",
    ]
    return dict(zip(names, errors, strict=True))


@pytest.mark.parametrize("workers", WORKERS)
def test_of_200_videos_10_broken_in_ten_ways_190_are_scored(make_folder, tmp_path, workers):
    size = {"frames": 3, "height": 32, "width": 32}
    videos, reference = make_folder("a", 200, noise=5.0, **size), make_folder("b", 200, **size)
    names = [f"pattern {i:03d}-0.mp4" for i in range(3, 200, 20)]
    good = np.full((3, 32, 32, 3), 90, dtype=np.uint8)
    expected = broken(videos, names, good)
    command = [
        str(Path(sys.executable).with_name("sla2")),
        "score",
        "--videos",
        str(videos),
        "--reference",
        str(reference),
        "--metrics",
        "psnr,temporal_flickering",
        "--out",
        str(tmp_path / "out"),
        "--num-workers",
        str(workers),
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1, run.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {row["file_name"] for row in results["failed"]} == set(names)
    for row in results["failed"]:
        assert expected[row["file_name"]] in row["error"], row
        assert "\n" not in row["error"]
        assert row["file_name"] in row["error"]
    assert (
        sum(sorted(row["scores"]) == ["psnr", "temporal_flickering"] for row in results["videos"])
        == 190
    )
    assert results["metrics"]["psnr"]["num_videos"] == 190
    again = subprocess.run([*command, "--allow-failures"], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results


MEASURED = """
import resource, sys
from sla2_eval.scoring.score import score
videos, out = sys.argv[1:3]
score(videos, None, ["temporal_flickering"], out)
who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
print(*(resource.getrusage(one).ru_maxrss for one in who))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_videos(make_folder, tmp_path):
    peaks = []
    for count in (20, 200):
        videos = make_folder(
            f"videos {count}", count, frames=8, height=128, width=128
        )  # 180 more are 70 MB of frames
        command = [sys.executable, "-c", MEASURED, str(videos), str(tmp_path / f"out {count}")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append([int(kilobytes) / 1024 for kilobytes in done.stdout.split()])
    for few, many in zip(*peaks, strict=True):
        assert many < few + 40, peaks
