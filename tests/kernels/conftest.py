"""Kernel tests keep what they build in the checkout's .cache folder, unless SLA2_CACHE says
otherwise.

With SLA2_TEST_TARGET=cuda (and CUDA_LAUNCH_BLOCKING=1; `make gpu-check` sets both)
test_kernels_*.py run on the GPU and are marked gpu; otherwise they run on the emulator.
"""

import os
from pathlib import Path

import pytest

os.environ.setdefault("SLA2_CACHE", str(Path(__file__).parents[2] / ".cache" / "sla2"))


def pytest_collection_modifyitems(items):
    if os.environ.get("SLA2_TEST_TARGET") == "cuda":
        for item in items:
            if item.path.name.startswith("test_kernels_"):
                item.add_marker(pytest.mark.gpu)
