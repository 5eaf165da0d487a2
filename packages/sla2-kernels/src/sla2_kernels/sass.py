"""What a compiled kernel executes: its opcodes, instructions and loops, read from its SASS by
nvdisasm. Needs no GPU.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sla2_kernels.artifacts import get, key_of
from sla2_kernels.compile import Compiled

SCHEMA = "sass 4"
TENSOR = ("HMMA", "IMMA", "QMMA", "HGMMA", "IGMMA", "QGMMA", "OMMA")
_MEMORY = ("LD", "ST", "RED", "ATOM", "UBLKCP", "BAR", "SYNCS")
_LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P[T\d]+)\s+)?([A-Z][\w.]*)([^;]*);")
_LABEL = re.compile(r"(\.L_\w+):")
_TARGET = re.compile(r"`\((\.L_\w+)\)")


@dataclass(frozen=True)
class Loop:
    """A loop: what lies between a backward branch and the place that it goes back to.

    Code behind the kernel's end that returns to its place is none.

    Attributes:
        instructions: of one trip that takes no rare branch, inner loops counted once.
        rare: instructions that a forward branch may jump over and that neither read or write memory
            nor multiply matrices: the rescaling of sums, the mask of the last keys.
        tensor: how many of `instructions` multiply matrices.
        inner: instructions, without rare ones, and tensor instructions of the inner loop with most
            of the latter, of several the longest, (0, 0) if none multiplies matrices.
    """

    instructions: int
    rare: int
    tensor: int
    inner: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Code:
    """The code of one kernel.

    Attributes:
        opcodes: how often each stands in it, with its modifiers, such as "LDG.E.128".
        instructions: of all of it.
        loop: the hot loop: of those with most tensor instructions the longest; None without loops.
    """

    opcodes: dict[str, int]
    instructions: int
    loop: Loop | None

    def count(self, prefix: str) -> int:
        """How many instructions' names begin with `prefix`."""
        return sum(n for name, n in self.opcodes.items() if name.startswith(prefix))


@dataclass(frozen=True)
class _Instruction:
    address: int
    predicated: bool
    opcode: str
    target: int | None  # the address that a branch goes to


@cache
def find_disassembler() -> Path:
    """nvdisasm: $SLA2_NVDISASM, the PATH's, the CUDA toolkit's, or that of the triton package.

    Raises:
        RuntimeError: there is none, or $SLA2_NVDISASM is no file.
    """
    if chosen := os.environ.get("SLA2_NVDISASM"):
        if not Path(chosen).is_file():
            raise RuntimeError(f"SLA2_NVDISASM: expected the program nvdisasm, got {chosen!r}")
        return Path(chosen)
    toolkits = (os.environ.get("CUDA_PATH"), os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    found = [Path(path) for path in (shutil.which("nvdisasm"),) if path]
    found += [Path(root) / "bin" / "nvdisasm" for root in toolkits if root]
    triton = importlib.util.find_spec("triton")
    for folder in (triton and triton.submodule_search_locations) or ():
        found.append(Path(folder) / "backends" / "nvidia" / "bin" / "nvdisasm")
    if there := next((path for path in found if path.is_file()), None):
        return there
    raise RuntimeError(
        "nvdisasm is not installed; the CUDA toolkit and the triton package have it, and"
        " SLA2_NVDISASM names another"
    )


@cache
def _version(tool: Path) -> str:
    done = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


def code_of(built: Compiled) -> dict[str, Code]:
    """The code of each kernel of a cubin, from the cache or disassembled now (half a second).

    Raises:
        RuntimeError: nvdisasm is missing, or cannot read the cubin.
    """
    tool = find_disassembler()
    key = key_of([SCHEMA, built.key, _version(tool)])
    entry = get(key, ".code", lambda: (_disassemble(tool, built.path), {"cubin": built.path.name}))
    return {
        name: Code(about["opcodes"], about["instructions"], about["loop"] and _loop(about["loop"]))
        for name, about in json.loads(entry.path.read_bytes()).items()
    }


def _loop(about: dict[str, Any]) -> Loop:
    return Loop(**{**about, "inner": tuple(about["inner"])})


def _disassemble(tool: Path, cubin: Path) -> bytes:
    done = subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=False)
    if done.returncode or not (found := parse(done.stdout)):
        raise RuntimeError(f"{tool}: {cubin.name}: {' '.join(done.stderr.split())[:200]}")
    return json.dumps({name: asdict(code) for name, code in found.items()}).encode()


def parse(text: str) -> dict[str, Code]:
    """The kernels of nvdisasm's output."""
    found = {}
    for part in re.split(r"^\.text\.", text, flags=re.MULTILINE)[1:]:
        name, body = part.split(":", 1)
        code = list(_instructions(body.split("//------")[0]))
        found[name] = Code(dict(Counter(line.opcode for line in code)), len(code), _hot_loop(code))
    return found


def _instructions(body: str) -> Iterator[_Instruction]:
    """The instructions that may run, without what fills the end: NOPs and a branch to itself."""
    lines: list[tuple[int, str | None, str, str]] = []
    places: dict[str, int] = {}  # label -> number of the line behind it
    for line in body.splitlines():
        if label := _LABEL.match(line):
            places[label[1]] = len(lines)
        elif found := _LINE.match(line):
            lines.append((int(found[1], 16), found[2], found[3], found[4]))
    for address, predicate, opcode, rest in lines:
        named = _TARGET.search(rest) if opcode.startswith("BRA") else None
        place = places.get(named[1]) if named else None
        target = lines[place][0] if place is not None and place < len(lines) else None
        if opcode != "NOP" and target != address:
            conditional = predicate is not None or "P" in rest.split("`")[0]
            yield _Instruction(address, conditional, opcode, target)


def _hot_loop(code: list[_Instruction]) -> Loop | None:
    ends = [line for line in code if line.target is not None and line.target < line.address]
    bodies = [
        [line for line in code if end.target <= line.address <= end.address]
        for end in ends
        if end.target is not None
    ]
    bodies = [
        lines
        for lines in bodies
        if not any(line.opcode == "EXIT" and not line.predicated for line in lines)
    ]
    if not bodies:
        return None
    body = max(bodies, key=lambda lines: (_tensor(lines), len(lines)))
    first, last = body[0].address, body[-1].address
    rare = _rare(body)
    inside = [
        (len(lines) - _rare(lines), _tensor(lines))
        for lines in bodies
        if first <= lines[0].address and lines[-1].address <= last and len(lines) < len(body)
    ]
    inner = max(inside, key=lambda pair: (pair[1], pair[0]), default=(0, 0))
    return Loop(len(body) - rare, rare, _tensor(body), inner if inner[1] else (0, 0))


def _tensor(lines: list[_Instruction]) -> int:
    return sum(line.opcode.startswith(TENSOR) for line in lines)


def _rare(body: list[_Instruction]) -> int:
    """How many instructions the loop's conditional forward branches jump over, those that move no
    data; spans of less than 16 are too short to matter and are not counted.
    """
    rare, done = 0, 0
    for line in body:
        if line.target is None or not line.predicated or line.address < done:
            continue
        span = [other for other in body if line.address < other.address < line.target]
        ends_inside = line.target <= body[-1].address
        moves = any(other.opcode.startswith((*_MEMORY, *TENSOR)) for other in span)
        if ends_inside and len(span) >= 16 and not moves:
            rare, done = rare + len(span), line.target
    return rare
