"""Runs functions in worker processes of one thread each, with progress; a worker never outlives its parent."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import threading
import warnings
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from sla2_eval.progress import Report, silent

_queue = None  # of a worker; see _start


@dataclass(frozen=True)
class Task:
    """A call of "module:name" with these arguments and a `report`, once the tasks named in `needs` are done."""

    function: str
    arguments: dict
    needs: tuple[str, ...] = ()


def hush() -> None:
    """Keep one warning of torch off the terminal: under autocast diffusers' RMSNorm takes its plain path."""
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")


def _start(queue, threads: int) -> None:
    """Runs in a new worker: report through `queue`, compute on `threads` threads, end when the parent ends."""
    global _queue
    _queue = queue
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for what this worker starts
    import torch

    torch.set_num_threads(threads)
    hush()

    def follow_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def _function(name: str):
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _call(function: str, arguments: dict):
    """Runs in a worker."""

    def report(stage: str, done: int, total: int) -> None:
        _queue.put((stage, done, total))

    return _function(function)(**arguments, report=report)


class Workers:
    """A pool of processes: `with Workers(2) as workers: results = workers.run({"name": Task(...), ...})`.

    Two processes of one thread are faster than one of two threads on small models, and do not stall beside other
    work, as threads that wait for each other at every layer do. With `count` 0 everything runs in this process.
    """

    def __init__(self, count: int, *, threads: int = 1, report: Report = silent):
        self._count, self._threads, self._report = count, threads, report
        self._pool = None

    def __enter__(self) -> Workers:
        if self._count:
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
            context = multiprocessing.get_context("spawn")
            self._queue = context.Queue()
            self._pool = ProcessPoolExecutor(
                self._count, mp_context=context, initializer=_start, initargs=(self._queue, self._threads)
            )
            self._listener = threading.Thread(target=self._listen, daemon=True)
            self._listener.start()
        return self

    def __exit__(self, kind, *_) -> None:
        if self._pool is not None:
            if kind is not None:
                for process in list((self._pool._processes or {}).values()):
                    process.terminate()
            self._pool.shutdown(cancel_futures=True)
            self._queue.put(None)
            self._listener.join()

    def _listen(self) -> None:
        while (item := self._queue.get()) is not None:
            self._report(*item)

    def run(self, tasks: Mapping[str, Task]) -> dict[str, object]:
        """Run every task once those it needs are done, of those that can run the first in `tasks`; results by name.

        The first error ends the run and is raised. Raises RuntimeError if a worker dies (out of memory, killed), and
        ValueError if tasks need each other in a circle or one that is not there.
        """
        waiting, results, running = dict(tasks), {}, {}
        while waiting or running:
            ready = [name for name, task in waiting.items() if all(need in results for need in task.needs)]
            if not ready and not running:
                raise ValueError(f"tasks: expected needs that can be met, got {next(iter(waiting))!r} waiting for ever")
            for name in ready[: max(1, self._count) - len(running)]:
                task = waiting.pop(name)
                if self._pool is None:
                    results[name] = _function(task.function)(**task.arguments, report=self._report)
                else:
                    running[self._pool.submit(_call, task.function, task.arguments)] = name
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                name = running.pop(future)
                try:
                    results[name] = future.result()
                except BrokenProcessPool as error:
                    raise RuntimeError(
                        f"{name}: a worker process died (killed, or out of memory); run again to go on"
                    ) from error
        return results
