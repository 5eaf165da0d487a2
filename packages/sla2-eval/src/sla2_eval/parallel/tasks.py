"""Tasks that need one another, and the pool that runs them; where its workers are is what its two
kinds differ in.
"""

from __future__ import annotations

import importlib
import os
import pickle
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from sla2_eval.runs.progress import Report, silent

ATTEMPTS = 2  # of a task whose worker dies
ONE_THREAD = {  # libraries read these when they are imported
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}


@dataclass(frozen=True)
class Task:
    """A call of "module:name" with these arguments and a `report`, once the tasks named in `needs`
    are done.
    """

    function: str
    arguments: dict
    needs: tuple[str, ...] = ()


class WorkerDied(RuntimeError):
    """A worker ended in the middle of a task; the message says how."""


class ClusterLost(RuntimeError):
    """The cluster of the workers is gone, in one line; what tasks have written is there."""


class TasksLost(RuntimeError):
    """Workers died over some tasks every time; `results` holds what the others returned, `lost` a
    reason by name.
    """

    def __init__(self, lost: dict[str, str], results: dict[str, object]):
        name = next(iter(lost))
        super().__init__(f"{name}: {lost[name]}; run again to go on")
        self.lost, self.results = lost, results


def warn(text: str) -> None:
    """One line on standard error."""
    print(f"sla2: warning: {text}", file=sys.stderr, flush=True)


def hush() -> None:
    """Keep one warning of torch off the terminal: under autocast diffusers' RMSNorm takes its plain
    path.
    """
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")


def compute_on_one_thread() -> None:
    """Set up a new worker. Two processes of one thread are faster than one of two threads on small
    models, and do not stall beside other work, as threads that wait for each other at every layer
    do; and sums come out alike wherever a task runs.
    """
    os.environ.update(ONE_THREAD)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    hush()


def call(task: Task, report: Report) -> object:
    """Do the task here."""
    module, _, function = task.function.partition(":")
    return getattr(importlib.import_module(module), function)(**task.arguments, report=report)


def call_in_worker(task: Task, report: Report) -> object:
    """Do the task here; an error that could not be sent to another process is raised as a
    RuntimeError of its type and text.
    """
    try:
        return call(task, report)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
        raise


class Pool(ABC):
    """A number of workers, each with at most one task: `with ... as pool: pool.run({"name":
    Task(...), ...})`.

    A worker stays between its tasks, so that what a function keeps in its module (a loaded model)
    is there for the next. One that dies is replaced. Work in progress is ended with the `with`
    block.
    """

    about: str  # how much of what, for the report
    places: int  # how many workers there may be

    def __init__(self, report: Report = silent, say: Callable[[str], None] = warn):
        self._report, self._say = report, say

    @abstractmethod
    def __enter__(self) -> Pool: ...

    @abstractmethod
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    @property
    @abstractmethod
    def gpus(self) -> int:
        """How many GPUs the workers may use, all together."""

    @abstractmethod
    def free(self) -> int:
        """How many tasks may be submitted now."""

    @abstractmethod
    def submit(self, name: str, task: Task) -> None:
        """Start a task; its `needs` are not looked at."""

    @abstractmethod
    def wait(self) -> tuple[str, Any]:
        """Block until any task is done: its name, and what it returned, or the WorkerDied that says
        how its worker died. Raises the task's error.
        """

    def run(self, tasks: Mapping[str, Task]) -> dict[str, Any]:
        """Run every task once those it needs are done, of those that can run the first in `tasks`;
        results by name.

        The first error ends the run and is raised. A task whose worker dies (out of memory, killed)
        is said to and tried once more; if that dies too, what needs the task is left out, the rest
        is run, and TasksLost is raised in the end. Raises ValueError if tasks need each other in a
        circle or one that is not there.
        """
        waiting, results = dict(tasks), {}
        running: set[str] = set()
        deaths: dict[str, int] = {}
        lost: dict[str, str] = {}
        while waiting or running:
            while stuck := [
                name for name, task in waiting.items() if lost.keys() & set(task.needs)
            ]:
                for name in stuck:
                    need = next(need for need in waiting.pop(name).needs if need in lost)
                    lost[name] = (
                        f"needs {need}, whose worker died" if need in deaths else lost[need]
                    )
            ready = [
                name
                for name, task in waiting.items()
                if all(need in results for need in task.needs)
            ]
            if waiting and not ready and not running:
                raise ValueError(
                    f"tasks: expected needs that can be met, got {next(iter(waiting))!r} waiting"
                    " for ever"
                )
            for name in ready[: self.free()]:
                self.submit(name, waiting.pop(name))
                running.add(name)
            if not running:
                continue
            name, outcome = self.wait()
            running.discard(name)
            if not isinstance(outcome, WorkerDied):
                results[name] = outcome
                continue
            deaths[name] = deaths.get(name, 0) + 1
            if deaths[name] < ATTEMPTS:
                self._say(f"{name}: its worker died ({outcome}); trying it once more")
                waiting = {name: tasks[name], **waiting}
            else:
                lost[name] = f"its worker died {ATTEMPTS} times ({outcome})"
                self._say(f"{name}: {lost[name]}; going on without it")
        if lost:
            raise TasksLost(lost, results)
        return results
