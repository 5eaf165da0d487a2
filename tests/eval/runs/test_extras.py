"""What an installation without an extra says: one line that names the library and the extra."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import pytest
from sla2_eval.runs.extras import EXTRAS, how_to_get, needed_for
from sla2_eval.videos.video import write_video

ROOT = Path(__file__).parents[3]
# Runs the command as if the libraries named in its first argument were not installed.
WITHOUT = """
import sys
from importlib.machinery import PathFinder
absent, arguments = sys.argv[1].split(","), sys.argv[2:]
class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        gone = name.partition(".")[0] in absent
        return None if gone else super().find_spec(name, path, target)
sys.meta_path = [Finder if entry is PathFinder else entry for entry in sys.meta_path]
from sla2_eval.cli.main import main
sys.exit(main(arguments))
"""


def without(absent: str, *arguments: object) -> subprocess.CompletedProcess:
    """`sla2 ARGUMENTS` where the libraries `absent` (comma-separated) are not installed."""
    command = [sys.executable, "-c", WITHOUT, absent, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def videos(tmp_path):
    """A folder of two videos of eight frames."""
    folder = tmp_path / "videos"
    folder.mkdir()
    frames = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    for name in ("a-0", "b-0"):
        write_video(folder / f"{name}.mp4", frames, 8)
    return folder


def test_every_library_is_in_its_extra():
    project = tomllib.loads((ROOT / "packages/sla2-eval/pyproject.toml").read_text())["project"]
    extras = {
        extra: {re.match(r"[\w.-]+", text)[0].lower().replace("_", "-") for text in texts}
        for extra, texts in project["optional-dependencies"].items()
    }
    distributions = packages_distributions()
    for module, extra in EXTRAS.items():
        names = {name.lower().replace("_", "-") for name in distributions.get(module, [module])}
        assert names & extras[extra], module


def test_the_line_names_library_purpose_and_extra():
    with (
        pytest.raises(ModuleNotFoundError, match=r"^ray: expected it for .*'sla2-eval\[ray\]'\)$"),
        needed_for("several workers"),
    ):
        raise ModuleNotFoundError("No module named 'ray'", name="ray")
    with pytest.raises(ModuleNotFoundError, match="a fault"), needed_for("several workers"):
        raise ModuleNotFoundError("a fault inside ray", name="ray._private")
    assert how_to_get("vbench") == "pip install vbench"


def test_two_workers_without_ray(videos, tmp_path):
    metrics = ("--metrics", "temporal_flickering", "--num-workers", 2)
    done = without("ray", "score", "--videos", videos, *metrics, "--out", tmp_path / "scores")
    assert done.returncode == 1
    assert done.stderr == (
        "sla2: error: ray: expected it for several workers or a cluster, got none (pip install"
        " 'sla2-eval[ray]')\n"
    )


def test_scores_without_torchmetrics(videos, tmp_path):
    metrics = ("--metrics", "psnr,temporal_flickering", "--allow-missing")
    scored = ("score", "--videos", videos, "--reference", videos, "--out", tmp_path / "scores")
    done = without("torchmetrics,torchvision,lpips,open_clip,timm", *scored, *metrics)
    assert done.returncode == 0, done.stderr
    assert "needs the Python package torchmetrics (pip install 'sla2-eval[metrics]')" in done.stdout


def test_a_report_without_jinja2(videos, tmp_path):
    scored = ("score", "--videos", videos, "--metrics", "temporal_flickering")
    assert without("ray", *scored, "--out", tmp_path / "scores").returncode == 0
    done = without("jinja2", "report", tmp_path / "scores")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "sla2: error: jinja2: expected it for the page of a report, got none (pip install"
        " 'sla2-eval[report]')"
    )
