"""Loads a kernel and launches it with raw pointers: the same call for the GPU (CuPy) and for the
emulator.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sla2_kernels.compile import compile_kernel, find_nvrtc
from sla2_kernels.emulator.emulate import EmulatedKernel, run
from sla2_kernels.emulator.emulate import load as load_emulated
from sla2_kernels.kernels import spec_of
from sla2_kernels.specs import KernelSpec, architecture_of

if TYPE_CHECKING:
    from sla2_kernels.problem import Device, Problem

TARGETS = ("cuda", "emulator")


class Pointer(NamedTuple):
    """An address in device memory (GPU) or host memory (emulator), kept alive by `owner`."""

    address: int
    owner: Any = None

    @classmethod
    def of(cls, array: npt.NDArray[Any] | None) -> Pointer:
        """The address of a numpy array; None is the null pointer.

        Raises:
            ValueError: the array is not C-contiguous.
        """
        if array is None:
            return cls(0)
        if not array.flags.c_contiguous:
            raise ValueError(
                f"array: expected C-contiguous, got strides {array.strides} for shape {array.shape}"
            )
        return cls(array.ctypes.data, array)


Argument = Pointer | np.generic  # of a kernel
_SCALARS = frozenset((np.uint64, np.int64, np.int32, np.float32, np.float64))


@dataclass(frozen=True)
class LoadedKernel:
    """A kernel ready to launch.

    Attributes:
        handle: CuPy's function, or the emulator's kernel.
        device: number of the GPU.
    """

    spec: KernelSpec
    target: str
    handle: Any
    device: int = 0


def load(spec: KernelSpec, target: str = "cuda", device: int = 0) -> LoadedKernel:
    """The kernel of `spec`, built if need be; once per process and device.

    Args:
        target: "cuda" or "emulator".
        device: number of the GPU, for whose architecture the spec must have been made.

    Raises:
        ValueError: another target.
        RuntimeError: something that is needed is missing, or the build fails.
    """
    if target == "cuda":
        return _load(spec, target, device, "")
    if target not in TARGETS:
        raise ValueError(f"target: expected one of {', '.join(TARGETS)}, got {target!r}")
    return _load(spec, target, device, os.environ.get("SLA2_EMULATOR_SANITIZE", ""))


@cache
def _load(spec: KernelSpec, target: str, device: int, _sanitizer: str) -> LoadedKernel:
    if target == "emulator":
        return LoadedKernel(spec, target, load_emulated(spec))
    require_cuda()
    import cupy

    built = compile_kernel(spec)
    with cupy.cuda.Device(device):
        function = cupy.RawModule(path=str(built.path)).get_function(spec.entry)
        if spec.shared_bytes > 48 * 1024:
            function.max_dynamic_shared_size_bytes = spec.shared_bytes
    return LoadedKernel(spec, target, function, device)


def launch(
    kernel: LoadedKernel,
    grid: Sequence[int],
    block: Sequence[int],
    shared_bytes: int,
    args: Sequence[Argument],
    stream: int | None = None,
) -> None:
    """Launch a kernel: asynchronously on a stream of the GPU, or emulated.

    Args:
        grid, block: up to three sizes each. An empty grid launches nothing.
        shared_bytes: dynamic shared memory of a block.
        args: Pointers and numpy scalars of exactly the kernel's parameter types.
        stream: a cudaStream_t as an integer; None: the default stream.

    Raises:
        TypeError: an argument is neither a Pointer nor a numpy scalar.
        EmulatorError: the emulated kernel breaks a rule.
    """
    grid, block = (*grid, 1, 1)[:3], (*block, 1, 1)[:3]
    if 0 in grid:
        return
    values = [np.uint64(x[0]) if isinstance(x, Pointer) else x for x in args]
    if not _SCALARS.issuperset(map(type, values)):
        index = next(i for i, value in enumerate(values) if type(value) not in _SCALARS)
        raise TypeError(
            f"{kernel.spec.entry}: argument {index}: expected a Pointer or a numpy scalar, got"
            f" {values[index]!r}"
        )
    if isinstance(kernel.handle, EmulatedKernel):
        return run(kernel.handle, grid, block, shared_bytes, values)
    import cupy

    with cupy.cuda.Device(kernel.device), _cupy_stream(stream or 0, kernel.device):
        kernel.handle(grid, block, tuple(values), shared_mem=shared_bytes)


def run_kernel(
    device: Device, problem: Problem, name: str, grid: tuple[int, ...], *args: Argument
) -> None:
    """Launch one kernel on the device's stream.

    Args:
        name: of the kernel, which is compiled for the problem's geometry.
        grid: up to three sizes.
        args: what the kernel lists, in its order: Pointers and numpy scalars of its exact types.

    Raises:
        ValueError: the device's architecture cannot run the problem's precision.
        RuntimeError: what compiling or running needs is missing, or the kernel does not compile.
        TypeError: an argument is neither a Pointer nor a numpy scalar.
    """
    spec = spec_of(name, device.arch, problem.geometry)
    if device.record:
        return device.record(spec, (*grid, 1, 1)[:3], args)
    kernel = load(spec, device.target, device.index)
    launch(kernel, grid, (spec.threads,), spec.shared_bytes, args, device.stream)


class _StreamHandle:
    """A cudaStream_t in the CUDA stream protocol."""

    def __init__(self, handle: int):
        self.handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


@lru_cache(maxsize=256)
def _cupy_stream(handle: int, device: int) -> Any:
    """CuPy's view of a stream that somebody else owns."""
    import cupy

    if hasattr(cupy.cuda.Stream, "from_external"):  # CuPy 14; ExternalStream is deprecated there
        return cupy.cuda.Stream.from_external(_StreamHandle(handle))
    return cupy.cuda.ExternalStream(handle, device)


def _driver_version() -> int | None:
    """The CUDA version that the driver supports, as 1000 * major + 10 * minor; None without a
    driver.
    """
    try:
        library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int()
    return None if library.cuDriverGetVersion(ctypes.byref(number)) else number.value


def missing_for_cuda() -> str | None:
    """What backend="cuda" lacks on this machine and how to get it, in one line; None if nothing."""
    if (version := _driver_version()) is None:
        return (
            "no NVIDIA driver (libcuda.so.1); it needs a machine with an NVIDIA GPU and driver 570"
            " or later"
        )
    extra = "cuda13" if version >= 13000 else "cuda12"
    if importlib.util.find_spec("cupy") is None:
        return f"CuPy is not installed; pip install 'sla2-kernels[{extra}]'"
    try:
        find_nvrtc()
    except RuntimeError as error:
        return str(error)
    import cupy

    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"the CUDA runtime finds no GPU ({' '.join(str(error).split())})"
    return None if count else "the CUDA runtime finds no GPU"


def require_cuda() -> None:
    """Do nothing if kernels can run on a GPU here.

    Raises:
        RuntimeError: names in one line what is missing.
    """
    if missing := missing_for_cuda():
        raise RuntimeError(f"backend='cuda': {missing}")


@cache
def device_architecture(device: int = 0) -> str:
    """The architecture to compile for on GPU number `device`, such as "sm_90a".

    Raises:
        RuntimeError: the GPU is too old, or unknown.
    """
    import cupy

    number = cupy.cuda.Device(device).compute_capability
    return architecture_of(int(number[:-1]), int(number[-1]))


@cache
def multiprocessors(device: int = 0) -> int:
    """How many multiprocessors GPU number `device` has."""
    import cupy

    return int(cupy.cuda.Device(device).attributes["MultiProcessorCount"])
