"""Kernel tests keep what they build in the checkout's .cache folder, unless SLA2_CACHE says otherwise."""

import os
from pathlib import Path

os.environ.setdefault("SLA2_CACHE", str(Path(__file__).parents[2] / ".cache" / "sla2"))
