"""Runs tasks that need one another in worker processes of one thread each; a worker never outlives
its parent.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import connection

from sla2_eval.parallel.cluster import WorkerDied
from sla2_eval.runs.progress import Report, silent

ATTEMPTS = 2  # of a task whose worker dies


@dataclass(frozen=True)
class Task:
    """A call of "module:name" with these arguments and a `report`, once the tasks named in `needs`
    are done.
    """

    function: str
    arguments: dict
    needs: tuple[str, ...] = ()


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


def call(task: Task, report: Report) -> object:
    """Do the task here."""
    module, _, function = task.function.partition(":")
    return getattr(importlib.import_module(module), function)(**task.arguments, report=report)


def compute_on(threads: int) -> None:
    """Set up a new worker: this many threads for torch, and for what the worker starts."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)
    hush()


class Pool(ABC):
    """Runs tasks in the order of their needs. Where they run is what its kinds differ in: `free`,
    `submit`, `wait`.
    """

    about: str  # how much of what, for the report

    def __init__(self, say: Callable[[str], None] = warn):
        self._say = say

    @abstractmethod
    def free(self) -> int:
        """How many tasks may be submitted now."""

    @abstractmethod
    def submit(self, name: str, task: Task) -> None:
        """Start a task."""

    @abstractmethod
    def wait(self) -> tuple[str, object]:
        """Block until any task is done: its name, and what it returned or how its worker died.
        Raises the task's error.
        """

    def run(self, tasks: Mapping[str, Task]) -> dict[str, object]:
        """Run every task once those it needs are done, of those that can run the first in `tasks`;
        results by name.

        The first error ends the run and is raised. A task whose worker dies (out of memory, killed)
        is said to and tried once more; if that dies too, what needs the task is left out, the rest
        is run, and TasksLost is raised in the end. Raises ValueError if tasks need each other in a
        circle or one that is not there.
        """
        waiting, results, running = dict(tasks), {}, set()
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


def _serve(channel, threads: int) -> None:
    """Runs in a new worker: tasks come through `channel`; reports, results and errors go back; ends
    with the parent.
    """
    compute_on(threads)

    def follow_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()
    while (task := channel.recv()) is not None:
        try:
            message = ("done", call(task, lambda *event: channel.send(("report", event))))
        except Exception as error:
            message = ("error", _portable(error))
        channel.send(message)


def _portable(error: Exception) -> Exception:
    """The error as it can be sent, with its traceback as a note."""
    error.add_note("".join(traceback.format_exception(error)).rstrip())
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


@dataclass
class _Slot:
    """A worker process, its end of the channel, and the task it is at."""

    process: multiprocessing.Process
    channel: connection.Connection
    task: str | None = None


class Workers(Pool):
    """A pool of processes: `with Workers(2) as workers: results = workers.run({"name": Task(...),
    ...})`.

    Two processes of one thread are faster than one of two threads on small models, and do not stall
    beside other work, as threads that wait for each other at every layer do. With `count` 0
    everything runs in this process.
    """

    def __init__(
        self,
        count: int,
        *,
        threads: int = 1,
        report: Report = silent,
        say: Callable[[str], None] = warn,
    ):
        super().__init__(say)
        self._count, self._threads, self._report = count, threads, report
        self._slots: list[_Slot] = []
        self._here: list[
            tuple[str, Task]
        ] = []  # what `wait` does itself where there are no workers
        self.about = f"{count} worker processes of one thread" if count else "one process"

    def __enter__(self) -> Workers:
        if self._count:
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        return self

    def __exit__(self, kind, *_) -> None:
        for slot in self._slots:
            if kind is None and slot.task is None:
                slot.channel.send(None)
            else:
                slot.process.terminate()
        for slot in self._slots:
            slot.process.join()
            slot.channel.close()
        self._slots = []

    def free(self) -> int:
        busy = sum(slot.task is not None for slot in self._slots)
        return self._count - busy if self._count else 1 - len(self._here)

    def submit(self, name: str, task: Task) -> None:
        if not self._count:
            self._here.append((name, task))
            return
        slot = next((slot for slot in self._slots if slot.task is None), None) or self._start()
        slot.task = name
        try:
            slot.channel.send(task)
        except BrokenPipeError:
            pass  # `wait` finds out how it died

    def _start(self) -> _Slot:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._threads))
        process.start()
        theirs.close()  # so that the worker's end closes with it
        self._slots.append(_Slot(process, ours))
        return self._slots[-1]

    def wait(self) -> tuple[str, object]:
        if not self._count:
            name, task = self._here.pop()
            return name, call(task, self._report)
        while True:
            busy = {slot.channel: slot for slot in self._slots if slot.task is not None}
            for channel in connection.wait(list(busy)):
                slot, name = busy[channel], busy[channel].task
                try:
                    kind, value = channel.recv()
                except (EOFError, ConnectionResetError):
                    self._slots.remove(slot)
                    return name, _how_it_died(slot)
                if kind == "report":
                    self._report(*value)
                    continue
                slot.task = None
                if kind == "error":
                    raise value
                return name, value


def _how_it_died(slot: _Slot) -> WorkerDied:
    slot.channel.close()
    slot.process.join()
    code = slot.process.exitcode
    return WorkerDied(f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}")
