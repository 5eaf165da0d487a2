"""Progress of long commands: rich bars on a terminal, otherwise one line a finished stage, always
on stderr.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sla2_eval.runs.hardware import device

# in a folder of videos: one line a batch, with its videos, seconds of wall clock, and the machine;
# of an adapter's videos also the sparsity and FLOPs of its attention
SPEED = "speed.jsonl"

# How library functions report: (stage, done, total). They call it often; it must be cheap.
Report = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """The Report that shows nothing."""


class ProgressDisplay:
    """A Report as a context manager: `with ProgressDisplay() as report: work(report=report)`."""

    def __init__(self) -> None:
        self._bars: Any = None  # rich's, which is imported for a terminal alone
        self._tasks: dict[str, int] = {}
        self._finished: set[str] = set()

    def __enter__(self) -> ProgressDisplay:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeElapsedColumn,
            )

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
            )
            self._bars = Progress(*columns, console=Console(stderr=True))
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._bars is not None:
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(stage, total=total)
            self._bars.update(self._tasks[stage], completed=done, total=total)
        elif done >= total and stage not in self._finished:
            self._finished.add(stage)
            print(f"{stage}: {total} of {total}", file=sys.stderr, flush=True)


@contextmanager
def noted(folder: Path, videos: int) -> Iterator[dict[str, float]]:
    """Add the seconds that a batch of videos takes to the folder's speed.jsonl, which the report
    reads, and what is put into the dict that it yields.
    """
    began, more = time.perf_counter(), dict[str, float]()
    yield more
    seconds = round(time.perf_counter() - began, 3)
    line = json.dumps({"videos": videos, "seconds": seconds, "device": device(), **more})
    with (folder / SPEED).open("a", encoding="utf-8") as log:
        log.write(line + "\n")


def read_batches(folder: Path) -> list[dict[str, Any]]:
    """What noted() wrote into a folder, by batch; nothing where it has no such file."""
    path = folder / SPEED
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
