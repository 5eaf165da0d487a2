"""SLA2 on the CPU, everything counted, against torch's scaled_dot_product_attention in the same
process.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.timing import interleave

if TYPE_CHECKING:
    import torch
    from sla2_core import SLA2Attention

    Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Case = Callable[[], object]

COLUMNS = (
    "dtype",
    "d",
    "n",
    "sparsity",
    "case",
    "median",
    "low",
    "high",
    "speedup",
    "cpu_speedup",
    "roofline",
    "peak_mb",
)

BLOCK_Q, BLOCK_K = 128, 64
LENGTHS, DIMS, SPARSITIES = (4096, 8192, 16384, 32760), (64, 128), (0.90, 0.95, 0.97)


def measure(report: Callable[[str, int, int], None], quick: bool) -> dict:
    """Every dtype, head dimension, length and sparsity -> {"suite", "hardware", "rates",
    "settings", "rows", "stages"}.

    One head, batch 1. SLA2Attention with a learned router: smoothing, pooling, routing, both
    branches and mixing count, compiling does not; "pooled" is the same layer with the pooled
    complement, at the highest sparsity. Rows: median, low, high (ms, quartiles, wall
    clock, cases interleaved), speedup over SDPA of the same direction by wall clock and by CPU time
    of the process (which other processes disturb less), roofline (ms: FLOPs of the cost model with
    the masked sum, three times that with the backward, over torch's measured GEMM rate in this
    dtype), and peak memory above the inputs (MB). `quick`: d = 128 only, SDPA only at the longest
    N, SLA2 at all of them.
    """
    import torch

    repetitions = 3 if quick else 5
    rates = _rates()
    rows, stages = [], {}
    load = os.getloadavg() if hasattr(os, "getloadavg") else None
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for d in DIMS[1:] if quick else DIMS:
            for n in LENGTHS:
                dense = not quick or n == LENGTHS[-1]
                sparsities = (
                    SPARSITIES[::2]
                    if quick and dense
                    else (SPARSITIES[-1:] if quick else SPARSITIES)
                )
                rows += _setting(
                    dtype,
                    d,
                    n,
                    sparsities,
                    dense,
                    repetitions,
                    rates,
                    partial(report, f"{name} d={d} N={n}"),
                )
        stages[name] = _shares(dtype, LENGTHS[-1], DIMS[-1])
    settings = {
        "block_q": BLOCK_Q,
        "block_k": BLOCK_K,
        "heads": 1,
        "batch": 1,
        "repetitions": repetitions,
    }
    hardware = _hardware() | {"load_before": load, "load_after": os.getloadavg() if load else None}
    return {
        "suite": "cpu",
        "hardware": hardware,
        "rates": rates,
        "settings": settings,
        "rows": rows,
        "stages": stages,
    }


def _hardware() -> dict:
    import datetime
    import importlib.metadata

    import torch

    info = Path("/proc/cpuinfo")
    names = (
        [
            line.split(":")[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        if info.exists()
        else []
    )
    versions = {
        name: importlib.metadata.version(name) for name in ("torch", "numba", "sla2-kernels")
    }
    return {
        "cpu": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _rates() -> dict[str, float]:
    """torch's GEMM rate, FLOP/s, the best of several."""
    import torch

    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(2048, 2048).to(dtype)
        best = min(_seconds(lambda a=a: a @ a)[0] for _ in range(6))
        found[str(dtype).removeprefix("torch.")] = 2 * 2048**3 / best
    return found


def _seconds(function: Callable[[], object]) -> tuple[float, float]:
    """(wall clock, CPU time of this process) of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


def _module(d: int, sparsity: float, complement: str = "linear") -> SLA2Attention:
    from sla2_core import SLA2Attention, SLA2Config

    sizes = dict(head_dim=d, num_heads=1, block_q=BLOCK_Q, block_k=BLOCK_K)
    return SLA2Attention(SLA2Config(**sizes, topk=1 - sparsity, complement=complement))


def _cases(
    dtype: torch.dtype, d: int, n: int, sparsities: Sequence[float], dense: bool
) -> dict[str, Case]:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(1, 1, n, d, generator=generator).to(dtype) for _ in range(4))
    for x in (q, k, v):
        x.requires_grad_()

    def forward(attend: Attention) -> None:
        with torch.no_grad():
            attend(q, k, v)

    def both(attend: Attention) -> None:
        torch.autograd.grad(attend(q, k, v), (q, k, v), grad)

    cases: dict[str, Case] = {}
    for label, run in (("forward", forward), ("forward + backward", both)):
        if dense:
            cases[f"SDPA {label}"] = partial(run, scaled_dot_product_attention)
        for sparsity in sparsities:
            cases[f"SLA2 {label} {sparsity:.0%}"] = partial(run, _module(d, sparsity))
        most = max(sparsities)
        cases[f"pooled {label} {most:.0%}"] = partial(run, _module(d, most, "pooled"))
    return cases


def _setting(
    dtype: torch.dtype,
    d: int,
    n: int,
    sparsities: Sequence[float],
    dense: bool,
    repetitions: int,
    rates: dict[str, float],
    report: Callable[[int, int], None],
) -> list[dict]:
    name = str(dtype).removeprefix("torch.")
    cases = _cases(dtype, d, n, sparsities, dense)
    cpu: dict[int, list[float]] = {}

    def clock(case: Case) -> float:
        wall, used = _seconds(case)
        cpu.setdefault(id(case), []).append(used)
        return 1e3 * wall

    found = interleave(cases, clock, repetitions, warmups=1, report=report)
    rows: list[dict] = []
    for label, case in cases.items():
        what, direction = label.split(" ", 1)
        row = {
            "dtype": name,
            "d": d,
            "n": n,
            "sparsity": 0.0,
            "case": f"{what} {direction}",
            **found[label],
        }
        row["cpu"] = 1e3 * sorted(cpu[id(case)][1:])[repetitions // 2]
        if what != "SDPA":
            direction, share = direction.rsplit(" ", 1)
            row |= {"sparsity": float(share.rstrip("%")) / 100, "case": f"{what} {direction}"}
            complement = "pooled" if what == "pooled" else "linear"
            flops = _flops(n, d, row["sparsity"], "backward" in direction, complement)
            row["roofline"] = 1e3 * flops / rates[name]
            base = next((r for r in rows if r["case"] == f"SDPA {direction}"), None)
            if base:
                row |= {
                    "speedup": base["median"] / row["median"],
                    "cpu_speedup": base["cpu"] / row["cpu"],
                }
                ratios = (base["low"] / row["high"], base["high"] / row["low"])
                row |= {"speedup_low": ratios[0], "speedup_high": ratios[1]}
            if n == LENGTHS[-1] and d == DIMS[-1]:
                row["peak_mb"] = _peak(name, d, n, label)
        rows.append(row)
    return rows


def _flops(n: int, d: int, sparsity: float, backward: bool, complement: str) -> float:
    """The cost model and the linear branch's masked sum over blocks; the backward counts twice the
    forward.
    """
    from sla2_core.cost import sla2_cost

    sizes = dict(n_q=n, n_k=n, num_heads=1, head_dim=d, block_q=BLOCK_Q, block_k=BLOCK_K)
    cost = sla2_cost(**sizes, topk=1 - sparsity, complement=complement)
    masked = 2.0 * -(-n // BLOCK_Q) * -(-n // BLOCK_K) * d * (d + 1)
    masked = masked if complement == "linear" else 0.0
    return (cost.flops + masked) * (3 if backward else 1)


def _peak(dtype: str, d: int, n: int, label: str) -> float | None:
    """Peak resident memory of a call above that before it, MB, in a fresh process; None where the
    system does not say.
    """
    import subprocess
    import sys

    code = f"from benchmarks.bench_cpu import peak; print(peak({dtype!r}, {d}, {n}, {label!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    return float(done.stdout) if done.returncode == 0 else None


def peak(dtype: str, d: int, n: int, label: str) -> float:
    """What _peak measures, in this process: one small call first, so that compiling
    does not count.
    """
    import torch

    def case(length: int) -> Case:
        return _cases(
            getattr(torch, dtype), d, length, (float(label.split()[-1].rstrip("%")) / 100,), False
        )[label]

    case(256)()
    run = case(n)
    Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status")

    def field(name: str) -> int:
        return next(
            int(line.split()[1])
            for line in status.read_text().splitlines()
            if line.startswith(name)
        )

    before = field("VmRSS")
    run()
    return (field("VmHWM") - before) / 1024


def _shares(dtype: torch.dtype, n: int, d: int) -> dict[str, float]:
    """Share of the time of one forward + backward at 97 % by kernel; "other" is torch
    and the glue.
    """
    from sla2_core.backends.cpu import stages as cpu_stages

    case = _cases(dtype, d, n, (0.97,), False)["SLA2 forward + backward 97%"]
    with cpu_stages() as stages:
        total = _seconds(case)[0]
    return {name: seconds / total for name, seconds in stages.items()} | {
        "other": 1 - sum(stages.values()) / total
    }


def plot(result: dict, path: Path) -> None:
    """Measured against modelled time over N at 97 %, one curve a dtype and direction, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for colour, direction in (("tab:blue", "forward"), ("tab:orange", "forward + backward")):
        for dtype, style in (("float32", "-"), ("bfloat16", "--")):
            rows = [
                r
                for r in result["rows"]
                if r["case"] == f"SLA2 {direction}"
                and r["dtype"] == dtype
                and r["d"] == DIMS[-1]
                and r["sparsity"] == 0.97
                and "median" in r
            ]
            n = [r["n"] for r in rows]
            spread = [
                [r["median"] - r["low"] for r in rows],
                [r["high"] - r["median"] for r in rows],
            ]
            axes.errorbar(
                n,
                [r["median"] for r in rows],
                spread,
                fmt=f"o{style}",
                color=colour,
                label=f"{direction}, {dtype}",
            )
            axes.plot(n, [r["roofline"] for r in rows], f"x{style}", color=colour, alpha=0.4)
    axes.set(xscale="log", yscale="log", xlabel="tokens N", ylabel="ms")
    axes.set_title(
        "SLA2 on the CPU, 97 %: measured (dots), FLOPs over torch's GEMM rate (crosses)",
        fontsize=10,
    )
    axes.legend(fontsize=8)
    FigureCanvasAgg(figure).print_png(str(path))
