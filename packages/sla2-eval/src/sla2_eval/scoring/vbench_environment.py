"""The original VBench in an environment of its own, made with uv: its pins (transformers 4.33,
numpy 1) cannot live beside ours. It is called as a child process, and its exit code counts.

VBench's own command hands its arguments to a shell and loses the exit code, so its launcher is
called without it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from sla2_kernels.cache import cache_folder

from sla2_eval.runs.store import write_atomic
from sla2_eval.scoring.vbench_dimensions import DIMENSIONS, VERSION

PYTHON = "3.11"
REQUIREMENTS = (
    f"vbench=={VERSION}",
    "torch==2.5.1",  # 2.6 and later refuse to load VBench's pickled weights
    "torchvision==0.20.1",
    "setuptools<81",  # with pkg_resources, which openai-clip imports
    "wheel",
)
DETECTRON2 = "detectron2 @ git+https://github.com/facebookresearch/detectron2.git"
READY = "sla2.json"  # in an environment that is complete: {"packages": [...]}


def environment() -> Path:
    """Where the environment lies: in SLA2_CACHE, else in sla2 of the user's cache folder."""
    return cache_folder() / f"vbench-{VERSION}"


def setup() -> list[str]:
    """Make the environment, in place of an earlier one, and return its packages, as NAME==VERSION.

    detectron2, which has no wheels, is built against the CUDA toolkit that is here. Raises
    RuntimeError if uv is missing or a step ends with another code than 0; without detectron2 the
    dimensions that do not need it still run.
    """
    home, uv = environment(), shutil.which("uv")
    if uv is None:
        raise RuntimeError("vbench: expected uv on the path (pip install uv), got none")
    python = str(home / "bin" / "python")
    (home / READY).unlink(missing_ok=True)
    install = [uv, "pip", "install", "--python", python]
    _step([uv, "venv", "--quiet", "--clear", "--python", PYTHON, str(home)], "uv venv")
    _step([*install, *REQUIREMENTS], "uv pip install vbench")
    _note_packages(uv, python, home)
    try:
        _step([*install, "--no-build-isolation", DETECTRON2], "uv pip install detectron2")
    except RuntimeError as error:
        lacking = ", ".join(name for name, about in DIMENSIONS.items() if about.detectron2)
        raise RuntimeError(f"{error}; all dimensions but {lacking} run without it") from None
    return _note_packages(uv, python, home)


def _step(command: Sequence[str], name: str) -> None:
    """Run a command whose messages go to standard error."""
    code = subprocess.run(command, stdout=subprocess.DEVNULL, env=_clean()).returncode
    if code:
        raise RuntimeError(f"vbench: {name}: expected exit code 0, got {code}")


def _note_packages(uv: str, python: str, home: Path) -> list[str]:
    """List the packages in the environment, which marks it as complete."""
    command = [uv, "pip", "freeze", "--python", python]
    done = subprocess.run(command, capture_output=True, text=True, env=_clean())
    if done.returncode:
        raise RuntimeError(f"vbench: uv pip freeze: expected exit code 0, got {done.returncode}")
    packages = done.stdout.split("\n")
    packages = [line.strip() for line in packages if line.strip()]
    write_atomic(home / READY, json.dumps({"packages": packages}, indent=1) + "\n")
    return packages


def _clean() -> dict[str, str]:
    """This process's variables without those that would mix our packages into VBench's."""
    ours = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT")
    return {k: v for k, v in os.environ.items() if k not in ours} | {"PYTHONNOUSERSITE": "1"}


def ready_for(dimensions: Sequence[str]) -> Path:
    """The environment's Python. Raises RuntimeError if there is no complete environment, or none
    with detectron2 for a dimension that needs it.
    """
    home = environment()
    try:
        packages = json.loads((home / READY).read_text(encoding="utf-8"))["packages"]
    except (OSError, ValueError, KeyError) as error:
        raise RuntimeError(
            f"vbench: expected its environment in {home} (sla2 vbench --setup), got none"
        ) from error
    needing = [name for name in dimensions if DIMENSIONS[name].detectron2]
    if needing and not any(line.startswith("detectron2") for line in packages):
        raise RuntimeError(
            f"vbench: expected detectron2 in {home} for {', '.join(needing)} (sla2 vbench --setup),"
            " got none"
        )
    return home / "bin" / "python"


def evaluate(
    python: Path, dimension: str, videos: Path, info: Path, out: Path
) -> Mapping[str, list]:
    """VBench's own result of a dimension, {dimension: [mean, [{video_path, video_results}]]}.

    On one GPU: some of its totals are others on several. `out`: a new folder, for what it writes;
    `log.txt` there has what it printed. Raises RuntimeError if it ends with another code than 0, or
    leaves no result or several.
    """
    out.mkdir(parents=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    launcher += ["-m", "vbench.launch.evaluate"]
    given = {
        "--videos_path": videos,
        "--full_json_dir": info,
        "--output_path": out,
        "--dimension": dimension,
    }
    arguments = [str(part) for pair in given.items() for part in pair]
    log = out / "log.txt"
    with log.open("wb") as file:
        command = [str(python), *launcher, *arguments]
        code = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=out, env=_clean()
        ).returncode
    name = f"vbench --dimension {dimension}"
    if code:
        raise RuntimeError(f"{name}: exit code {code}: {_reason(log)} ({log})")
    written = list(out.glob("*_eval_results.json"))
    if len(written) != 1:
        raise RuntimeError(f"{name}: expected one result, got {len(written)} ({log})")
    try:
        return json.loads(written[0].read_text(encoding="utf-8"))
    except ValueError as error:
        raise RuntimeError(f"{name}: expected a result in JSON, got {error} ({log})") from error


def _reason(log: Path) -> str:
    """The line of an output that says why it failed: the first error of Python, else the last."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = (
        re.match(r"(?:\[rank\d+\]:\s*)?((?:\w+\.)*\w*(?:Error|Exception)\b.*)", x) for x in lines
    )
    return next((found[1] for found in errors if found), lines[-1] if lines else "no message")
