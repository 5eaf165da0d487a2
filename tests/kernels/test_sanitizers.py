"""The emulator under AddressSanitizer and ThreadSanitizer: faults are found, and every kernel runs clean (make test-full)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sla2_kernels.emulator.build import sanitizer_library

HERE = Path(__file__).parent

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def sanitized(name, *command):
    library = sanitizer_library(name)
    if library is None:
        pytest.skip(f"this compiler has no {name} sanitizer")
    env = os.environ | {
        "SLA2_EMULATOR_SANITIZE": name,
        "LD_PRELOAD": library,
        "OMP_NUM_THREADS": "1",
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1 atexit_sleep_ms=0 exitcode=66",
    }
    fixed_addresses = (
        [path, "-R"] if (path := shutil.which("setarch")) else []
    )  # ThreadSanitizer needs its address ranges
    done = subprocess.run([*fixed_addresses, sys.executable, *command], env=env, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["address", "thread"])
def test_right_kernels_are_clean(name):
    code, text = sanitized(name, HERE / "sanitized.py", "right")
    assert code == 0, text
    assert "finished" in text
    assert "Sanitizer" not in text


@pytest.mark.parametrize(
    ("case", "words"),
    [("past1", "heap-buffer-overflow"), ("past2", "heap-buffer-overflow"), ("past3", "global-buffer-overflow")],
    ids=["output", "dynamic-shared", "static-shared"],
)
def test_an_index_one_past_the_end_is_found(case, words):
    code, text = sanitized("address", HERE / "sanitized.py", case)
    assert code != 0
    assert words in text
    assert "in past_the_end" in text
    assert "planted.cu:" in text


@pytest.mark.parametrize("case", ["neighbour", "warp_neighbour"], ids=["block", "warp"])
def test_a_missing_barrier_is_a_race(case):
    code, text = sanitized("thread", HERE / "sanitized.py", case)
    assert code == 66
    assert "data race" in text
    assert f"in {case}" in text


@pytest.mark.parametrize("name", ["address", "thread"])
def test_a_skipped_collective_is_told_there_too(name):
    code, text = sanitized(name, HERE / "sanitized.py", "skips_shuffle")
    assert code == 0, text
    assert "divergent barrier: threads 0-4 6-31 at __shfl_xor_sync" in text


@pytest.mark.parametrize("name", ["address", "thread"])
@pytest.mark.parametrize("file", sorted(path.name for path in HERE.glob("test_kernels_*.py")))
def test_every_kernel_is_clean(name, file):
    code, text = sanitized(
        name, "-m", "pytest", "-x", "-q", "-m", "not gpu and not slow", "-p", "no:cacheprovider", HERE / file
    )
    assert code == 0, text[-4000:]
    assert " passed" in text
    assert "Sanitizer" not in text
