"""KernelSpec: which kernel, for which data type, head dimension, tile and architecture, and with
what limits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

CSRC = Path(__file__).parent / "csrc"
DTYPES = {"float16": 0, "bfloat16": 1}
PRECISIONS = {"full": 0, "int8": 1, "int8_int8": 2, "fp8": 3}
HEAD_DIMS = (64, 128)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What a block may use on a GPU architecture (CUDA programming guide, compute capabilities).

    Attributes:
        number: the SLA2_ARCH macro.
        shared_per_block, shared_per_sm: bytes; a resident block reserves 1 KB more.
        threads_per_sm, blocks_per_sm, registers_per_sm: what a multiprocessor holds at once.
    """

    number: int
    shared_per_block: int
    shared_per_sm: int
    threads_per_sm: int
    blocks_per_sm: int
    registers_per_sm: int = 65536

    @property
    def fast_mma(self) -> bool:
        """Whether tensor cores outrun shared memory at 16 rows a warp (FAST_MMA in mix.cuh).

        So it is on the data centre's GPUs.
        """
        return self.number in (80, 90, 100)

    @property
    def fp8_mma(self) -> bool:
        """Whether `mma.sync` multiplies FP8 in one instruction (QMMA).

        sm_90 and sm_100 have FP8 for other instructions alone; there ptxas widens the operands to
        fp16 and multiplies those.
        """
        return self.number in (89, 120)

    def resident_blocks(self, threads: int, registers: int, shared_bytes: int) -> int:
        """Blocks of a kernel that fit on one multiprocessor at once."""
        warps = -(-threads // 32)
        registers_of_block = -(-registers * 32 // 256) * 256 * warps
        shared_of_block = -(-(shared_bytes + 1024) // 128) * 128
        return min(
            self.blocks_per_sm,
            self.threads_per_sm // (32 * warps),
            self.registers_per_sm // max(1, registers_of_block),
            self.shared_per_sm // shared_of_block,
        )

    def register_ceiling(self, threads: int, blocks: int) -> int:
        """The registers a thread may have where `blocks` blocks shall fit: a multiple of 8."""
        warps = -(-threads // 32)
        return min(255, self.registers_per_sm // (blocks * warps) // 256 * 8)


_KB = 1024
ARCHITECTURES = {
    "sm_80": Architecture(
        number=80,
        shared_per_block=163 * _KB,
        shared_per_sm=164 * _KB,
        threads_per_sm=2048,
        blocks_per_sm=32,
    ),
    "sm_86": Architecture(
        number=86,
        shared_per_block=99 * _KB,
        shared_per_sm=100 * _KB,
        threads_per_sm=1536,
        blocks_per_sm=16,
    ),
    "sm_89": Architecture(
        number=89,
        shared_per_block=99 * _KB,
        shared_per_sm=100 * _KB,
        threads_per_sm=1536,
        blocks_per_sm=24,
    ),
    "sm_90a": Architecture(
        number=90,
        shared_per_block=227 * _KB,
        shared_per_sm=228 * _KB,
        threads_per_sm=2048,
        blocks_per_sm=32,
    ),
    "sm_100a": Architecture(
        number=100,
        shared_per_block=227 * _KB,
        shared_per_sm=228 * _KB,
        threads_per_sm=2048,
        blocks_per_sm=32,
    ),
    "sm_120a": Architecture(
        number=120,
        shared_per_block=99 * _KB,
        shared_per_sm=100 * _KB,
        threads_per_sm=1536,
        blocks_per_sm=24,
    ),
}
# What "a" leaves out: cubins that later chips of the family run too (10.3: B300; 12.1: GB10).
ARCHITECTURES |= {"sm_100": ARCHITECTURES["sm_100a"], "sm_120": ARCHITECTURES["sm_120a"]}
_LATER_CHIPS = {87: "sm_86", 103: "sm_100", 121: "sm_120"}


def architecture_of(major: int, minor: int) -> str:
    """The architecture to compile for on a GPU of compute capability (major, minor).

    Raises:
        RuntimeError: there is none.
    """
    number = 10 * major + minor
    exact = (name for name, architecture in ARCHITECTURES.items() if architecture.number == number)
    if found := next(exact, _LATER_CHIPS.get(number)):
        return found
    known = "8.0, 8.6, 8.7, 8.9, 9.0, 10.0, 10.3, 12.0 or 12.1"
    raise RuntimeError(f"expected a GPU of compute capability {known}, got {major}.{minor}")


@dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """One kernel as it is compiled and launched.

    Specs with equal source, macros and arch share a compilation.

    Attributes:
        source: a file of csrc/, or an absolute path.
        entry: its extern "C" function.
        arch: such as "sm_90a".
        threads: of a block.
        macros: (name, value) pairs.
        shared_bytes: dynamic shared memory of a launch.
        blocks_per_sm: how many shall fit on a multiprocessor; the compile gate holds the kernel to
            it, and to no spills.
        opcodes: beginnings of names of SASS instructions that its code has, such as "QMMA".
        never: those that it has not.
    """

    source: str
    entry: str
    arch: str
    threads: int
    macros: tuple[tuple[str, int], ...] = ()
    shared_bytes: int = 0
    blocks_per_sm: int = 1
    opcodes: tuple[str, ...] = ()
    never: tuple[str, ...] = ("LDL", "STL")

    @property
    def max_registers(self) -> int:
        """What `blocks_per_sm` leaves a thread."""
        return ARCHITECTURES[self.arch].register_ceiling(self.threads, self.blocks_per_sm)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:  # each launch looks its kernel up by its spec
        return hash((self.entry, self.arch, self.macros, self.threads, self.shared_bytes))

    @property
    def path(self) -> Path:
        """The source file."""
        return CSRC / self.source

    @property
    def definitions(self) -> tuple[str, ...]:
        """The -D options, in the order of their names."""
        values = {**dict(self.macros), "SLA2_ARCH": ARCHITECTURES[self.arch].number}
        return tuple(f"-D{name}={value}" for name, value in sorted(values.items()))

    @property
    def label(self) -> str:
        """A short readable name: the entry and what tells it from its siblings."""
        values = dict(self.macros)
        parts = [self.entry]
        if "SLA2_HEAD_DIM" in values:
            parts.append(f"d{values['SLA2_HEAD_DIM']}")
        parts += [name for name, number in DTYPES.items() if values.get("SLA2_DTYPE") == number]
        parts += [
            name for name, number in PRECISIONS.items() if values.get("SLA2_PRECISION") == number
        ]
        return " ".join(parts)
