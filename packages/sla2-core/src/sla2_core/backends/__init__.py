"""Backends: where the operator is computed, behind one protocol, and which one a call takes."""

from __future__ import annotations

import functools
import warnings

from torch import Tensor

from sla2_core.backends.base import Backend, Grads, Inputs, Problem
from sla2_core.backends.blocked import BlockedBackend
from sla2_core.backends.cpu import CpuBackend
from sla2_core.backends.cuda import CudaBackend, EmulatorBackend
from sla2_core.backends.ops import BACKENDS, register_backend
from sla2_core.backends.reference import ReferenceBackend
from sla2_core.options import Options, constant

__all__ = [
    "BACKENDS",
    "Backend",
    "Grads",
    "Inputs",
    "Problem",
    "backend_for",
    "register_backend",
    "resolve",
    "warn_fallback",
]

BLOCKED = register_backend(BlockedBackend())
CPU = register_backend(CpuBackend())
CUDA = register_backend(CudaBackend())
register_backend(EmulatorBackend())
register_backend(ReferenceBackend())
_KERNELS = {"cpu": CPU, "meta": CPU, "cuda": CUDA}  # what "auto" takes by device type


def resolve(name: str, problem: Problem) -> Backend:
    """The backend of a call. `name` is "auto" or a name in BACKENDS.

    "auto" takes the CPU kernels for CPU tensors and the CUDA kernels for CUDA tensors. Where those
    are missing, or cannot take the call, it falls back to `blocked`, plain torch without N x N
    memory, with one warning that says why.

    Raises:
        ValueError: an unknown name, or an explicit choice that cannot take the call. RuntimeError:
            an explicit choice that this machine lacks, or tensors on another device.
    """
    kind = problem.device.type
    if name == "auto":
        kernels = _KERNELS.get(kind)
        if kernels is None:
            reason: str | None = f"no kernels for {kind} tensors"
        else:
            reason = kernels.missing() or kernels.unfit(problem)
        if kernels is not None and reason is None:
            return kernels
        warn_fallback(reason)
        return BLOCKED
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of auto, {', '.join(BACKENDS)}, got {name!r}")
    backend = BACKENDS[name]
    if reason := backend.missing():
        raise RuntimeError(f"backend={name!r}: {reason}")
    if backend.device not in (None, kind):
        raise RuntimeError(
            f"backend: expected {str(backend.device).upper()} tensors for {name!r}, got tensors on"
            f" {problem.device}"
        )
    if reason := backend.unfit(problem):
        raise ValueError(reason)
    return backend


def backend_for(q: Tensor, options: Options, name: str) -> Backend:
    """resolve() for a call with q (B, H, N, d)."""
    return resolve(name, Problem.of(q, options))


@constant
def warn_fallback(reason: str | None) -> None:
    """Warn, once for each reason, that plain torch runs where kernels were asked for."""
    _warn_once(reason)


@functools.cache
def _warn_once(reason: str | None) -> None:
    warnings.warn(
        f"sla2: plain torch runs, block by block, slower than a kernel: {reason}",
        RuntimeWarning,
        stacklevel=6,
    )
