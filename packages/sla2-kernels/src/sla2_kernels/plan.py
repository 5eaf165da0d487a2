"""The launches of a call written down once, and made again for the tensors of the next one.

A call of the operator is eight launches or more. To find their kernels, grids and arguments takes
Python longer than to hand them to the GPU, and nothing of it depends on where the tensors lie. So a
plan holds the launches with a place for each address, and the memory that they share is allocated
at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from sla2_kernels.launch import Argument, LoadedKernel, Pointer, launch, load
from sla2_kernels.problem import NULL, Device
from sla2_kernels.record import bytes_of
from sla2_kernels.specs import KernelSpec

_ALIGNMENT = 512  # bytes; bulk copies need 128
# While a plan is made, an address is the number of a tensor, from 1 on, above an offset of so many
# bits.
_OFFSET_BITS = 48


class Place(NamedTuple):
    """What an argument points to: `offset` bytes into `base`, which counts the inputs, then the
    outputs, and last the shared memory.
    """

    argument: int
    base: int
    offset: int


class Step(NamedTuple):
    """A launch. `arguments` has 0 where `places` puts an address."""

    kernel: LoadedKernel
    grid: tuple[int, ...]
    arguments: tuple[np.generic, ...]
    places: tuple[Place, ...]


@dataclass(frozen=True)
class Plan:
    """The launches of a call.

    Attributes:
        steps: in order.
        outputs: shape and dtype of each, as `Device.allocate` takes them.
        shared: bytes of device memory that launches pass to one another.
    """

    steps: tuple[Step, ...]
    outputs: tuple[tuple[tuple[int, ...], str], ...]
    shared: int

    def run(self, device: Device, inputs: Sequence[int]) -> list[Pointer]:
        """Launch everything on the device's stream and return the outputs.

        Args:
            device: as the plan was made for, but on any stream.
            inputs: addresses, as many and as well aligned as there; 0 where there was none.

        Raises:
            EmulatorError: an emulated kernel breaks a rule.
        """
        outputs = [device.allocate(*output) for output in self.outputs]
        shared = device.allocate((self.shared,), "uint8")
        bases = (*inputs, *(output.address for output in outputs), shared.address)
        for kernel, grid, arguments, places in self.steps:
            values: list[Argument] = list(arguments)
            for argument, base, offset in places:
                values[argument] = np.uint64(bases[base] + offset)
            spec = kernel.spec
            launch(kernel, grid, (spec.threads,), spec.shared_bytes, values, device.stream)
        return outputs


def make_plan(
    device: Device,
    inputs: Sequence[int | None],
    call: Callable[[Device, Sequence[Pointer]], Sequence[Pointer]],
) -> Plan:
    """The plan of `call`, whose kernels are built if need be; nothing is launched.

    Args:
        device: whose target, architecture, number and allowed kernels the plan is for.
        inputs: bytes by which the address of each is off a multiple of 16; None: no tensor.
        call: makes the launches on a device, given the inputs as pointers to nowhere, and returns
            pointers to those of its results that are wanted. It reads no memory.

    Raises:
        ValueError, RuntimeError: as `launch.run_kernel`, or what `call` raises.
    """
    noted: list[tuple[KernelSpec, tuple[int, ...], tuple[Argument, ...]]] = []
    made: dict[int, tuple[tuple[int, ...], str]] = {}  # shape and dtype by number

    def allocate(shape: tuple[int, ...], dtype: str) -> Pointer:
        number = len(inputs) + len(made) + 1
        made[number] = shape, dtype
        return Pointer(number << _OFFSET_BITS)

    def record(spec: KernelSpec, grid: tuple[int, ...], arguments: Sequence[Argument]) -> None:
        if 0 not in grid:
            noted.append((spec, grid, tuple(arguments)))

    given = [
        NULL if off is None else Pointer((number << _OFFSET_BITS) + off)
        for number, off in enumerate(inputs, 1)
    ]
    results = call(replace(device, allocate=allocate, record=record), given)
    outputs = [result.address >> _OFFSET_BITS for result in results]
    # Where each tensor lies in a run: its base, and its offset there.
    lies = {number: (number - 1, -(off or 0)) for number, off in enumerate(inputs, 1)}
    lies |= {number: (len(inputs) + index, 0) for index, number in enumerate(outputs)}
    shared = 0
    for number, tensor in made.items():
        if number not in lies:
            lies[number] = len(inputs) + len(outputs), shared
            shared += -(-bytes_of(*tensor) // _ALIGNMENT) * _ALIGNMENT

    def step(spec: KernelSpec, grid: tuple[int, ...], arguments: tuple[Argument, ...]) -> Step:
        places: list[Place] = []
        values: list[np.generic] = []
        for argument in arguments:
            if not isinstance(argument, Pointer):
                values.append(argument)
                continue
            if argument.address:
                number = argument.address >> _OFFSET_BITS
                base, offset = lies[number]
                offset += argument.address - (number << _OFFSET_BITS)
                places.append(Place(len(values), base, offset))
            values.append(np.uint64(0))
        kernel = load(spec, device.target, device.index)
        return Step(kernel, grid, tuple(values), tuple(places))

    steps = tuple(step(*launched) for launched in noted)
    return Plan(steps, tuple(made[number] for number in outputs), shared)
