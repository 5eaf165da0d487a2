"""What a machine is called, and that every batch of videos says on which it was made."""

import json
import os
import sys
from types import SimpleNamespace

from sla2_eval.runs.hardware import device, hardware
from sla2_eval.runs.progress import SPEED, noted


def gpus(*names, current=0):
    return SimpleNamespace(
        cuda=SimpleNamespace(
            is_available=lambda: bool(names),
            device_count=lambda: len(names),
            get_device_name=names.__getitem__,
            current_device=lambda: current,
        )
    )


def test_a_batch_says_what_it_was_made_on(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", gpus())
    with noted(tmp_path, 3):
        pass
    monkeypatch.setitem(sys.modules, "torch", gpus("H100", "H200", current=1))
    with noted(tmp_path, 1):
        pass
    first, second = (json.loads(line) for line in (tmp_path / SPEED).read_text().splitlines())
    assert first["device"].endswith(f", {os.cpu_count()} cores")
    assert (first["videos"], second["videos"], second["device"]) == (3, 1, "H200")


def test_gpus_are_named_where_torch_is_in_use(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", gpus("H100", "H200"))
    assert hardware()["gpus"] == ["H100", "H200"]
    monkeypatch.delitem(sys.modules, "torch")
    assert "gpus" not in hardware()
    assert "cores" in device()
