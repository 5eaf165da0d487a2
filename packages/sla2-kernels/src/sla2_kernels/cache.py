"""Where compiled code is kept: one folder for NVRTC's cubins and numba's cache."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$SLA2_CACHE, else `sla2` in the user's cache folder ($XDG_CACHE_HOME, else ~/.cache).

    Makes nothing.
    """
    if os.environ.get("SLA2_CACHE"):
        return Path(os.environ["SLA2_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "sla2"
