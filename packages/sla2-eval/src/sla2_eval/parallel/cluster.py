"""The one place that starts Ray or joins its clusters, for scoring and for grids; and the GPUs of
this machine.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

from sla2_eval.runs.extras import needed_for

# No usage statistics; no environment of its own under `uv run`; and patience where the machine is
# busy.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_agent_register_timeout_ms": "180000",
    "RAY_raylet_start_wait_time_s": "180",
}
# attempts at a local cluster; on a machine busy beyond Ray's patience the second finds its files
# cached
_STARTS = 2


def local_gpus() -> int:
    """How many GPUs torch can use on this machine; torch, which takes seconds to import, is asked
    only if a driver shows one.
    """
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        return 0
    import torch

    return torch.cuda.device_count()


def check_address(address: str) -> None:
    """Raise ValueError if `address` is of no known form or nothing listens at host:port, which Ray
    would wait minutes for.
    """
    host, _, port = address.rpartition(":")
    if address == "auto" or "://" in address:
        return
    if not host or not port.isdigit():
        raise ValueError(
            f"ray_address: expected 'auto', host:port or ray://host:port, got {address!r}"
        )
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise ValueError(
            f"ray_address: expected a Ray cluster at {address}, got {error}"
        ) from error


def place() -> tuple[str, bool]:
    """The driver's current folder, and whether it looks for modules there: what `enter` takes in
    its workers.
    """
    here = os.getcwd()
    return here, bool({"", here} & set(sys.path))


def enter(folder: str, searched: bool) -> None:
    """In a worker of Ray: go to the driver's folder where this node has it.

    Ray looks for modules there in any case; unless the driver does, they must shadow no library.
    """
    if not searched:
        sys.path[:] = [entry for entry in sys.path if entry != folder]
    if os.path.isdir(folder):
        os.chdir(folder)


class Cluster:
    """Ray, joined: the cluster at `address`, or a local one of `num_cpus` and `num_gpus` that ends
    with `close`.

    `ray` is the module; `cpus` and `gpus` are what the cluster has. Raises RuntimeError in one line
    if it cannot be had, ModuleNotFoundError without Ray.
    """

    def __init__(
        self, address: str | None, *, num_cpus: int | None = None, num_gpus: int | None = None
    ):
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        with needed_for("several workers or a cluster"):
            import ray

        self.ray = ray
        self._started = not ray.is_initialized()
        if self._started:
            self._start(address, num_cpus, num_gpus)
        resources = ray.cluster_resources()
        self.cpus, self.gpus = resources.get("CPU", 1.0), resources.get("GPU", 0.0)

    def _start(self, address: str | None, num_cpus: int | None, num_gpus: int | None) -> None:
        options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
        if address is None:
            options |= {"num_cpus": num_cpus, "num_gpus": num_gpus, "include_dashboard": False}
        attempts = 1 if address else _STARTS
        for attempt in range(1, attempts + 1):
            try:
                self.ray.init(address=address or "local", **options)
                return
            except Exception as error:
                self.ray.shutdown()
                if attempt == attempts:
                    first = (str(error).strip() or type(error).__name__).splitlines()[0]
                    raise RuntimeError(
                        f"ray: expected a cluster at {address or 'local'!r}, got: {first}"
                    ) from error

    def close(self) -> None:
        """End the cluster, or leave it, if this call joined it."""
        if self._started:
            self.ray.shutdown()
