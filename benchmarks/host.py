"""The host's time of a forward, launches stubbed: `python -m benchmarks.host`. What Python and
torch take to prepare all launches of a call of a shape that was seen before; no GPU, nothing is
computed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock


class _Stub:
    """A loaded kernel's handle that takes its arguments and does nothing."""

    def __call__(self, grid: Any, block: Any, args: Any, shared_mem: int = 0) -> None:
        return None


class _Nothing:
    """What CuPy enters around a launch, and costs nothing."""

    def __init__(self, *_: Any):
        return None

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: Any) -> None:
        return None


def _multiprocessors(device: int = 0) -> int:
    return 132


@contextmanager
def _module(name: str, module: Any) -> Iterator[None]:
    """What `import name` finds. mock.patch.dict would also forget what else is imported meanwhile,
    and some extension modules (Triton's) abort when they are loaded again.
    """
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        yield
    finally:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before


@contextmanager
def stubbed() -> Iterator[None]:
    """CuPy's part of a launch left out: kernels are neither built nor launched."""
    from functools import cache
    from types import SimpleNamespace

    from sla2_core.backends.cuda_routed import plan_of
    from sla2_kernels import plan  # not under the patches, whose `load` it would keep
    from sla2_kernels.launch import LoadedKernel

    @cache
    def load(spec: Any, target: str, device: int) -> LoadedKernel:
        return LoadedKernel(spec, target, _Stub())

    stream = SimpleNamespace(from_external=_Nothing)
    cupy = SimpleNamespace(cuda=SimpleNamespace(Device=_Nothing, Stream=stream))
    with (
        _module("cupy", cupy),
        mock.patch("sla2_kernels.launch.load", load),
        mock.patch.object(plan, "load", load),
        mock.patch("sla2_kernels.hopper.multiprocessors", new=_multiprocessors),
        mock.patch("sla2_kernels.launch._cupy_stream", _Nothing),
    ):
        plan_of.cache_clear()  # a plan holds its kernels
        try:
            yield
        finally:
            plan_of.cache_clear()


def microseconds(call: Callable[[], Any], repetitions: int = 300) -> float:
    """The shortest of many calls, after some to warm up: what other processes took is left out."""
    for _ in range(20):
        call()
    best = float("inf")
    for _ in range(repetitions):
        start = time.perf_counter_ns()
        call()
        best = min(best, time.perf_counter_ns() - start)
    return best / 1e3


def operator() -> Callable[[], Any]:
    """The planned launches of a routed forward at the paper's shape, by mma.sync and by wgmma the
    same in number.
    """
    from collections.abc import Sequence

    from sla2_kernels.forward import routed_forward
    from sla2_kernels.launch import Pointer
    from sla2_kernels.plan import make_plan
    from sla2_kernels.problem import AlphaRule, Device, Strided
    from sla2_kernels.record import Recorder

    from benchmarks.gpu_model import SHAPE, problem_of

    n, heads, topk = int(SHAPE["n"]), int(SHAPE["heads"]), 1 - SHAPE["sparsity"]
    device = replace(Recorder("sm_90a").device, record=None)

    def launches(device: Device, given: Sequence[Pointer]) -> list[Pointer]:
        *qkv, weight, offset, slope = given
        q, k, v = (Strided.of(x, heads, n, 128) for x in qkv)
        p, rule = problem_of("full", n, heads), AlphaRule(offset, slope, heads)
        return [routed_forward(device, p, q, k, v, weight, weight, 1, topk, None, rule).out.pointer]

    plan = make_plan(device, [0] * 6, launches)
    return lambda: plan.run(device, [1 << 40] * 6)


def module(complement: str = "linear") -> Callable[[], Any]:
    """SLA2Attention without gradient on small tensors, which has the launches of any shape. Its
    few torch operators run on the CPU.
    """
    import torch
    from sla2_core import SLA2Attention, SLA2Config

    config = SLA2Config(
        head_dim=128, num_heads=2, topk=0.5, backend="emulator", complement=complement
    )
    attention = SLA2Attention(config).eval()
    q, k, v = (torch.zeros(1, 2, 256, 128, dtype=torch.bfloat16) for _ in range(3))

    def call() -> Any:
        with torch.no_grad():
            return attention(q, k, v)

    return call


def main() -> None:
    """Print both."""
    with stubbed():
        for name, make in (("operator", operator), ("module", module)):
            print(f"{name}: {microseconds(make()):.0f} us")


if __name__ == "__main__":
    main()
