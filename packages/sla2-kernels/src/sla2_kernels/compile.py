"""KernelSpec to cubin through NVRTC: the only door to it. Needs no GPU, no driver and no compiler
on the machine.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sla2_kernels.artifacts import get, key_of
from sla2_kernels.sources import gather
from sla2_kernels.specs import KernelSpec

SCHEMA = "nvrtc 2"
# Without the last one, versions before 13.2 take a lambda with `auto` for a function of the host.
_OPTIONS = ("-std=c++17", "--ptxas-options=-v", "--device-as-default-execution-space")


@dataclass(frozen=True)
class Resources:
    """What ptxas says of a kernel.

    Attributes:
        registers: of a thread.
        spill_stores, spill_loads: bytes.
        stack: bytes of a thread.
        shared: bytes of static shared memory of a block.
    """

    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int


@dataclass(frozen=True)
class Compiled:
    """A cubin in the cache, and what each of its kernels uses.

    Attributes:
        kernels: by the entry's name.
        warnings: what ptxas says of lost performance, such as wgmma that it serialises: its lines
            with a code C75xx, for the whole source.
    """

    path: Path
    key: str
    kernels: dict[str, Resources]
    warnings: tuple[str, ...] = ()


def _candidates() -> list[Path]:
    """NVRTC libraries of the nvidia wheels (CUDA 13: nvidia/cu13/lib, 12: nvidia/cuda_nvrtc/lib)
    and of CUDA_PATH.
    """
    patterns = (
        "cu[0-9]*/lib/libnvrtc.so.*",
        "cuda_nvrtc/lib/libnvrtc.so.*",
        "cu[0-9]*/bin/**/nvrtc64_*.dll",
        "cuda_nvrtc/bin/nvrtc64_*.dll",
    )
    roots: list[tuple[Path, tuple[str, ...]]] = []
    roots += [(Path(root), patterns) for root in _nvidia_roots()]
    roots += [
        (Path(root), ("lib64/libnvrtc.so.*", "lib/libnvrtc.so.*", "bin/nvrtc64_*.dll"))
        for root in (os.environ.get("CUDA_PATH"), os.environ.get("CUDA_HOME"), "/usr/local/cuda")
        if root
    ]
    found = []
    for root, globs in roots:
        for pattern in globs:
            found += [
                p
                for p in sorted(root.glob(pattern), reverse=True)
                if "alt" not in p.name and "builtins" not in p.name
            ]
    return found


def _nvidia_roots() -> list[str]:
    spec = importlib.util.find_spec("nvidia")
    return list(spec.submodule_search_locations or ()) if spec else []


def find_nvrtc() -> Path:
    """The NVRTC library: $SLA2_NVRTC, else the newest that the driver can follow.

    It is looked for in the nvidia wheels and in the CUDA toolkit.

    Raises:
        RuntimeError: there is none, or $SLA2_NVRTC is no file.
    """
    if chosen := os.environ.get("SLA2_NVRTC"):
        if not Path(chosen).is_file():
            raise RuntimeError(
                f"SLA2_NVRTC: expected the NVRTC library, got {chosen!r}, which is no file"
            )
        return Path(chosen)
    found = _candidates()
    if not found:
        raise RuntimeError(
            "NVRTC is not installed; pip install 'sla2-kernels[cuda13]' (or [cuda12])"
        )
    newest_first = sorted(found, key=_major, reverse=True)
    return next(
        (path for path in newest_first if _major(path) <= _driver_major()), newest_first[-1]
    )


def _major(path: Path) -> int:
    numbers = re.findall(r"(?:so\.|nvrtc64_)(\d\d)", path.name)
    return int(numbers[0]) if numbers else 99


@cache
def _driver_major() -> int:
    """The CUDA major version that the driver supports; 99 without a driver."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return 99
    number = ctypes.c_int()
    return 99 if library.cuDriverGetVersion(ctypes.byref(number)) else number.value // 1000


@cache
def _library(path: Path) -> ctypes.CDLL:
    # NVRTC opens its builtins by name alone, and the wheels of CUDA 13.0 name no folder to look in.
    for builtins in sorted(path.resolve().parent.glob("libnvrtc-builtins.so*")):
        ctypes.CDLL(str(builtins))
    library = ctypes.CDLL(str(path))
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library


@cache
def nvrtc_version(path: Path) -> str:
    """ "major.minor" of an NVRTC library."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _library(path).nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def options_of(spec: KernelSpec) -> tuple[str, ...]:
    """The options NVRTC gets: language, architecture, definitions.

    No fast math, and subnormals are kept.
    """
    return (*_OPTIONS, f"--gpu-architecture={spec.arch}", *spec.definitions)


def kernel_key(spec: KernelSpec) -> str:
    """The cache key: sources with every header they reach, options and NVRTC's version."""
    parts = [SCHEMA, nvrtc_version(find_nvrtc()), *options_of(spec)]
    return key_of(parts + [text for pair in gather(spec.path).items() for text in pair])


def compile_kernel(spec: KernelSpec) -> Compiled:
    """The cubin of a spec, from the cache or compiled now (about a tenth of a second).

    Raises:
        RuntimeError: NVRTC is missing, or says why the source does not compile (its first lines).
        FileNotFoundError: a header is nowhere.
    """
    texts, nvrtc = gather(spec.path), find_nvrtc()
    parts = [SCHEMA, nvrtc_version(nvrtc), *options_of(spec)]
    key = key_of(parts + [text for pair in texts.items() for text in pair])
    entry = get(key, ".cubin", lambda: _build(spec, texts, nvrtc))
    kernels = {name: Resources(**numbers) for name, numbers in entry.notes["kernels"].items()}
    return Compiled(entry.path, key, kernels, tuple(entry.notes["warnings"]))


def _build(spec: KernelSpec, texts: dict[str, str], nvrtc: Path) -> tuple[bytes, dict[str, Any]]:
    cubin, log = _nvrtc(nvrtc, texts, options_of(spec))
    kernels = {name: asdict(numbers) for name, numbers in parse_log(log).items()}
    return cubin, {
        "source": spec.path.name,
        "options": options_of(spec),
        "nvrtc": nvrtc_version(nvrtc),
        "kernels": kernels,
        "warnings": parse_warnings(log),
    }


def _nvrtc(path: Path, texts: dict[str, str], options: tuple[str, ...]) -> tuple[bytes, str]:
    """Compile the first of `texts`, the others being its headers -> (cubin, log)."""
    library = _library(path)

    def check(code: int, what: str) -> None:
        if code:
            raise RuntimeError(
                f"NVRTC {nvrtc_version(path)}: {what}: {library.nvrtcGetErrorString(code).decode()}"
            )

    def fetch(name: str, what: str) -> bytes:
        size = ctypes.c_size_t()
        check(getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)), name)
        buffer = ctypes.create_string_buffer(size.value)
        check(getattr(library, f"nvrtcGet{what}")(program, buffer), name)
        return buffer.raw

    (name, text), *headers = [(name.encode(), text.encode()) for name, text in texts.items()]
    strings = ctypes.c_char_p * len(headers)
    program = ctypes.c_void_p()
    code = library.nvrtcCreateProgram(
        ctypes.byref(program),
        text,
        name,
        len(headers),
        strings(*[h[1] for h in headers]),
        strings(*[h[0] for h in headers]),
    )
    check(code, name.decode())
    try:
        arguments = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
        code = library.nvrtcCompileProgram(program, len(options), arguments)
        log = fetch(name.decode(), "ProgramLog").rstrip(b"\0").decode(errors="replace")
        if code:
            errors = [
                line for line in log.splitlines() if "error" in line.lower()
            ] or log.splitlines()
            raise RuntimeError(
                f"NVRTC {nvrtc_version(path)}: {name.decode()}: " + " | ".join(errors[:3])
            )
        return fetch(name.decode(), "CUBIN"), log
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def parse_log(log: str) -> dict[str, Resources]:
    """What ptxas -v says of each kernel.

    Raises:
        RuntimeError: it says nothing that can be read.
    """
    found: dict[str, Resources] = {}
    for part in re.split(r"Compiling entry function '", log)[1:]:
        name = part.split("'", 1)[0]
        part = part.split("Compiling entry function", 1)[0]
        numbers = {
            key: int(match[1]) if (match := re.search(pattern, part)) else 0
            for key, pattern in {
                "registers": r"Used (\d+) registers",
                "spill_stores": r"(\d+) bytes spill stores",
                "spill_loads": r"(\d+) bytes spill loads",
                "stack": r"(\d+) bytes stack frame",
                "shared": r"(\d+) bytes smem",
            }.items()
        }
        found[name] = Resources(**numbers)
    if not found or not all(resources.registers for resources in found.values()):
        raise RuntimeError(f"ptxas: expected a report of registers, got {log[:200]!r}")
    return found


def parse_warnings(log: str) -> list[str]:
    """The lines of ptxas about lost performance, C7500 to C7599."""
    return [" ".join(line.split()) for line in log.splitlines() if re.search(r"\(C75\d\d\)", line)]
