"""The sources of a kernel: the .cu file and every header it reaches, as one snapshot in memory."""

from __future__ import annotations

import re
from pathlib import Path

from sla2_kernels.specs import CSRC

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', re.MULTILINE)
_ENTRY = re.compile(
    r'extern\s+"C"\s+__global__\s+void\s+'
    r"(?:__launch_bounds__\s*\((?:[^()]|\([^()]*\))*\)\s*)?(\w+)\s*\("
)

# The emulator's own headers: only reached under SLA2_EMULATOR.
EMULATED = ("emulated_ptx.h", "emulated_sm90.h")


def gather(path: Path) -> dict[str, str]:
    """Name -> text of the file (first) and of all headers it includes with quotes, from its folder
    or csrc/.

    Raises FileNotFoundError naming the header that is nowhere.
    """
    texts = {path.name: path.read_text()}
    todo = [path.name]
    while todo:
        includer = todo.pop()
        for name in _INCLUDE.findall(texts[includer]):
            if name in texts or name in EMULATED:
                continue
            found = next((f for f in (path.parent / name, CSRC / name) if f.is_file()), None)
            if found is None:
                raise FileNotFoundError(
                    f"{includer}: includes {name!r}, which is neither beside it nor in csrc"
                )
            texts[name] = found.read_text()
            todo.append(name)
    return texts


def entries_of(texts: dict[str, str]) -> list[str]:
    """The extern "C" __global__ functions, in order."""
    return list(dict.fromkeys(name for text in texts.values() for name in _ENTRY.findall(text)))
