"""The CPU kernels give the same bits in the process that compiled them and in one that loads them
from the cache.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

RUN = """
import numpy as np
from sla2_kernels.cpu.operator import Map, backward, forward

rng = np.random.default_rng(0)
q, k, v, g = rng.standard_normal((4, 1, 256, 32), dtype=np.float32)
selected = np.sort(np.stack([rng.permutation(16)[:6] for _ in range(8)]))[None].astype(np.int32)
block_map = Map(selected, np.full((1, 8), 6, np.int32), np.full(1, 256), 32, 16, 256)
alpha = np.full((1, 8), 0.7, np.float32)
found = []
for kind in ("linear", "pooled"):
    out, o_s, lse = forward(q, k, v, block_map, alpha, complement=kind)
    found += [out, o_s, lse]
    found += backward(g, q, k, v, block_map, alpha, o_s, lse, complement=kind)
print(*(x.view(np.uint32).sum(dtype=np.uint64) for x in found))
"""


def run(cache) -> str:
    env = os.environ | {"SLA2_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        env=env,
    )
    return done.stdout


@pytest.mark.slow
def test_compiled_and_cached_kernels_round_alike(tmp_path):
    compiled = run(tmp_path)
    assert any(tmp_path.rglob("*.nbc"))
    assert run(tmp_path) == compiled
