"""What of SLA2 works on this machine, what is missing, and how to get it. Looks,
changes nothing.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from sla2_eval.runs.extras import how_to_get

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `status`: "works", "missing" (optional), or "broken" (something the
    pipeline needs).
    """

    what: str
    status: str
    detail: str
    get: str = ""

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


_REQUIRED = ("torch", "diffusers", "accelerate", "peft", "tensorboard", "av", "numba", "pydantic")
_OPTIONAL = {  # import name -> what it is for
    "torchmetrics": "PSNR",
    "lpips": "LPIPS",
    "open_clip": "CLIP metrics",
    "timm": "subject consistency",
    "torchvision": "dynamic degree",
    "ray": "several workers or machines",
    "jinja2": "the page of a report",
    "pyiqa": "imaging quality",
    "torchcodec": "faster decoding",
}


def _version(module: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return None
    names = importlib.metadata.packages_distributions().get(module, [module])
    try:
        return importlib.metadata.version(names[0])
    except importlib.metadata.PackageNotFoundError:
        return "present"


def _machine() -> list[Finding]:
    supported = (3, 11) <= sys.version_info[:2] <= (3, 13)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [
        Finding(
            "python",
            "works" if supported else "broken",
            platform.python_version(),
            "" if supported else "3.11-3.13",
        ),
        Finding("processor", "works", f"{platform.machine()}, {cores} cores"),
    ]


def _packages() -> list[Finding]:
    found = []
    for name in _REQUIRED:
        version = _version(name)
        found.append(
            Finding(
                name,
                "works" if version else "broken",
                version or "not installed",
                "" if version else "pip install sla2-eval",
            )
        )
    for name, purpose in _OPTIONAL.items():
        version = _version(name)
        detail = f"{version}, for {purpose}" if version else f"not installed; for {purpose}"
        found.append(
            Finding(
                name,
                "works" if version else "missing",
                detail,
                "" if version else how_to_get(name),
            )
        )
    return found


def _driver() -> Finding:
    """The CUDA version the driver supports, asked of the driver itself."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return Finding(
            "driver",
            "missing",
            "no NVIDIA driver (libcuda)",
            "install the NVIDIA driver, 570 or later",
        )
    number = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(number)):
        return Finding(
            "driver",
            "missing",
            "libcuda is there but does not answer",
            "reinstall the NVIDIA driver",
        )
    return Finding(
        "driver", "works", f"supports CUDA {number.value // 1000}.{number.value % 1000 // 10}"
    )


def _gpu() -> list[Finding]:
    import torch

    found = [_driver()]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            text = (
                f"{about.name}, sm_{about.major}{about.minor}, {about.total_memory / 2**30:.0f} GB"
            )
            found.append(Finding(f"GPU {index}", "works", text))
            found.append(_products(index, about.major, about.minor))
    else:
        found.append(
            Finding(
                "GPU",
                "missing",
                "none that torch can use; everything runs on the CPU",
                "a CUDA GPU",
            )
        )
    extra = "cuda13" if (torch.version.cuda or "13").startswith("13") else "cuda12"
    how = f"pip install 'sla2-kernels[{extra}]'"
    found += [_nvrtc(how), _kernel_cache()]
    cupy = _version("cupy")
    found.append(
        Finding(
            "CuPy", "works" if cupy else "missing", cupy or "not installed", "" if cupy else how
        )
    )
    return found


def _products(index: int, major: int, minor: int) -> Finding:
    """Which instruction multiplies Q K^T and P V in each precision on GPU number `index`, for
    blocks of 128 and 64.
    """
    from sla2_kernels.kernels import (
        Geometry,
        faster_precision,
        has_wgmma,
        products_of,
        supports,
        wgmma_allowed,
    )
    from sla2_kernels.specs import PRECISIONS, architecture_of

    what = f"GPU {index} products"
    try:
        arch = architecture_of(major, minor)
    except RuntimeError as error:
        return Finding(what, "missing", str(error), "a newer GPU")
    wgmma, how = False, ""
    if has_wgmma(arch, Geometry(head_dim=128)):
        wgmma = wgmma_allowed()
        how = ", wgmma (SLA2_WGMMA=0: mma.sync)" if wgmma else ", mma.sync (SLA2_WGMMA is 0)"
    parts = []
    for precision in PRECISIONS:
        if not supports(arch, precision):
            parts.append(f"{precision}: none, no FP8")
            continue
        qk, pv = products_of(arch, precision, wgmma)
        slower = not wgmma and faster_precision(arch, precision) != precision
        note = " (slower than 16 bit, in which forwards without gradients run)" if slower else ""
        parts.append(f"{precision}: {qk if qk == pv else f'{qk} and {pv}'}{note}")
    return Finding(what, "works", f"{arch}{how}: " + "; ".join(parts))


def _nvrtc(how: str) -> Finding:
    from sla2_kernels.compile import find_nvrtc, nvrtc_version

    try:
        path = find_nvrtc()
        return Finding("NVRTC", "works", f"{nvrtc_version(path)}, {path.name}")
    except (RuntimeError, OSError) as error:
        return Finding("NVRTC", "missing", " ".join(str(error).split()), how)


def _kernel_cache() -> Finding:
    from sla2_kernels.artifacts import contents

    held = contents()
    detail = f"{held['folder']}: {held['artifacts']} built kernels, {held['bytes'] / 2**20:.1f} MB"
    if held["damaged"]:
        detail += f", {held['damaged']} damaged ones set aside"
    if not held["writable"]:
        return Finding(
            "kernel cache",
            "missing",
            f"{detail}, cannot be written: built anew in each process",
            "set SLA2_CACHE",
        )
    return Finding("kernel cache", "works", detail)


def _backends() -> list[Finding]:
    """Each backend of the operator, tried on a small input."""
    import torch
    from sla2_core.backends import BACKENDS, Problem, resolve
    from sla2_core.backends.cpu import compile_seconds
    from sla2_core.options import Options

    found = []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, backend in BACKENDS.items():
        try:
            if reason := backend.missing():
                raise RuntimeError(reason)
            _try(name, torch.device(backend.device or "cpu"))
            detail = "runs and agrees with the reference"
            if name == "cpu":
                seconds = sum(compile_seconds().values())
                detail += f"; its kernels took {seconds:.1f} s to compile or to load from the cache"
            found.append(Finding(f"backend {name}", "works", detail))
        except Exception as error:
            status = "missing" if name in ("cuda", "emulator") else "broken"
            found.append(Finding(f"backend {name}", status, " ".join(str(error).split())[:120]))
    options = Options(block_q=128, block_k=64)
    problem = Problem(torch.bfloat16, device, 128, options)
    choice = resolve("auto", problem).name
    found.append(Finding("backend auto", "works", f"takes {choice} here"))
    return found


def _try(backend: str, device: torch.device) -> None:
    """Raise RuntimeError if the backend differs from the reference on a small input."""
    import torch
    from sla2_core import BlockMap
    from sla2_core.functional import block_sparse_attention

    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if backend in ("cuda", "emulator") else torch.float32
    q, k, v = (torch.randn(1, 1, 256, 64, generator=generator).to(device, dtype) for _ in range(3))
    mask = torch.zeros(1, 1, 2, 4, dtype=torch.bool, device=device)
    mask[..., ::2] = True
    blocks = BlockMap.from_mask(mask, block_q=128, block_k=64, n_q=256, n_k=256)
    found, _ = block_sparse_attention(q, k, v, blocks, backend=backend)
    expected, _ = block_sparse_attention(q, k, v, blocks, backend="reference")
    difference = (found - expected).abs().max().item()
    if not difference < 2e-2:
        raise RuntimeError(f"differs from the reference by {difference:.3g}")


def _folders() -> list[Finding]:
    from sla2_eval.scoring import weights
    from sla2_eval.tiny.model import weights_of

    found, folder = [], weights.folder()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    writable, free = os.access(existing, os.W_OK), shutil.disk_usage(existing).free / 2**30
    detail = f"{folder}, {free:.0f} GB free" if writable else f"{folder} cannot be written"
    found.append(
        Finding(
            "cache folder",
            "works" if writable else "missing",
            detail,
            "" if writable else "set SLA2_WEIGHTS",
        )
    )
    present = [row["name"] for row in weights.weights_list() if row["present"]]
    total = len(weights.FILES)
    found.append(
        Finding(
            "metric weights",
            "works" if len(present) == total else "missing",
            f"{len(present)} of {total} files",
            "" if len(present) == total else "sla2 weights list",
        )
    )
    tiny = (weights_of("tiny") / "transformer" / "config.json").is_file()
    how = "" if tiny else "sla2 train teacher --config experiments/tiny_wan/teacher.yaml"
    found.append(
        Finding(
            "tiny model",
            "works" if tiny else "broken",
            "weights present" if tiny else "no weights",
            how,
        )
    )
    compiler = shutil.which("g++") or shutil.which("clang++")
    detail = compiler or "none"
    found.append(
        Finding(
            "C++ compiler",
            "works" if compiler else "missing",
            f"{detail}, for the emulator",
            "" if compiler else "g++",
        )
    )
    return found


def examine() -> list[Finding]:
    """Everything, in the order it is printed; never raises for something missing."""
    found = []
    for part in (_machine, _packages, _gpu, _backends, _folders):
        try:
            found += part()
        except Exception as error:
            found.append(
                Finding(part.__name__.strip("_"), "broken", f"{type(error).__name__}: {error}")
            )
    return found
