"""A metric of the tests' own, called "toy": a file, and its name in the list, as for any other."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from sla2_eval.scoring import metrics

SPECS = """
from sla2_eval.scoring.metrics.base import MetricSpec, MetricUnavailable

SPECS = (
    MetricSpec(
        name="toy",
        kind="unpaired",
        title="Toy",
        definition="what a test makes of it",
        source="none",
        value_range=(None, None),
        higher_is_better=True,
        needs_prompt=True,
    ),
)
"""
# Python imports sitecustomize as it starts, in the workers too.
REGISTER = """
from sla2_eval.scoring import metrics

metrics.__path__.append({folder!r})
metrics._MODULES += ("toy",)
"""


def write(folder: Path, load: str) -> str:
    """Write the metric, with the source of its `load(name, settings, device)`, to a new `folder`;
    returns the PYTHONPATH with which a new Python has it.
    """
    folder.mkdir()
    (folder / "toy.py").write_text(SPECS + load)
    (folder / "sitecustomize.py").write_text(REGISTER.format(folder=str(folder)))
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


def register(folder: Path, load: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`write` it, and have it in this process, and in those that it starts, until the test ends."""
    monkeypatch.setenv("PYTHONPATH", write(folder, load))
    monkeypatch.setattr(metrics, "__path__", [*metrics.__path__, str(folder)])
    monkeypatch.setattr(metrics, "_MODULES", (*metrics._MODULES, "toy"))
    monkeypatch.delitem(sys.modules, "sla2_eval.scoring.metrics.toy", raising=False)
