"""VMAF by ffmpeg: the call and its faults with a stand-in, the numbers where libvmaf is present."""

import json
import subprocess

import numpy as np
import pytest
from sla2_eval.scoring import metrics
from sla2_eval.scoring.metrics import vmaf
from sla2_eval.scoring.metrics.base import Sample
from sla2_eval.videos.video import read_video, write_video

FFMPEG = """#!/bin/sh
case "$*" in *-filters*) echo " .. {filter} VV->V"; exit 0;; esac
echo "$@" > {log}
for file in video reference; do wc -c < $file >> {log}; done
{then}
"""


@pytest.fixture(autouse=True)
def fresh():
    vmaf.lacks.cache_clear()
    yield
    vmaf.lacks.cache_clear()


@pytest.fixture
def ffmpeg(tmp_path, monkeypatch):
    """A function that puts an ffmpeg on the path, with a filter, which ends as it is told."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def put(then: str, name: str = "libvmaf"):
        command, log = tmp_path / "ffmpeg", tmp_path / "called.txt"
        command.write_text(FFMPEG.format(log=log, then=then, filter=name))
        command.chmod(0o755)
        return log

    return put


def sample(frames: int) -> Sample:
    """A moving pattern, and the same in blocks of 2 x 2."""
    down, across = np.mgrid[:54, :98]
    base = np.stack([(3 * down + 2 * across + 9 * t) % 200 for t in range(frames)])
    reference = np.repeat(base[..., None], 3, 3).astype(np.uint8)
    return Sample(reference[:, ::2, ::2].repeat(2, 1).repeat(2, 2), 8.0, reference)


def test_both_videos_go_through_the_filter_and_its_mean_comes_back(ffmpeg):
    document = {"frames": [{}, {}], "pooled_metrics": {"vmaf": {"mean": 87.5}}}
    log = ffmpeg(f"echo '{json.dumps(document)}' > log.json")
    assert metrics.why_unavailable(metrics.specs()["vmaf"]) is None
    score = metrics.load("vmaf", {"model": "vmaf_v0.6.1neg"})
    assert score(sample(2)) == 87.5
    called, *sizes = log.read_text().splitlines()
    assert called.count("-video_size 98x54") == 2
    assert "libvmaf=model=version=vmaf_v0.6.1neg:log_fmt=json" in called
    assert [int(size) for size in sizes] == [2 * 54 * 98 * 3] * 2
    with pytest.raises(ValueError, match="ffmpeg: expected VMAF of 3 frames, got 2"):
        score(sample(3))


def test_what_is_missing_or_fails_is_said(ffmpeg, tmp_path, monkeypatch):
    ffmpeg("echo too small >&2; exit 234")
    with pytest.raises(ValueError, match="ffmpeg: too small"):
        metrics.load("vmaf", {})(sample(2))
    for name, said in (("psnr", "an ffmpeg with libvmaf on the path, got one without"), (None, "")):
        vmaf.lacks.cache_clear()
        if name:
            ffmpeg("exit 0", name)
        else:
            monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
            said = "needs ffmpeg with libvmaf on the path, got none"
        assert said in metrics.why_unavailable(metrics.specs()["vmaf"])
        with pytest.raises(metrics.MetricUnavailable, match="libvmaf"):
            metrics.load("vmaf", {})


def test_the_numbers_are_ffmpegs_of_lossless_files(tmp_path):
    """Of files that give back each frame to the bit, which ffmpeg decodes itself."""
    if vmaf.lacks():
        pytest.skip(vmaf.lacks())
    given, score = sample(5), metrics.load("vmaf", {})
    assert score(Sample(given.reference, 8.0, given.reference)) > 95
    found = score(given)
    assert 0 < found < 90
    assert score(Sample(given.reference, 8.0, given.frames)) != found
    for name, frames in (("video", given.frames), ("reference", given.reference)):
        write_video(tmp_path / f"{name}.mp4", frames, 8, lossless=True)
        np.testing.assert_array_equal(read_video(tmp_path / f"{name}.mp4").frames, frames)
    luma = "scale=out_color_matrix=bt709:out_range=tv,format=yuv444p"
    filters = f"[0:v]{luma}[a];[1:v]{luma}[b];[a][b]libvmaf=log_fmt=json:log_path=x.json"
    files = ["-i", "video.mp4", "-i", "reference.mp4"]
    command = ["ffmpeg", "-v", "error", *files, "-lavfi", filters, "-f", "null", "-"]
    subprocess.run(command, cwd=tmp_path, check=True)
    theirs = json.loads((tmp_path / "x.json").read_text())["pooled_metrics"]["vmaf"]["mean"]
    assert found == pytest.approx(theirs, abs=1e-4)
