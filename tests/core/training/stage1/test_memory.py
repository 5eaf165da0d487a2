"""Stage 1's memory grows with N, not with N squared: one step at 1/16 and at 1/8 of Wan2.1's
length, in a fresh process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MEASURE = """
import pathlib, sys, torch
from sla2_core import SLA2Config, build_attention
from sla2_core.training.capture import Captured
from sla2_core.training.stage1.train import _Trainee

torch.set_num_threads(1)
trainee = _Trainee(build_attention(SLA2Config(head_dim=64, num_heads=4, topk=0.03)), (0.03,))

def peak():  # MB; of this program alone, where ru_maxrss begins at its parent's
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024

def step(n):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 4, n, 64).unbind(0)
    before = peak()
    captured = Captured(0, 0, 1.0, (0, 1, 2, 3), q, k, v)
    rows = torch.arange(min(4, n // 128))
    trainee.error(captured, 0.03, rows, 1 << 25, learn=True)
    return peak() - before

step(256)
print(step(int(sys.argv[1])))
"""


# Without these glibc keeps freed blocks in one arena a thread, and the same step reads 166 MB or
# 224 MB.
GIVE_BACK = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}


def megabytes(tokens: int) -> float:
    """Peak above the memory before, of one step, in a process of its own: allocators keep what an
    earlier step freed.
    """
    command = [sys.executable, "-c", MEASURE, str(tokens)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=300, env=os.environ | GIVE_BACK
    )
    return float(done.stdout)


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads the peak memory from Linux's /proc"
)
def test_twice_the_tokens_take_about_twice_the_memory():
    """Quadratic growth would take four times as much; a score matrix of N x N alone 268 MB at the
    longer length.
    """
    half, whole = megabytes(2047), megabytes(4095)
    assert half > 20  # the measurement sees something
    assert whole < 2.4 * half
