"""Where the tasks of a grid run: in this process, in several, or on Ray."""

from __future__ import annotations

from sla2_eval.parallel.cluster import local_gpus
from sla2_eval.parallel.processes import ProcessPool, ThisProcess
from sla2_eval.parallel.ray_pool import RayPool
from sla2_eval.parallel.tasks import Pool
from sla2_eval.runs.progress import Report, silent


def open_pool(count: int, ray_address: str | None, *, report: Report = silent) -> Pool:
    """As Ray tasks of a GPU each on a cluster or where this machine has several GPUs, else in
    `count` processes (0: in this one).
    """
    if ray_address is not None:
        return RayPool(ray_address, report=report)
    if (gpus := local_gpus()) > 1:
        return RayPool(None, gpus=gpus, report=report)
    return ProcessPool(count, report=report) if count else ThisProcess(report=report)
