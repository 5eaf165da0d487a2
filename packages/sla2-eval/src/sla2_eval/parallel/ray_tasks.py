"""Runs tasks that need one another as Ray tasks: one GPU each where the cluster has GPUs, else one
CPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from sla2_eval.parallel.cluster import Cluster, WorkerDied, enter, local_gpus, place
from sla2_eval.parallel.processes import Pool, Task, Workers, call, compute_on, warn
from sla2_eval.runs.progress import Report, silent

_LOOK = 0.5  # seconds between two looks at the reports of the running tasks


class _Reports:
    """An actor that keeps what tasks report until the driver takes it."""

    def __init__(self):
        self._events: list[tuple[str, int, int]] = []

    def add(self, *event) -> None:
        self._events.append(event)

    def take(self) -> list[tuple[str, int, int]]:
        events, self._events = self._events, []
        return events


def _work(task: Task, reports, where: tuple[str, bool]) -> object:
    """Runs in a Ray worker, on one thread, in the driver's folder where this node has it."""
    import ray

    enter(*where)
    compute_on(1)
    sent = []

    def report(*event) -> None:
        sent[:] = [reports.add.remote(*event)]

    result = call(task, report)
    ray.get(sent)  # the driver looks for reports once more after it saw the task end
    return result


class RayTasks(Pool):
    """A Ray cluster as a pool: `with RayTasks("auto") as workers: results = workers.run({"name":
    Task(...), ...})`.

    The nodes need this package, and the files of the tasks under the same paths. `address` None
    starts a local cluster of this machine's CPUs and of `gpus` GPUs.
    """

    def __init__(
        self,
        address: str | None,
        *,
        gpus: int = 0,
        report: Report = silent,
        say: Callable[[str], None] = warn,
    ):
        super().__init__(say)
        self._address, self._gpus, self._report = address, gpus, report
        self._running: dict = {}

    def __enter__(self) -> RayTasks:
        local = (
            {}
            if self._address
            else {"num_cpus": max(self._gpus, os.cpu_count() or 1), "num_gpus": self._gpus}
        )
        self._cluster = Cluster(self._address, **local)
        ray, gpus = self._cluster.ray, int(self._cluster.gpus)
        self._places = gpus or max(1, int(self._cluster.cpus))
        self.about = f"Ray tasks of one {'GPU' if gpus else 'CPU'} each, {self._places} at a time"
        share = {"num_gpus": 1} if gpus else {}
        self._remote = ray.remote(num_cpus=1, max_retries=0, **share)(_work)
        self._reports = ray.remote(num_cpus=0)(_Reports).remote()
        return self

    def __exit__(self, *_) -> None:
        for reference in self._running:
            self._cluster.ray.cancel(reference, force=True)
        self._cluster.ray.kill(self._reports)
        self._cluster.close()

    def free(self) -> int:
        return self._places - len(self._running)

    def submit(self, name: str, task: Task) -> None:
        self._running[self._remote.remote(task, self._reports, place())] = name

    def wait(self) -> tuple[str, object]:
        ray, done = self._cluster.ray, []
        while not done:
            done, _ = ray.wait(list(self._running), num_returns=1, timeout=_LOOK)
            for event in ray.get(self._reports.take.remote()):
                self._report(*event)
        name = self._running.pop(done[0])
        try:
            return name, ray.get(done[0])
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayError as error:
            return name, WorkerDied(type(error).__name__)


def open_workers(count: int, ray_address: str | None, *, report: Report = silent) -> Pool:
    """Where tasks run: as Ray tasks of a GPU each on a cluster or where this machine has several
    GPUs, else in `count`
    processes (0: in this one)."""
    gpus = local_gpus()
    if ray_address is None and gpus < 2:
        return Workers(count, report=report)
    return RayTasks(ray_address, gpus=gpus, report=report)
