"""A pool of processes of this machine, on concurrent.futures; and the one that has none and works
in this process.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext, SpawnProcess
from types import ModuleType, TracebackType
from typing import Any

from sla2_eval.parallel.cluster import local_gpus
from sla2_eval.parallel.tasks import (
    ONE_THREAD,
    Pool,
    Task,
    WorkerDied,
    call,
    call_in_worker,
    compute_on_one_thread,
    warn,
)
from sla2_eval.runs.progress import Report, silent

_LOOK = 0.2  # seconds between two looks at the reports of the running tasks

_reports: Connection  # in a worker: to the driver


class ThisProcess(Pool):
    """A pool without workers: `wait` does the task itself."""

    about, places = "one process", 1

    def __init__(self, *, report: Report = silent, say: Callable[[str], None] = warn):
        super().__init__(report, say)
        self._submitted: list[tuple[str, Task]] = []

    @property
    def gpus(self) -> int:
        return local_gpus()

    def __enter__(self) -> ThisProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._submitted.clear()

    def free(self) -> int:
        return self.places - len(self._submitted)

    def submit(self, name: str, task: Task) -> None:
        self._submitted.append((name, task))

    def wait(self) -> tuple[str, Any]:
        name, task = self._submitted.pop()
        return name, call(task, self._report)


class ProcessPool(Pool):
    """Worker processes of one thread each, started when there is work for them.

    Each is a ProcessPoolExecutor of one process. An executor of several ends them all when one
    dies, and does not say over which task; nor does it say how a process died, pass on reports, end
    a task that runs, or end with a driver that is killed. `_Worker` adds that.
    """

    def __init__(self, count: int, *, report: Report = silent, say: Callable[[str], None] = warn):
        super().__init__(report, say)
        self.places = count
        self.about = f"{count} worker processes of one thread"
        self._workers: list[_Worker] = []
        self._running: dict[Future, tuple[str, _Worker]] = {}

    @property
    def gpus(self) -> int:
        return local_gpus()

    def __enter__(self) -> ProcessPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        busy = [worker for _, worker in self._running.values()]
        for worker in self._workers:
            worker.end(kill=worker in busy)
        self._workers, self._running = [], {}

    def free(self) -> int:
        return self.places - len(self._running)

    def submit(self, name: str, task: Task) -> None:
        busy = [worker for _, worker in self._running.values()]
        idle = next((worker for worker in self._workers if worker not in busy), None)
        try:
            worker = idle or self._start()
            future = worker.submit(task)
        except BrokenProcessPool:  # it died between two tasks, which costs none of them
            self._remove(worker)
            worker = self._start()
            future = worker.submit(task)
        self._running[future] = name, worker

    def wait(self) -> tuple[str, Any]:
        done: set[Future] = set()
        while not done:
            done, _ = wait(self._running, timeout=_LOOK, return_when=FIRST_COMPLETED)
            for worker in self._workers:
                for event in worker.reports():
                    self._report(*event)
        future = done.pop()
        name, worker = self._running.pop(future)
        try:
            return name, future.result()
        except BrokenProcessPool:
            return name, WorkerDied(self._remove(worker))

    def _start(self) -> _Worker:
        self._workers.append(_Worker())
        return self._workers[-1]

    def _remove(self, worker: _Worker) -> str:
        """Forget a worker that died; returns how it did."""
        self._workers.remove(worker)
        worker.end(kill=True)
        return worker.how_it_ended()


class _Context(SpawnContext):
    """The spawn context; keeps the process that it makes for an executor, which hides it."""

    process: SpawnProcess | None = None

    def Process(self, *args: Any, **options: Any) -> SpawnProcess:  # type: ignore[override]
        self.process = SpawnProcess(*args, **options)
        return self.process


class _Worker:
    """One process: its executor, and the end of the pipe through which it reports.

    The pipe is its own: one that all share has a lock, which a killed worker may hold for ever.
    """

    def __init__(self) -> None:
        self._context = _Context()
        self._reports, self._theirs = self._context.Pipe(duplex=False)
        with _start_clean():  # the first executor starts multiprocessing's tracker of resources
            self._executor = ProcessPoolExecutor(1, self._context, _begin, (self._theirs,))

    def submit(self, task: Task) -> Future:
        """Start a task, and with the first one the process. Raises BrokenProcessPool if that is
        dead.
        """
        with _start_clean():
            future = self._executor.submit(_work, task)
        self._theirs.close()  # here, so that the pipe ends with the process
        return future

    def reports(self) -> Iterator[tuple[str, int, int]]:
        """What the process has reported since the last look."""
        with contextlib.suppress(EOFError, OSError):  # the end of one that died
            while self._reports.poll():
                yield self._reports.recv()

    def end(self, kill: bool) -> None:
        """End the process: once its task is done, or, with `kill`, at once."""
        if kill and self._context.process:
            self._context.process.kill()
        self._executor.shutdown()
        self._reports.close()

    def how_it_ended(self) -> str:
        """How the process, which has ended, did: "signal SIGKILL", "exit code 1"."""
        assert self._context.process is not None
        code = self._context.process.exitcode
        assert code is not None
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


@contextlib.contextmanager
def _start_clean() -> Iterator[None]:
    """What a process that is started here takes over, or must not.

    Libraries read their number of threads as they are imported. The current folder is not searched
    for modules before this process's own path is known there: a file in it may be called like one
    of Python's. And multiprocessing runs the script of this process again in a new one, which
    tasks, called by their names in modules, do not need: a script that scores without `if __name__
    == "__main__"` would start processes without end.
    """
    more = {**ONE_THREAD, "PYTHONSAFEPATH": "1"}
    before = {name: os.environ.get(name) for name in more}
    main = sys.modules["__main__"]
    os.environ.update(more)
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _begin(reports: Connection) -> None:
    """Set up a new worker process: it ends with its parent, leaves ^C to it, and prints nothing
    among what a command prints.
    """
    global _reports
    _reports = reports
    threading.Thread(target=_follow_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(2, 1)
    compute_on_one_thread()


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(task: Task) -> object:
    """Runs in a worker process. A task that exits ends the process, as it would outside a pool."""
    try:
        return call_in_worker(task, lambda *event: _reports.send(event))
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr, flush=True)
        os._exit(error.code if isinstance(error.code, int) else 1)
