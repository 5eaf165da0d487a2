"""The emulator under AddressSanitizer and ThreadSanitizer: planted faults are found, and every
kernel runs clean.

AddressSanitizer over the forward attention kernels is part of `make test`, everything else of `make
test-full`.
"""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sla2_kernels.emulator.build import sanitizer_library

SCRIPT = Path(__file__).with_name("sanitized.py")
KERNELS = (
    "forward",
    "low_bit",
    "pooled",
    "backward",
    "sliced",
    "matched",
    "pooled_backward",
    "prepared",
    "route",
    "states",
    "hopper",
    "hopper_low",
)
QUICK = ("forward", "low_bit")


def start(name, *command, seconds):
    env = os.environ | {
        "SLA2_EMULATOR_SANITIZE": name,
        "LD_PRELOAD": sanitizer_library(name),
        "OMP_NUM_THREADS": "1",
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1 atexit_sleep_ms=0 exitcode=66",
    }
    # ThreadSanitizer needs its address ranges, which randomised addresses may take.
    fixed = ["setarch", "-R"] if name == "thread" and shutil.which("setarch") else []
    done = subprocess.run(
        [*fixed, sys.executable, *command],
        env=env,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=seconds,
    )
    return done.returncode, done.stdout + done.stderr


@functools.cache
def missing(name):
    """Why a sanitizer cannot run here; None if it can."""
    if sanitizer_library(name) is None:
        return f"this compiler has no {name} sanitizer"
    code, text = start(name, "-c", "print('started')", seconds=120)
    return (
        None
        if code == 0 and "started" in text
        else f"Python does not start under the {name} sanitizer: {text[-200:]}"
    )


def sanitized(name, case):
    if reason := missing(name):
        pytest.skip(reason)
    return start(name, SCRIPT, case, seconds=500)


@pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(
            name, case, marks=[] if name == "address" and case in QUICK else pytest.mark.slow
        )
        for name in ("address", "thread")
        for case in ("right", *KERNELS)
    ],
)
def test_kernels_are_clean(name, case):
    code, text = sanitized(name, case)
    assert code == 0, text[-4000:]
    assert "finished" in text
    assert "Sanitizer" not in text


@pytest.mark.slow
def test_the_script_runs_every_kernel():
    from sla2_kernels.kernels import all_specs

    code = f"""
import sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
from sla2_kernels import launch
import sanitized
launched = set()
real = launch.load
launch.load = lambda spec, *more: launched.add(spec.entry) or real(spec, *more)
for case in {KERNELS!r}:
    sanitized.main(case)
print(*sorted(launched))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].split() == sorted(
        {spec.entry for spec in all_specs("sm_90a")}
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("past1", "heap-buffer-overflow"),
        ("past2", "heap-buffer-overflow"),
        ("past3", "global-buffer-overflow"),
    ],
    ids=["output", "dynamic-shared", "static-shared"],
)
def test_an_index_one_past_the_end_is_found(case, words):
    code, text = sanitized("address", case)
    assert code != 0
    assert words in text
    assert "in past_the_end" in text
    assert "planted.cu:" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["neighbour", "warp_neighbour", "copied_neighbour"], ids=["block", "warp", "cp.async"]
)
def test_a_missing_barrier_is_a_race(case):
    code, text = sanitized("thread", case)
    assert code == 66
    assert "data race" in text
    assert case in text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["address", "thread"])
def test_a_skipped_collective_is_told_there_too(name):
    code, text = sanitized(name, "skips_shuffle")
    assert code == 0, text
    assert "divergent barrier: threads 0-4 6-31 at __shfl_xor_sync" in text
