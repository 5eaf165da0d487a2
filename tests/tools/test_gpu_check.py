"""tools/gpu_check.py on a machine without a GPU: what it says, how it counts, what it passes on."""

import importlib.util
import json
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
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=tool.environment(),
        cwd="/",
        capture_output=True,
        text=True,
    )
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
    found = tool.operator_tests()
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
    assert tool.run_sanitizer("memcheck") == {
        "passed": True,
        "skipped": "compute-sanitizer is not installed",
    }
    called = []
    monkeypatch.setattr(tool.shutil, "which", lambda name, path: "compute-sanitizer")
    monkeypatch.setattr(
        tool,
        "call",
        lambda command, minutes, **env: called.append((command, env)) or (9, "a race", 1.0),
    )
    found = tool.run_sanitizer("racecheck")
    assert (found["passed"], found["output"]) == (False, "a race")
    command, env = called[0]
    assert command[:5] == ["compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "9"]
    assert command[-1] == "--tiny"
    assert env == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def test_the_tests_need_no_package_beyond_torch(tool, monkeypatch):
    called = []
    monkeypatch.setattr(
        tool,
        "call",
        lambda command, minutes, **env: called.append((command, env)) or (0, "1 passed", 1.0),
    )
    tool.kernel_tests()
    tool.operator_tests()
    files = [part for command, _ in called for part in command if part.endswith(".py")]
    assert files[-3:] == [
        "tests/kernels/test_gpu.py",
        "tests/core/backends/test_cuda_ops.py",
        "tests/core/backends/test_cuda_pooled.py",
    ]
    assert "tests/kernels/test_kernels_forward.py" in files
    assert all((tool.ROOT / file).is_file() for file in files)
    assert [env.get("CUDA_LAUNCH_BLOCKING") for _, env in called] == [
        "1",
        None,
    ]  # a graph cannot be captured while it is set
    assert all(env["SLA2_TEST_TARGET"] == "cuda" for _, env in called)
    blocked = ("diffusers", "ray", "lpips", "numba", "accelerate", "safetensors", "rich", "av")
    code = f"""
import sys
for name in {blocked!r}:
    sys.modules[name] = None
import pytest
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *{files!r}]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=tool.environment(),
        cwd=tool.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:]


def test_what_is_done_is_kept_and_a_failure_has_a_log(tool, tmp_path, capsys):
    out = tmp_path / "deep" / "gpu.json"

    def stopped():
        raise KeyboardInterrupt

    failed = tool.outcome(1, "long" * 2000, 2.0)
    parts = {"tests": lambda: {"passed": True}, "memcheck": lambda: failed, "bench": stopped}
    with pytest.raises(KeyboardInterrupt):
        tool.check({"gpu": "none"}, parts, out)
    kept = json.loads(out.read_text())
    assert kept["machine"] == {"gpu": "none"}
    assert kept["tests"] == {"passed": True}
    assert kept["memcheck"] | {"output": ""} == {
        "passed": False,
        "seconds": 2.0,
        "exit_code": 1,
        "output": "",
    }
    assert len(kept["memcheck"]["output"]) == 4000
    assert out.with_name("gpu-memcheck.log").read_text() == "long" * 2000
    assert capsys.readouterr().out == "tests: passed\nmemcheck: FAILED\n"
    assert tool.check({}, {"tests": lambda: {"passed": True, "skipped": "not here"}}, out) is True
