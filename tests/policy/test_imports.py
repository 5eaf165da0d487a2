"""Imports run one way, between the packages and inside each, as pyproject.toml says."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [
    str(ROOT / "packages" / name / "src") for name in ("sla2-kernels", "sla2-core", "sla2-eval")
]


def lint(paths: list[str], config: Path) -> subprocess.CompletedProcess:
    """`lint-imports` over the packages found on `paths`."""
    code = f"import sys; sys.path[:0] = {paths!r}\n"
    code += "from importlinter.cli import lint_imports_command as run\nrun()"
    command = [sys.executable, "-c", code, "--config", str(config), "--no-cache"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_imports_run_one_way():
    done = lint(SOURCES, ROOT / "pyproject.toml")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("package", "file", "source"),
    [
        ("sla2-kernels", "specs.py", "import torch"),
        ("sla2-kernels", "launch.py", "from sla2_core import config"),
        ("sla2-core", "config.py", "def f():\n    from sla2_core.attention import SLA2Attention"),
        ("sla2-core", "attention.py", "import diffusers"),
        ("sla2-core", "checks.py", "import sla2_eval.videos.video"),
        ("sla2-eval", "videos/video.py", "from sla2_eval.report import page"),
        ("sla2-eval", "report/page.py", "import sla2_kernels.cpu.forward"),
    ],
)
def test_a_wrong_import_is_found(package, file, source, tmp_path):
    copies = []
    for path in SOURCES:
        shutil.copytree(
            path, copy := tmp_path / Path(path).parts[-2], ignore=shutil.ignore_patterns("weights")
        )
        copies.append(str(copy))
    name = package.replace("-", "_")
    target = tmp_path / package / name / file
    target.write_text(target.read_text() + "\n" + source + "\n")
    done = lint(copies, ROOT / "pyproject.toml")
    assert done.returncode == 1
    assert f"{name}." in done.stdout
