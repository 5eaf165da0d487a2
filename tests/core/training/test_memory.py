"""Stage 1's memory grows with N, not with N squared: one step at 1/16 and at 1/8 of Wan2.1's length, in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys

MEASURE = """
import json, resource, sys, torch
from sla2_core import SLA2Config, build_attention
from sla2_core.training.capture import Captured
from sla2_core.training.stage1 import _Trainee

torch.set_num_threads(1)
trainee = _Trainee(build_attention(SLA2Config(head_dim=64, num_heads=4, topk=0.03)), (0.03,))

def step(n):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 4, n, 64).unbind(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    trainee.error(Captured(0, 0, 1.0, (0, 1, 2, 3), q, k, v), 0.03, torch.arange(min(4, n // 128)), 1 << 25, learn=True)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024

step(256)
lengths = [2047, 4095]
print(json.dumps([step(n) for n in lengths]))
"""


def test_twice_the_tokens_take_at_most_about_twice_the_memory():
    """The peak of each length above the peak before it; a score matrix of N x N would add 4 x 16 M x 4 bytes = 268 MB."""
    out = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True, timeout=300)
    half, added = json.loads(out.stdout)
    assert half > 20  # the measurement sees something
    assert added < 1.5 * half + 30  # half more on top of it, where N squared would add three times as much
