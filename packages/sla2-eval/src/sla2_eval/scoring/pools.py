"""Where workers run: one child process, or Ray actors on this machine or a cluster. A worker that
dies is replaced.

One worker is a plain child process, because a local Ray takes seconds to start and gives nothing to
one worker; two or more, and any cluster, are Ray actors. Both run the same `worker.Worker` and give
the same bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from typing import Protocol

from sla2_eval.parallel.cluster import Cluster, WorkerDied, local_gpus, place


class Pool(Protocol):
    """A fixed number of workers, each with at most one task."""

    def free(self) -> int: ...
    def submit(self, number: int, task: dict) -> None: ...
    def wait(self) -> tuple[int, dict | WorkerDied]: ...
    def close(self) -> None: ...


class ProcessPool:
    """One child process that speaks JSON lines."""

    def __init__(self, settings: dict[str, dict], device: str, decoder: str):
        if device == "cuda" and not local_gpus():
            raise ValueError("device: expected a GPU that torch can use for 'cuda', got none")
        hello = {"settings": settings, "device": device, "decoder": decoder, "path": sys.path}
        self.hello = json.dumps(hello, default=os.fspath) + "\n"  # `files` may be paths
        self.process: subprocess.Popen | None = None
        self.pending: int | None = None
        self.errors = tempfile.TemporaryFile()

    def _start(self) -> subprocess.Popen:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                "sla2_eval.scoring.worker",
            ],  # what lies in the current folder must shadow no library
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=environment,
            text=True,
        )
        process.stdin.write(self.hello)
        return process

    def free(self) -> int:
        """How many tasks may be submitted now."""
        return int(self.pending is None)

    def submit(self, number: int, task: dict) -> None:
        """Give the task called `number` to the worker, starting it if there is none."""
        if self.process is None:
            self.process = self._start()
        self.pending = number
        try:
            self.process.stdin.write(json.dumps(task) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # `wait` finds out how it died

    def wait(self) -> tuple[int, dict | WorkerDied]:
        """Block until the task is done: its number and outcome, or how its worker died."""
        number, self.pending = self.pending, None
        line = self.process.stdout.readline()
        if line.endswith("\n"):
            return number, json.loads(line)
        code = self.process.wait()
        self.close()
        if code < 0:
            return number, WorkerDied(f"signal {signal.Signals(-code).name}")
        self.errors.seek(0)
        said = self.errors.read().decode(errors="replace").strip().splitlines() or ["no message"]
        return number, WorkerDied(f"exit code {code}: {said[-1][:300]}")

    def close(self) -> None:
        """End the worker."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            with contextlib.suppress(BrokenPipeError):  # a task that it died before reading
                self.process.stdin.close()
            self.process.stdout.close()
            self.process = None


class RayPool:
    """Actors of a Ray cluster, each with a GPU's share where the cluster has GPUs, else with one
    CPU.
    """

    def __init__(
        self,
        settings: dict[str, dict],
        device: str,
        decoder: str,
        num_workers: int,
        address: str | None,
    ):
        self.cluster = Cluster(address, num_cpus=num_workers)
        self.ray = self.cluster.ray
        gpus = self.cluster.gpus if device != "cpu" else 0
        if device == "cuda" and not gpus:
            self.cluster.close()
            raise ValueError("device: expected GPUs in the Ray cluster for 'cuda', got none")
        share = {"num_gpus": min(1.0, gpus / num_workers)} if gpus else {}
        cpus = min(1.0, self.cluster.cpus / num_workers)
        self.options = {"num_cpus": cpus, "max_restarts": 0, "max_task_retries": 0, **share}
        self.arguments = (settings, "cuda" if gpus else "cpu", decoder, place())
        self.actors: list = [None] * num_workers
        self.running: dict = {}

    def _actor(self):
        from sla2_eval.scoring.worker import Worker

        return self.ray.remote(**self.options)(Worker).remote(*self.arguments)

    def free(self) -> int:
        """How many tasks may be submitted now."""
        return len(self.actors) - len(self.running)

    def submit(self, number: int, task: dict) -> None:
        """Give the task called `number` to an idle worker, starting one if need be."""
        busy = {slot for _, slot in self.running.values()}
        slot = next(slot for slot in range(len(self.actors)) if slot not in busy)
        if self.actors[slot] is None:
            self.actors[slot] = self._actor()
        self.running[self.actors[slot].run.remote(task)] = (number, slot)

    def wait(self) -> tuple[int, dict | WorkerDied]:
        """Block until any task is done: its number and outcome, or how its worker died."""
        done, _ = self.ray.wait(list(self.running), num_returns=1)
        number, slot = self.running.pop(done[0])
        try:
            return number, self.ray.get(done[0])
        except self.ray.exceptions.RayError as error:
            self.ray.kill(self.actors[slot])
            self.actors[slot] = None
            return number, WorkerDied(type(error).__name__)

    def close(self) -> None:
        """End the actors, and the cluster if this pool started it."""
        for actor in filter(None, self.actors):
            self.ray.kill(actor)
        self.cluster.close()


def open_pool(
    settings: dict[str, dict], device: str, decoder: str, num_workers: int, ray_address: str | None
) -> Pool:
    """The pool for these workers: Ray for two or more or for a cluster's address, else one child
    process.
    """
    if num_workers == 1 and ray_address is None:
        return ProcessPool(settings, device, decoder)
    return RayPool(settings, device, decoder, num_workers, ray_address)
