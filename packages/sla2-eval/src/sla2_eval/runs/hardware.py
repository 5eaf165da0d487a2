"""What this machine is, as runs and reports say it."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any


def hardware() -> dict[str, Any]:
    """Processor, cores and memory of this machine, and its GPUs if torch is in use."""
    memory = (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    )
    found = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(memory / 2**30, 1),
        "system": platform.system(),
    }
    gpus = _gpus()
    return found | {"gpus": gpus} if gpus else found


def processor() -> str:
    """The model of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def device() -> str:
    """What a model computes on here: the name of the GPU in use, else of the processor with its
    cores.
    """
    return next(iter(_gpus()), None) or f"{processor()}, {os.cpu_count()} cores"


def _gpus() -> list[str]:
    """The names of the GPUs that torch may use, the current one first; none where torch is not
    imported, as nothing can compute on them then.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    current = torch.cuda.current_device()
    return [names[current], *names[:current], *names[current + 1 :]]
