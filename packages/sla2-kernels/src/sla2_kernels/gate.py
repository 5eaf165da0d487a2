"""The compile gate: whether a compiled kernel keeps its spec's and its architecture's limits."""

from __future__ import annotations

from typing import Any

from sla2_kernels.compile import Compiled
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
    if used.registers * spec.threads > limits.registers_per_sm:
        found.append(
            f"{where}: {used.registers} registers x {spec.threads} threads do not fit on a"
            " multiprocessor"
        )
    if used.shared + spec.shared_bytes > limits.shared_per_block:
        total = used.shared + spec.shared_bytes
        found.append(
            f"{where}: {total} bytes of shared memory, expected at most {limits.shared_per_block}"
        )
    return found


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
