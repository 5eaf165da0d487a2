"""A pool of Ray actors: a GPU or a share of one each where the cluster has GPUs, else a CPU."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from sla2_eval.parallel.cluster import Cluster, enter, place
from sla2_eval.parallel.tasks import (
    ClusterLost,
    Pool,
    Task,
    WorkerDied,
    call_in_worker,
    compute_on_one_thread,
    warn,
)
from sla2_eval.runs.progress import Report, silent

_LOOK = 0.5  # seconds between two looks at the reports of the running tasks
# Seconds between two looks at the cluster, and for one. Together less than the minute after which
# Ray ends a driver that has lost its head node, in many lines.
_CHECK, _ANSWER = 15.0, 20.0


class _Reports:
    """An actor that keeps what tasks report until the driver takes it."""

    def __init__(self) -> None:
        self._events: list[tuple[str, int, int]] = []

    def add(self, *event: Any) -> None:
        self._events.append(event)

    def take(self) -> list[tuple[str, int, int]]:
        events, self._events = self._events, []
        return events


class TaskWorker:
    """An actor: does one task after another, on one thread, in the driver's folder where its node
    has it.
    """

    def __init__(self, where: tuple[str, bool], reports: Any, gpu: bool):
        enter(*where)
        compute_on_one_thread()
        if not gpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # it was given none
        self._reports = reports

    def run(self, task: Task) -> object:
        """Do the task here."""
        import ray

        if self._reports is None:
            return call_in_worker(task, silent)
        sent: list = []

        def report(*event: Any) -> None:
            sent[:] = [self._reports.add.remote(*event)]

        result = call_in_worker(task, report)
        ray.get(sent)  # the driver looks for reports once more after it saw the task end
        return result


class RayPool(Pool):
    """Actors of the Ray cluster at `address` ("auto" finds one), or of a local one if that is None.

    There are `workers` of them, or one a GPU, or one a CPU where there are no GPUs. `gpus`: how
    many a local cluster has, None for what Ray finds; 0: the workers use none. The nodes need this
    package, and the files of the tasks under the same paths.
    """

    def __init__(
        self,
        address: str | None,
        *,
        workers: int | None = None,
        gpus: int | None = None,
        report: Report = silent,
        say: Callable[[str], None] = warn,
    ):
        super().__init__(report, say)
        self._address, self._asked, self._asked_gpus = address, workers, gpus
        self._idle: list = []
        self._running: dict[Any, tuple[str, Any]] = {}  # object reference -> task, actor
        self._lost = False

    def __enter__(self) -> RayPool:
        local: dict = {}
        if self._address is None:
            cpus = self._asked or max(self._asked_gpus or 0, os.cpu_count() or 1)
            local = {"num_cpus": cpus, "num_gpus": self._asked_gpus}
        self._cluster = Cluster(self._address, **local)
        self._ray = self._cluster.ray
        gpus = 0 if self._asked_gpus == 0 else int(self._cluster.gpus)
        cpus = max(1, int(self._cluster.cpus))
        self._gpus = gpus
        self.places = self._asked or gpus or cpus
        # A share is one of a whole number to a GPU, so that all fit.
        share = {"num_cpus": 1 / math.ceil(self.places / cpus)}
        if gpus:
            share["num_gpus"] = 1 / math.ceil(self.places / gpus)
        kind = "GPU" if gpus else "CPU"
        self.about = f"Ray tasks of one {kind} each, {self.places} at a time"
        self._remote = self._ray.remote(max_restarts=0, max_task_retries=0, **share)(TaskWorker)
        self._reports: Any = None
        if self._report is not silent:
            self._reports = self._ray.remote(num_cpus=0)(_Reports).remote()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        actors = [*self._idle, *(actor for _, actor in self._running.values())]
        actors += [self._reports] if self._reports else []
        self._idle, self._running = [], {}
        if self._lost:  # nobody answers: what this process leaves behind ends with it
            _within(_ANSWER, self._cluster.close)
            return
        for actor in actors:
            self._ray.kill(actor)
        self._cluster.close()

    @property
    def gpus(self) -> int:
        return self._gpus

    def free(self) -> int:
        return self.places - len(self._running)

    def submit(self, name: str, task: Task) -> None:
        if self._idle:
            actor = self._idle.pop()
        else:
            actor = self._remote.remote(place(), self._reports, bool(self._gpus))
        self._running[actor.run.remote(task)] = name, actor

    def wait(self) -> tuple[str, Any]:
        done: list = []
        step = _LOOK if self._reports else _CHECK
        looks = 0
        while not done:
            done, _ = self._ray.wait(list(self._running), num_returns=1, timeout=step)
            looks += 1
            if not done and looks * step >= _CHECK:
                self._check()
                looks = 0
            if self._reports:
                self._take_reports()
        name, actor = self._running.pop(done[0])
        try:
            outcome = self._ray.get(done[0])
        except self._ray.exceptions.RayTaskError as error:
            self._idle.append(actor)
            raise error.cause from None
        except self._ray.exceptions.RayError as error:
            self._check()  # or did all of them die?
            self._ray.kill(actor)
            return name, WorkerDied(type(error).__name__)
        self._idle.append(actor)
        return name, outcome

    def _take_reports(self) -> None:
        try:
            for event in self._ray.get(self._reports.take.remote(), timeout=_ANSWER):
                self._report(*event)
        except self._ray.exceptions.RayError:
            self._check()
            raise

    def _check(self) -> None:
        """Raise ClusterLost if the cluster does not say in time that a node of it is alive."""
        nodes = _within(_ANSWER, self._ray.nodes)
        if not any(node["Alive"] for node in nodes or ()):
            self._lost = True
            raise ClusterLost(
                f"ray: expected the cluster at {self._address or 'this machine'} to go on, got no"
                " answer of its head node; what is done is kept, run again to go on"
            )


def _within(seconds: float, function: Callable[[], Any]) -> Any:
    """What the function returns, or None if it fails or takes longer."""
    found: list = []

    def call() -> None:
        try:
            found.append(function())
        except Exception:
            found.append(None)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None
