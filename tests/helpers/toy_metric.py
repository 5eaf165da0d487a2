"""A metric of the tests' own, "toy", in a module outside the package: `toy_metrics:toy`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from sla2_eval.scoring import metrics

NAME = "toy_metrics:toy"
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


def write(folder: Path, load: str) -> str:
    """Write the module, with the source of its `load(name, settings, device)`, to a new `folder`;
    returns the PYTHONPATH with which a new Python finds it.
    """
    folder.mkdir()
    (folder / "toy_metrics.py").write_text(SPECS + load)
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


def register(folder: Path, load: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`write` it, and have it found here, and by processes that start here, until the test ends."""
    monkeypatch.setenv("PYTHONPATH", write(folder, load))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(metrics, "_MODULES", list(metrics._MODULES))
    monkeypatch.delitem(sys.modules, "toy_metrics", raising=False)
