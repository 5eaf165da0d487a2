"""Pairs of generated videos are compared by their lossless files."""

import json

import numpy as np
import pytest
from sla2_eval.cli.main import main
from sla2_eval.generation.sampling import SamplingConfig, generate
from sla2_eval.scoring.score import score
from sla2_eval.videos.video import read_video


def clip(index: int, noise: float) -> np.ndarray:
    """Three frames of 32 x 48 of a moving pattern, uint8."""
    t, y, x = np.mgrid[:3, :32, :48]
    waves = [127 + 90 * np.sin((x + 2 * t) / 7 + c + index) * np.cos(y / 5) for c in range(3)]
    video = np.stack(waves, axis=-1)
    video += noise * np.random.default_rng(index).normal(size=video.shape)
    return np.clip(video, 0, 255).round().astype(np.uint8)


class Painter:
    """A generator of moving patterns with `noise` on top."""

    transformer, fps, upscale, handles = None, 8, 1, ()

    def __init__(self, noise: float):
        self.noise = noise

    def sample(self, requests, config):
        return np.stack([clip(r.index, self.noise) for r in requests])


def generated(tmp_path, name: str, noise: float, **config):
    folder = tmp_path / name
    generate(Painter(noise), ["a"], folder, config=SamplingConfig(**config), indices=(0, 1))
    return folder


def test_pairs_are_compared_without_the_codecs_loss(tmp_path, capsys):
    """Noise of 0.6 grey levels, which H.264 does not keep: PSNR is of the frames themselves."""
    videos, reference = generated(tmp_path, "a", 0.6), generated(tmp_path, "b", 0.0)
    names = ["psnr", "ssim", "temporal_flickering"]
    results = score(videos, reference, names, tmp_path / "out")
    first, other = (clip(0, noise).astype(float) for noise in (0.6, 0.0))
    errors = ((first - other) ** 2).mean((1, 2, 3)) / 255**2
    found = results["videos"][0]["scores"]
    assert found["psnr"] == pytest.approx(np.mean(-10 * np.log10(errors)), abs=1e-3)
    about = results["metrics"]
    assert [about[n].get("num_lossless") for n in names] == [2, 2, None]
    shown = read_video(videos / "a-0.mp4").frames.astype(float)
    flicker = np.abs(shown[1:] - shown[:-1]).mean() / 255
    assert found["temporal_flickering"] == pytest.approx(1 - flicker, abs=1e-9)  # of what is shown

    encoded = generated(tmp_path, "c", 0.0, lossless=False)
    assert not (encoded / "lossless").exists()
    options = ["--metrics", "psnr", "--out", str(tmp_path / "lossy"), "--json"]
    assert main(["score", "--videos", str(videos), "--reference", str(encoded), *options]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["note"] == "2 of 2 as encoded, the codec's loss included"
    assert row["mean"] < about["psnr"]["mean"] - 1


def test_a_lossless_file_that_is_gone_or_broken_fails_its_pair_alone(tmp_path):
    videos, reference = generated(tmp_path, "a", 9.0), generated(tmp_path, "b", 0.0)
    (videos / "lossless" / "a-0.mp4").unlink()
    (videos / "lossless" / "a-1.mp4").write_bytes(b"no video")
    names = ["psnr", "temporal_flickering"]
    results = score(videos, reference, names, tmp_path / "out", allow_failures=True)
    assert [sorted(row["scores"]) for row in results["videos"]] == [names[1:], names[1:]]
    assert results["metrics"]["temporal_flickering"]["difference"]["n"] == 1
    gone, broken = results["failed"]
    assert gone["error"].endswith("lossless/a-0.mp4: expected a video file, got nothing there")
    assert broken["metric"] == "psnr"
    assert "lossless/a-1.mp4: expected a readable video" in broken["error"]
