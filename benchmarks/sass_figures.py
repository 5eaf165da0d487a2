"""What each kernel's code consists of, written to benchmarks/results/sass.json:
`python -m benchmarks.sass_figures`, or with parts of kernels' names for those alone. The compile
gate holds kernels to it, the model of times counts with it, and its change belongs into the commit
that changes a kernel.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "results" / "sass.json"
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a")
HEAD_DIM, DTYPE = 128, "bfloat16"


def name_of(spec: Any) -> str:
    """A kernel in the file: its entry and precision, such as "sla2_sparse_fwd full"."""
    return f"{spec.entry} {spec.label.split()[-1]}"


def specs_of(arch: str) -> list[Any]:
    """The kernels of the file: those for head dimension 128 in bfloat16."""
    from sla2_kernels.kernels import all_specs

    return [spec for spec in all_specs(arch) if f"d{HEAD_DIM} {DTYPE}" in spec.label]


def figures_of(spec: Any) -> dict[str, Any]:
    """Registers and instructions of a kernel, compiled and disassembled here."""
    from sla2_kernels.compile import compile_kernel
    from sla2_kernels.sass import code_of

    built = compile_kernel(spec)
    code = code_of(built)[spec.entry]
    found = {"registers": built.kernels[spec.entry].registers, "instructions": code.instructions}
    if loop := code.loop:
        found |= {"loop": loop.instructions, "rare": loop.rare}
        found |= {"tensor": loop.tensor} if loop.tensor else {}
        found |= {"inner": list(loop.inner)} if loop.inner[1] else {}
    return found


def read() -> dict[str, Any]:
    """The committed file: {"nvrtc", "figures": {arch: {name: figures}}}."""
    return json.loads(FILE.read_text())


def main(parts: list[str]) -> None:
    """Write the file, a kernel a line; those whose names hold none of `parts` stay as they are."""
    from sla2_kernels.compile import find_nvrtc, nvrtc_version

    old = read()["figures"] if parts else {}
    lines = []
    for arch in ARCHS:
        found = {
            name_of(spec): figures_of(spec)
            for spec in specs_of(arch)
            if not parts or any(part in spec.entry for part in parts)
        }
        kept = old.get(arch, {})
        rows = [
            f"   {json.dumps(name)}: {json.dumps(found.get(name) or kept[name])}"
            for name in map(name_of, specs_of(arch))
        ]
        lines.append(f'  "{arch}": {{\n' + ",\n".join(rows) + "\n  }")
    head = f'{{\n "nvrtc": "{nvrtc_version(find_nvrtc())}",\n "figures": {{\n'
    FILE.write_text(head + ",\n".join(lines) + "\n }\n}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
