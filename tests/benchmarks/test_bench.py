"""The benchmark without a GPU: interleaving, floors, rows, and the one line that says what is
missing.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sla2_eval
import torch
from sla2_eval.cli.main import main

from benchmarks import bench_paper
from benchmarks.timing import interleave


def test_cases_take_turns_and_a_failing_one_is_named():
    ran, clock_times = [], iter([9, 9, 1, 10, 2, 20, 3, 30, 4, 40])

    def broken():
        raise RuntimeError("no such\nkernel")

    cases = {"a": lambda: ran.append("a"), "broken": broken, "b": lambda: ran.append("b")}

    def clock(function):
        function()
        return next(clock_times)

    found = interleave(cases, clock, repetitions=4, warmups=1)
    assert ran == ["a", "b"] + ["a", "b"] * 4
    assert list(found) == ["a", "broken", "b"]
    assert found["a"] == {"median": 2.5, "low": 1.75, "high": 3.25}
    assert found["b"] == {"median": 25, "low": 17.5, "high": 32.5}
    assert found["broken"] == {"error": "RuntimeError: no such kernel"}


def test_one_repetition_has_no_spread():
    assert interleave({"a": int}, lambda f: 2.0, 1, warmups=0) == {
        "a": {"median": 2.0, "low": 2.0, "high": 2.0}
    }


def test_floors_are_those_of_the_design():
    least = bench_paper.floors(32760, 12, 15)
    assert least["sparse forward"].flops == pytest.approx(
        0.2e12, rel=0.1
    )  # chapter 3: 0.19-0.2 TFLOP
    assert least["keys"].flops == pytest.approx(13e9, rel=0.1)  # h_j
    assert least["linear sums"].flops == pytest.approx(52e9, rel=0.1)  # H
    assert least["pool"].bytes == pytest.approx(0.2e9, rel=0.1)
    assert least["linear sums"].milliseconds(788e12, 4.3e12) == pytest.approx(0.07, rel=0.1)


def test_rows_hold_speedup_paper_measure_and_floor():
    times = {"median": 2.0, "low": 1.9, "high": 2.1}
    found = {
        "SLA2 forward": times,
        "SLA2 sparse forward": times | {"median": 1.0},
        "SDPA flash forward": times | {"median": 24.0},
        "SDPA cuDNN forward": {"error": "RuntimeError: no"},
    }
    rates = {"gemm_flops_per_second": 788e12, "copy_bytes_per_second": 4.3e12}
    rows = {row["case"]: row for row in bench_paper._rows("s", 32760, 12, 0.97, 15, found, rates)}
    full = 4 * 32760**2 * 128 * 12
    assert rows["SLA2 forward"]["speedup"] == 12
    assert rows["SLA2 forward"]["c_over_t"] == pytest.approx(full / 2e-3 / 1e12)
    assert rows["SLA2 sparse forward"]["effective_tflops"] == pytest.approx(
        full * 15 * 64 / 32760 / 1e-3 / 1e12
    )
    assert rows["SLA2 sparse forward"]["times_floor"] == pytest.approx(
        1.0 / rows["SLA2 sparse forward"]["floor"]
    )
    assert rows["SDPA flash forward"]["speedup"] == 1
    assert rows["SDPA cuDNN forward"]["error"] == "RuntimeError: no"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_one_line_says_so(capsys):
    assert main(["bench", "--suite", "paper"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert (
        captured.err
        == "sla2: error: suite 'paper': needs a CUDA GPU, and torch sees none; --suite cpu runs"
        " here\n"
    )


def test_an_installed_package_says_that_it_needs_a_checkout(tmp_path):
    source = Path(sla2_eval.__file__).parent
    installed = tmp_path / "site-packages" / "sla2_eval"
    shutil.copytree(source, installed, ignore=shutil.ignore_patterns("weights", "__pycache__"))
    path = os.pathsep.join([str(installed.parent), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-m", "sla2_eval.cli.main", "bench", "--suite", "cpu"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "sla2: error: bench: expected a checkout of the repository, which has"
        f" {Path('benchmarks', 'bench_cpu.py')}, got a package installed at {installed}\n"
    )


@pytest.mark.gpu
def test_the_paper_suite_runs_quickly(capsys, tmp_path):
    assert (
        main(["bench", "--suite", "paper", "--quick", "--out", str(tmp_path / "paper.json")]) == 0
    )
    assert "SLA2 forward" in capsys.readouterr().out
