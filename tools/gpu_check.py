"""Checks and times the kernels on this machine's GPU: tests marked gpu, compute-sanitizer on tiny
shapes, the paper's bench.

Runs under a plain python3 with torch, numpy, click and CuPy, from the checkout; where pytest is
missing, pip puts it into .cache/gpu-check. Writes one JSON file and ends with 0 only if everything
passed.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [str(path) for path in sorted((ROOT / "packages").glob("*/src"))]
TINY = [  # heads, n_q, n_k, head_dim, dtype, precision: each kernel once, odd lengths
    (1, 200, 111, 64, "bfloat16", "full"),
    (1, 63, 200, 48, "bfloat16", "full"),
    (2, 63, 200, 128, "float16", "full"),
    (1, 130, 200, 128, "bfloat16", "int8_int8"),
    (1, 130, 200, 64, "bfloat16", "int8"),
]


def environment() -> dict[str, str]:
    """This process's, with the packages' sources and what prepare() fetched on PYTHONPATH."""
    paths = [*SOURCES, os.environ.get("PYTHONPATH", ""), str(ROOT / ".cache" / "gpu-check")]
    path = os.pathsep.join(p for p in paths if p)
    return os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}


def missing() -> str | None:
    """One line naming what this machine lacks, None if nothing."""
    for name in ("torch", "numpy", "click"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed for {sys.executable}"
    sys.path[:0] = SOURCES
    from sla2_kernels.launch import missing_for_cuda

    return missing_for_cuda()


def call(command: list[str], minutes: float, **more: str) -> tuple[int, str, float]:
    """Exit code (124 after the time limit), output and seconds of a command run in the checkout,
    `more` in its environment.
    """
    start = time.monotonic()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment() | more,
            timeout=60 * minutes,
            text=True,
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        return done.returncode, done.stdout, time.monotonic() - start
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        return (
            124,
            output if isinstance(output, str) else output.decode(errors="replace"),
            time.monotonic() - start,
        )


def outcome(code: int, output: str, seconds: float, **more) -> dict:
    """A part's entry in the results, with its output only where it failed."""
    entry = {"passed": code == 0, "seconds": round(seconds, 1), **more}
    return entry if code == 0 else entry | {"exit_code": code, "output": output}


def kernel_tests() -> dict:
    """The emulator's kernel tests on the GPU, over pinned memory that both sides read, so that each
    launch is waited for.
    """
    return run_tests(sorted(ROOT.glob("tests/kernels/test_kernels_*.py")), CUDA_LAUNCH_BLOCKING="1")


def operator_tests() -> dict:
    """The GPU's own tests, and the custom ops' on CUDA."""
    names = "kernels/test_gpu", "core/backends/test_cuda_ops", "core/backends/test_cuda_pooled"
    return run_tests([ROOT / "tests" / f"{name}.py" for name in names])


def run_tests(files: list[Path], **more: str) -> dict:
    """What is marked gpu in these files, `more` in the environment. Fetches pytest into
    .cache/gpu-check if this Python has none.

    Files go by name, so that none is imported that needs more than torch: an error there would end
    the whole run.
    """
    if (
        importlib.util.find_spec("pytest") is None
        and not (ROOT / ".cache" / "gpu-check" / "pytest").is_dir()
    ):
        target = str(ROOT / ".cache" / "gpu-check")
        code, output, seconds = call(
            [sys.executable, "-m", "pip", "install", "-q", "--target", target, "pytest"], 5
        )
        if code:
            return outcome(
                code, output, seconds, what="pytest is not installed and could not be fetched"
            )
    names = [str(path.relative_to(ROOT)) for path in files]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "--tb=short",
        *names,
    ]
    code, output, seconds = call(command, 60, SLA2_TEST_TARGET="cuda", **more)
    counts = {
        name: int(number)
        for number, name in re.findall(r"(\d+) (passed|failed|skipped|error)", output)
    }
    if code == 0 and not counts.get("passed"):
        code = 5
    return outcome(code, output, seconds, counts=counts)


def run_sanitizer(tool: str) -> dict:
    """compute-sanitizer's memcheck or racecheck over the tiny shapes; "skipped" where it is not
    installed.
    """
    folders = [
        f
        for f in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
        if f
    ]
    places = [os.environ.get("PATH", "")] + [
        f"{f}/{sub}" for f in folders for sub in ("bin", "compute-sanitizer")
    ]
    path = shutil.which("compute-sanitizer", path=os.pathsep.join(places))
    if path is None:
        return {"passed": True, "skipped": "compute-sanitizer is not installed"}
    command = [path, "--tool", tool, "--error-exitcode", "9"]
    if (
        tool == "memcheck"
    ):  # errors that libraries ask for and handle, such as an attribute nobody has, are not ours
        command += ["--report-api-errors", "no"]
    # Without torch's pool each tensor is an allocation of its own, so that one past its end is
    # outside.
    return outcome(
        *call(
            [*command, sys.executable, __file__, "--tiny"], 30, PYTORCH_NO_CUDA_MEMORY_CACHING="1"
        )
    )


def run_bench(quick: bool) -> dict:
    """`sla2 bench --suite paper`; its rows go into the results as they are."""
    file = ROOT / ".cache" / "gpu-check-bench.json"
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "sla2_eval.cli.main",
        "bench",
        "--suite",
        "paper",
        "--out",
        str(file),
    ]
    code, output, seconds = call(command + ["--quick"] * quick, 60)
    return outcome(
        code, output, seconds, result=json.loads(file.read_text()) if file.is_file() else None
    )


def tiny() -> None:
    """Every kernel, forward and backward, on shapes of a few blocks; fails if an output is not
    finite. By mma.sync too where wgmma would run it.
    """
    sys.path[:0] = SOURCES
    from dataclasses import replace

    import torch
    from sla2_kernels.backward import backward
    from sla2_kernels.forward import forward, route
    from sla2_kernels.hopper import takes
    from sla2_kernels.kernels import supports
    from sla2_kernels.launch import Pointer
    from sla2_kernels.prepare import pool
    from sla2_kernels.problem import Alpha, Device, Problem, Strided
    from sla2_kernels.specs import architecture_of

    def pointer(tensor):
        return Pointer(tensor.data_ptr(), tensor)

    def allocate(shape, dtype):
        return pointer(torch.empty(shape, dtype=getattr(torch, dtype), device="cuda"))

    arch = architecture_of(*torch.cuda.get_device_capability())
    device = Device(allocate=allocate, arch=arch, stream=torch.cuda.current_stream().cuda_stream)
    for heads, n_q, n_k, d, dtype, precision in TINY:
        if not supports(arch, precision):
            continue
        torch.manual_seed(0)
        tensors = (
            torch.randn(1, heads, n, d, device="cuda").to(getattr(torch, dtype))
            for n in (n_q, n_k, n_k, n_q)
        )
        q, k, v, grad = (Strided(pointer(x), x.stride()[:3]) for x in tensors)
        problem = Problem(
            batch=1, heads=heads, n_q=n_q, n_k=n_k, head_dim=d, dtype=dtype, precision=precision
        )
        weight = pointer(torch.eye(d, device="cuda")[None].contiguous())
        made = pool(device, problem, q, k, v, pooled=True)
        block_map, _, _ = route(
            device, problem, made.pooled_q, made.pooled_k, weight, weight, 1, 0.5
        )
        alpha = Alpha.of(pointer(torch.full((1, heads, 1), 0.8, device="cuda")), (1, heads, 1))
        if takes(device, problem):
            plain = replace(device, wgmma=False)
            saved = forward(plain, problem, q, k, v, block_map, alpha, made=made, save=True)
            backward(plain, problem, saved, grad)
        saved = forward(device, problem, q, k, v, block_map, alpha, made=made, save=True)
        found = backward(device, problem, saved, grad)
        torch.cuda.synchronize()
        for name, tensor in {
            "O": saved.out,
            "dQ": found.d_q,
            "dK": found.d_k,
            "dV": found.d_v,
        }.items():
            if not tensor.owner.isfinite().all():
                raise SystemExit(
                    f"{name} is not finite for {n_q} x {n_k}, d {d}, {dtype}, {precision}"
                )


def machine() -> dict:
    """GPU, driver, versions and date."""
    sys.path[:0] = [*SOURCES, str(ROOT)]
    import torch
    from sla2_kernels.compile import find_nvrtc, nvrtc_version

    from benchmarks.bench_paper import hardware

    return hardware() | {"nvrtc": nvrtc_version(find_nvrtc()), "torch_cuda": torch.version.cuda}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, help="JSON file; default benchmarks/results/<gpu>-<date>.json"
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer settings and repetitions of the benchmark"
    )
    parser.add_argument(
        "--skip",
        action="append",
        default=[],
        choices=["kernels", "operator", "memcheck", "racecheck", "bench"],
    )
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="only run every kernel once (what compute-sanitizer watches)",
    )
    arguments = parser.parse_args()
    if lacks := missing():
        print(f"gpu-check: {lacks}", file=sys.stderr)
        return 1
    if arguments.tiny:
        tiny()
        return 0
    about = machine()
    parts = {
        "kernels": kernel_tests,
        "operator": operator_tests,
        "memcheck": lambda: run_sanitizer("memcheck"),
        "racecheck": lambda: run_sanitizer("racecheck"),
        "bench": lambda: run_bench(arguments.quick),
    }
    gpu = re.sub(r"[^a-z0-9]+", "-", about["gpu"].lower()).strip("-")
    out = arguments.out or ROOT / "benchmarks" / "results" / f"{gpu}-{about['date']}.json"
    chosen = {name: part for name, part in parts.items() if name not in arguments.skip}
    return int(not check(about, chosen, out))


def check(about: dict, parts: dict[str, Callable[[], dict]], out: Path) -> bool:
    """Run the parts in turn; what is done is in `out` after each, and a failed part's output in a
    log beside it.
    """
    results = {
        "machine": about,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        found = part()
        if not found["passed"]:
            out.with_name(f"{out.stem}-{name}.log").write_text(found["output"])
            found["output"] = found["output"][-4000:]
        results[name] = found
        out.write_text(json.dumps(results, indent=1) + "\n")
        print(
            f"{name}: {found.get('skipped') or ('passed' if found['passed'] else 'FAILED')}",
            flush=True,
        )
    print(out)
    return all(results[name]["passed"] for name in parts)


if __name__ == "__main__":
    sys.exit(main())
