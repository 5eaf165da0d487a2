"""Loads an emulated kernel and runs it on host memory."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from sla2_kernels.emulator.build import build
from sla2_kernels.specs import KernelSpec

ORDERS = ("forward", "reverse", "random")


class EmulatorError(RuntimeError):
    """A kernel broke a rule, such as a divergent barrier or a misaligned copy.

    One line, with the block, threads, files and lines.
    """


@dataclass(frozen=True)
class Lanes:
    """The order of a block's threads between barriers, and how many blocks run at once."""

    order: str = "forward"
    seed: int = 0
    workers: int = 1


_LANES: ContextVar[Lanes] = ContextVar("sla2_lanes", default=Lanes())  # noqa: B039  (frozen)


@contextmanager
def lanes(order: str = "forward", seed: int = 0, workers: int = 1) -> Iterator[None]:
    """Emulated launches inside the `with` run their threads in this order.

    Args:
        order: "forward", "reverse" or "random".
        seed: of the random order.
        workers: blocks that run at once.

    Raises:
        ValueError: another order.
    """
    if order not in ORDERS:
        raise ValueError(f"order: expected one of {', '.join(ORDERS)}, got {order!r}")
    token = _LANES.set(Lanes(order, seed, workers))
    try:
        yield
    finally:
        _LANES.reset(token)


@dataclass(frozen=True)
class EmulatedKernel:
    """A loaded kernel.

    Attributes:
        kinds: of its parameters, a letter each: p pointer, i integer, f float.
        sizes: their bytes.
    """

    entry: str
    library: ctypes.CDLL
    kinds: str
    sizes: tuple[int, ...]


@cache
def _open(path: str) -> ctypes.CDLL:
    return ctypes.CDLL(path)


def load(spec: KernelSpec) -> EmulatedKernel:
    """Build the spec's source for the CPU and look its entry up.

    Raises:
        RuntimeError: no compiler, the source does not compile, or it has no such entry.
    """
    library = _open(str(build(spec).path))
    kinds, sizes = ctypes.c_char_p(), ctypes.POINTER(ctypes.c_ubyte)()
    if library.sla2_describe(spec.entry.encode(), ctypes.byref(kinds), ctypes.byref(sizes)):
        raise RuntimeError(f"emulator: {spec.path.name} has no entry {spec.entry!r}")
    text = (kinds.value or b"").decode()
    return EmulatedKernel(spec.entry, library, text, tuple(sizes[i] for i in range(len(text))))


def run(
    kernel: EmulatedKernel,
    grid: Sequence[int],
    block: Sequence[int],
    shared_bytes: int,
    values: Sequence[np.generic],
) -> None:
    """Run a grid on host memory.

    Args:
        grid, block: three sizes each.
        shared_bytes: dynamic shared memory of a block.
        values: numpy scalars, pointers as np.uint64.

    Raises:
        TypeError: a value does not fit its parameter.
        EmulatorError: the kernel breaks a rule.
    """
    if len(values) != len(kernel.kinds):
        raise TypeError(
            f"{kernel.entry}: expected {len(kernel.kinds)} arguments, got {len(values)}"
        )
    held = []
    for index, (value, kind, size) in enumerate(zip(values, kernel.kinds, kernel.sizes)):
        right = {
            "p": value.dtype == np.uint64,
            "f": value.dtype.kind == "f",
            "i": value.dtype.kind in "iub",
        }[kind]
        if not right or value.dtype.itemsize != size:
            wanted = {
                "p": "a Pointer",
                "f": f"a float of {size} bytes",
                "i": f"an integer of {size} bytes",
            }[kind]
            raise TypeError(
                f"{kernel.entry}: argument {index}: expected {wanted}, got {value.dtype}"
            )
        held.append(np.array([value]))
    addresses = (ctypes.c_void_p * len(held))(*[array.ctypes.data for array in held])
    chosen = _LANES.get()
    settings = (ctypes.c_int * 3)(ORDERS.index(chosen.order), chosen.seed, chosen.workers)
    message = ctypes.create_string_buffer(2000)
    code = kernel.library.sla2_emulate(
        kernel.entry.encode(),
        (ctypes.c_uint * 3)(*grid),
        (ctypes.c_uint * 3)(*block),
        ctypes.c_size_t(shared_bytes),
        addresses,
        settings,
        message,
        ctypes.c_size_t(len(message)),
    )
    if code:
        raise EmulatorError(f"{kernel.entry}: {message.value.decode()}")


def poisoned(shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """An array of 0xFF bytes: NaN in floats, -1 in integers, so that what stays unwritten shows."""
    array = np.empty(shape, dtype)
    (
        array.view(np.uint8).fill(0xFF)
        if array.ndim
        else array.fill(np.frombuffer(b"\xff" * 8, dtype)[0])
    )
    return array
