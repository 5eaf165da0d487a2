"""The compile gate: whether a compiled kernel keeps its spec's and its architecture's limits."""

from __future__ import annotations

from typing import Any

from sla2_kernels.compile import Compiled
from sla2_kernels.sass import Code
from sla2_kernels.specs import ARCHITECTURES, KernelSpec


def gate(spec: KernelSpec, compiled: Compiled) -> list[str]:
    """Why a compiled kernel breaks its spec's or its architecture's limits: lines, none if fine."""
    if spec.entry not in compiled.kernels:
        return [f"{spec.label} {spec.arch}: no such entry in {spec.source}"]
    used, limits, where = (
        compiled.kernels[spec.entry],
        ARCHITECTURES[spec.arch],
        f"{spec.label} {spec.arch}",
    )
    found = []
    if used.spill_stores or used.spill_loads:
        found.append(
            f"{where}: spills {used.spill_stores} + {used.spill_loads} bytes, expected none"
        )
    if used.registers > spec.max_registers:
        found.append(f"{where}: {used.registers} registers, expected at most {spec.max_registers}")
    shared = used.shared + spec.shared_bytes
    resident = limits.resident_blocks(spec.threads, used.registers, shared)
    if resident < spec.blocks_per_sm:
        found.append(
            f"{where}: {resident} blocks of {spec.threads} threads fit on a multiprocessor,"
            f" expected {spec.blocks_per_sm}"
        )
    found += [f"{where}: {line}" for line in compiled.warnings]
    if shared > limits.shared_per_block:
        found.append(
            f"{where}: {shared} bytes of shared memory, expected at most {limits.shared_per_block}"
        )
    return found


def gate_code(spec: KernelSpec, code: Code) -> list[str]:
    """Why a kernel's code is not what its spec says it executes: lines, none if fine."""
    where = f"{spec.label} {spec.arch}"
    found = [
        f"{where}: no {opcode} in its code, expected some"
        for opcode in spec.opcodes
        if not code.count(opcode)
    ]
    return found + [
        f"{where}: {count} {opcode} in its code, expected none"
        for opcode in spec.never
        if (count := code.count(opcode))
    ]


def row_of(spec: KernelSpec, compiled: Compiled) -> dict[str, Any]:
    """One line of `sla2 compile`'s table."""
    used, limits = compiled.kernels[spec.entry], ARCHITECTURES[spec.arch]
    shared = used.shared + spec.shared_bytes
    blocks = limits.resident_blocks(spec.threads, used.registers, shared)
    return {
        "kernel": spec.label,
        "arch": spec.arch,
        "threads": spec.threads,
        "registers": used.registers,
        "ceiling": spec.max_registers,
        "spills": used.spill_stores + used.spill_loads,
        "stack": used.stack,
        "shared": shared,
        "blocks_per_sm": blocks,
        "occupancy": blocks * spec.threads / limits.threads_per_sm,
        "cubin": str(compiled.path),
        "problems": gate(spec, compiled),
    }
