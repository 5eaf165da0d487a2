"""experiments/wan2.1_1.3b/stage1_cpu.py at a short length: it measures what it says it measures."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "experiments" / "wan2.1_1.3b" / "stage1_cpu.py"


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="reads the peak memory from Linux's /proc"
)
def test_a_short_length_is_measured(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("stage1_cpu", SCRIPT)
    stage1_cpu = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stage1_cpu)
    assert (
        stage1_cpu.main(
            [
                "--tokens",
                "1031",
                "--rows",
                "2",
                "--steps",
                "2",
                "--json",
                str(tmp_path / "out.json"),
            ]
        )
        == 0
    )
    assert (
        "1031 tokens, 12 heads of 128, 2 query blocks a step"
        in capsys.readouterr().out.splitlines()[-1]
    )
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["input_bytes"] == 3 * 12 * 1031 * 128 * 2
    assert len(found["seconds"]) == len(found["loss"]) == 2
    assert found["hardware"]["threads"] >= 1
