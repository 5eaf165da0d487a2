"""The processes that `accelerate launch` or torchrun started together, of which this is one."""

from __future__ import annotations

import os


def launched_processes() -> int:
    """How many there are; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first_process() -> bool:
    """Whether this is the one that writes and prints for all."""
    return int(os.environ.get("RANK", 0)) == 0
