"""Scoring at the size of real videos and over several workers; and how soon it starts."""

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sla2_eval.runs.store import file_digest
from sla2_eval.scoring.score import score
from sla2_eval.videos.video import read_video

SLA2 = str(Path(sys.executable).with_name("sla2"))


@pytest.mark.slow
def test_psnr_starts_soon(make_folder, tmp_path):
    """A whole `sla2 score --metrics psnr` of one small pair, in processor time, takes at most twice
    what importing the metric's libraries does.
    """

    def seconds(command) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    videos, reference = (
        make_folder("a", 1, noise=4.0, height=32, width=32),
        make_folder("b", 1, height=32, width=32),
    )
    command = [
        SLA2,
        "score",
        "--videos",
        str(videos),
        "--reference",
        str(reference),
        "--metrics",
        "psnr",
    ]
    imports = seconds([sys.executable, "-c", "import torch, torchmetrics"])
    assert seconds([*command, "--out", str(tmp_path / "out")]) < 2 * imports


@pytest.mark.slow
def test_real_size_agrees_with_scikit_image(make_folder, tmp_path):
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    size = {"frames": 49, "height": 480, "width": 720}
    videos, reference = make_folder("a", 1, noise=12.0, **size), make_folder("b", 1, **size)
    (row,) = score(videos, reference, ["psnr", "ssim", "temporal_flickering"], tmp_path / "out")[
        "videos"
    ]
    ours, theirs = (
        read_video(folder / row["file_name"]).frames / 255.0 for folder in (videos, reference)
    )
    options = {
        "data_range": 1.0,
        "channel_axis": -1,
        "gaussian_weights": True,
        "sigma": 1.5,
        "use_sample_covariance": False,
    }
    psnr = np.mean([peak_signal_noise_ratio(t, o, data_range=1.0) for o, t in zip(ours, theirs)])
    ssim = np.mean([structural_similarity(t, o, **options) for o, t in zip(ours, theirs)])
    assert row["scores"]["psnr"] == pytest.approx(psnr, rel=1e-3)
    assert row["scores"]["ssim"] == pytest.approx(ssim, rel=1e-3)


class Detector(torch.nn.Module):
    """A stand-in for the TorchScript I3D, wider than the set is large."""

    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(3 * 4 * 4, 64)

    def forward(
        self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool
    ) -> torch.Tensor:
        return self.project(torch.nn.functional.adaptive_avg_pool3d(x, [1, 4, 4]).flatten(1))


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_one_two_and_three_workers_give_identical_bytes(make_folder, tmp_path):
    size = {"frames": 17, "height": 48, "width": 48}
    videos, reference = make_folder("a", 9, noise=9.0, **size), make_folder("b", 9, **size)
    (videos / "pattern 004-0.mp4").write_bytes(b"broken")
    torch.manual_seed(0)
    script = tmp_path / "i3d.pt"
    torch.jit.script(Detector()).save(str(script))
    settings = {
        "fvd": {"size": 32, "files": {"i3d": str(script)}, "digests": {"i3d": file_digest(script)}}
    }
    names = ["psnr", "ssim", "fvd", "temporal_flickering", "motion_smoothness_linear"]
    written = []
    for workers in (1, 2, 3):
        out = tmp_path / f"out {workers}"
        results = score(
            videos, reference, names, out, workers, allow_failures=True, settings=settings
        )
        assert results["metrics"]["fvd"]["mean"] > 0
        assert results["metrics"]["fvd"]["num_videos"] == 8
        written.append((out / "results.json").read_bytes())
    assert written[0] == written[1] == written[2]
