"""Builds a kernel's sources into a shared library for the CPU: g++, clang++ or the compiler of the
ziglang package.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from sla2_kernels.artifacts import Artifact, get, key_of
from sla2_kernels.sources import entries_of, gather
from sla2_kernels.specs import KernelSpec

SCHEMA = "emulator 1"
INCLUDE = Path(__file__).parent / "include"
SANITIZERS = ("", "address", "thread")
# Not -O2: a test compiles for longer than it runs.
_FLAGS = (
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-shared",
    "-pthread",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-w",
)


@cache
def compiler() -> tuple[str, ...]:
    """The command of the C++ compiler: $SLA2_CXX, else g++, clang++ or that of ziglang.

    Raises:
        RuntimeError: there is none; says what to install.
    """
    if chosen := os.environ.get("SLA2_CXX"):
        return tuple(chosen.split())
    for name in ("g++", "clang++"):
        if path := shutil.which(name):
            return (path,)
    if importlib.util.find_spec("ziglang"):
        return (sys.executable, "-m", "ziglang", "c++")
    raise RuntimeError(
        "emulator: needs a C++ compiler; install g++, or pip install 'sla2-kernels[emulator]'"
    )


def _call(command: list[str], folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the compiler, without the sanitizer library that this process may have preloaded."""
    env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


@cache
def _version(command: tuple[str, ...]) -> str:
    done = _call([*command, "--version"])
    return done.stdout.splitlines()[0] if done.stdout else "unknown"


def sanitizer_library(name: str) -> str | None:
    """The library to preload where $SLA2_EMULATOR_SANITIZE is `name`; None if there is none."""
    file = {"address": "libasan.so", "thread": "libtsan.so"}[name]
    found = _call([*compiler(), f"-print-file-name={file}"]).stdout.strip()
    return found if Path(found).is_absolute() else None


def sanitizer() -> str:
    """$SLA2_EMULATOR_SANITIZE: "", "address" or "thread" (g++ only, with its library preloaded).

    Raises:
        ValueError: another value.
    """
    chosen = os.environ.get("SLA2_EMULATOR_SANITIZE", "")
    if chosen not in SANITIZERS:
        raise ValueError(
            f"SLA2_EMULATOR_SANITIZE: expected address, thread or nothing, got {chosen!r}"
        )
    return chosen


def build(spec: KernelSpec) -> Artifact:
    """The shared library with every kernel of the spec's source, from the cache or built now.

    Raises:
        RuntimeError: no compiler, or its first error lines.
        FileNotFoundError: a header is nowhere.
    """
    texts = gather(spec.path)
    command, flags = compiler(), [*_FLAGS, *spec.definitions, "-DSLA2_EMULATOR=1"]
    if chosen := sanitizer():
        flags += [f"-fsanitize={chosen}", "-g", "-O1", "-fno-omit-frame-pointer"]
    own = {path.name: path.read_text() for path in sorted(INCLUDE.iterdir())}
    parts = [SCHEMA, _version(command), platform.machine(), *flags]
    parts += [text for pair in (*texts.items(), *own.items()) for text in pair]
    return get(key_of(parts), ".so", lambda: _compile(command, flags, texts, own, spec))


def _compile(
    command: Sequence[str],
    flags: Sequence[str],
    texts: dict[str, str],
    own: dict[str, str],
    spec: KernelSpec,
) -> tuple[bytes, dict[str, Any]]:
    entries = entries_of(texts)
    table = "".join(f'    sla2::entry("{name}", {name}),\n' for name in entries)
    unit = (
        f'#include "emulated_ptx.h"\n#include "emulated_launch.h"\n#include "{spec.path.name}"\n'
        f"const sla2::Entry sla2_entries[] = {{\n{table}    {{}}}};\n"
    )
    with tempfile.TemporaryDirectory(prefix="sla2-emulator-") as name:
        folder = Path(name)
        for file, text in {**own, **texts, "unit.cpp": unit}.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text)
        sources = ["unit.cpp"]
        if platform.machine() in ("x86_64", "AMD64") and sys.platform.startswith("linux"):
            sources.append("switch_x86_64.S")
        done = _call([*command, *flags, "-I.", *sources, "-o", "unit.so"], folder)
        if done.returncode:
            errors = [
                text for text in done.stderr.splitlines() if "error" in text
            ] or done.stderr.splitlines()
            raise RuntimeError(
                f"emulator: {spec.path.name} does not compile: " + " | ".join(errors[:3])
            )
        return (folder / "unit.so").read_bytes(), {
            "source": spec.path.name,
            "entries": entries,
            "flags": flags,
        }
