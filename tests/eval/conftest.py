"""Small real mp4 files for the tests of scoring and of the report."""

import json

import numpy as np
import pytest


def clip(seed: int, frames: int = 5, height: int = 48, width: int = 64, noise: float = 0.0) -> np.ndarray:
    """A moving pattern, uint8 (frames, height, width, 3), with noise on top if asked."""
    y, x = np.mgrid[:height, :width]
    rng = np.random.default_rng(seed)
    phase = rng.uniform(0, 6, 3)
    video = np.stack(
        [[np.sin((x + 2 * t) / 7 + p) * np.cos((y + seed) / 5 - p) for p in phase] for t in range(frames)]
    ).transpose(0, 2, 3, 1)
    video = 127 + 90 * video + noise * rng.normal(size=video.shape)
    return np.clip(video, 0, 255).astype(np.uint8)


@pytest.fixture
def make_folder(tmp_path):
    """make_folder(name, count, noise=0, ...) writes {prompt}-0.mp4 files and a manifest, and returns the folder."""
    from sla2_eval.manifest import video_name
    from sla2_eval.video import write_video

    def make(name: str, count: int, noise: float = 0.0, fps: float = 8, **size):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        rows = []
        for i in range(count):
            file_name = video_name(f"pattern {i:03d}", 0)
            write_video(folder / file_name, clip(i, noise=noise, **size), fps)
            rows.append(json.dumps({"file_name": file_name, "prompt": f"pattern {i:03d}", "index": 0, "seed": i}))
        (folder / "manifest.jsonl").write_text("\n".join(rows) + "\n")
        return folder

    return make
