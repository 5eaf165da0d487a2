"""tools/gpu_check.py on a machine without a GPU: what it says, how it counts, what it passes on."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TOOL = Path(__file__).parents[2] / "tools" / "gpu_check.py"


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("gpu_check", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_one_line_says_what_is_missing():
    done = subprocess.run([sys.executable, TOOL], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("gpu-check: ")
    assert done.stderr.count("\n") == 1


def test_packages_are_found_by_path_alone(tool):
    code = "import sla2_kernels, sla2_core, sla2_eval, sys; print(sla2_eval.__file__)"
    done = subprocess.run([sys.executable, "-c", code], env=tool.environment(), cwd="/", capture_output=True, text=True)
    assert done.stdout.strip().startswith(str(TOOL.parents[1] / "packages" / "sla2-eval" / "src"))
    assert tool.environment()["PYTHONPATH"].split(os.pathsep)[:3] == tool.SOURCES


@pytest.mark.parametrize(
    ("code", "output", "passed", "counts"),
    [
        (0, "12 passed, 3 deselected in 4.0s", True, {"passed": 12}),
        (1, "1 failed, 11 passed in 4.0s", False, {"failed": 1, "passed": 11}),
        (0, "40 skipped in 1.0s", False, {"skipped": 40}),
        (124, "", False, {}),
    ],
    ids=["passed", "failed", "nothing ran", "too long"],
)
def test_the_tests_are_counted(tool, monkeypatch, code, output, passed, counts):
    monkeypatch.setattr(tool, "call", lambda command, minutes, **env: (code, output, 1.0))
    found = tool.run_tests()
    assert found["passed"] is passed
    assert found["seconds"] == 1.0
    assert found["counts"] == counts
    assert found.get("output") == (None if passed else output)


def test_a_part_that_takes_too_long_is_ended(tool):
    code, output, seconds = tool.call(
        [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"], 0.05
    )
    assert code == 124
    assert output == "begun\n"
    assert seconds < 30


def test_the_sanitizer_is_called_with_an_exit_code_or_skipped(tool, monkeypatch):
    monkeypatch.setattr(tool.shutil, "which", lambda name, path: None)
    assert tool.run_sanitizer("memcheck") == {"passed": True, "skipped": "compute-sanitizer is not installed"}
    called = []
    monkeypatch.setattr(tool.shutil, "which", lambda name, path: "compute-sanitizer")
    monkeypatch.setattr(tool, "call", lambda command, minutes: called.append(command) or (9, "a race", 1.0))
    found = tool.run_sanitizer("racecheck")
    assert (found["passed"], found["output"]) == (False, "a race")
    assert called[0][:5] == ["compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "9"]
    assert called[0][-1] == "--tiny"
