"""How long each stage should take on a GPU that is not here, from its launches, bytes, FLOPs and
compiled instructions. docs/gpu-model.md has the formulae. Everything it says is modelled.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import sass_figures

if TYPE_CHECKING:
    from sla2_kernels.problem import Problem
    from sla2_kernels.record import Launch

COLUMNS = (
    "gpu",
    "precision",
    "stage",
    "launches",
    "MB",
    "memory",
    "issue",
    "tensor",
    "ms",
    "measured",
)
SHAPE = {"n": 32760, "heads": 12, "sparsity": 0.97}  # the paper's: Wan2.1 1.3B at 480p
BACKWARD_SPARSITY = 0.95  # at which others give theirs
PRECISIONS = ("full", "int8", "int8_int8")
MMA_FLOPS = 4096  # of a warp's m16n8k16 instruction; m16n8k32 on 8 bit has twice as many
LAUNCH_SECONDS = 2.5e-6  # from one kernel's end to the next one's start
EXPOSED = 0.7  # of the shorter of issue and tensor, where wgmma multiplies
SCHEDULERS = 4  # of a multiprocessor; each issues a warp's instruction a clock


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """What a GPU does, of which the model knows no more.

    Attributes:
        arch: what kernels are compiled for.
        multiprocessors: how many.
        clock: sustained, in Hz.
        bandwidth: of its memory, reached, in bytes a second.
        half, int8, fp8: dense FLOP a clock and multiprocessor that `mma.sync` reaches on 16-bit,
            int8 and E4M3 operands with fp32 or int32 sums.
        wgmma: the same by `wgmma` on 16-bit operands, half of what 8-bit ones have. 0: none.
    """

    arch: str
    multiprocessors: int
    clock: float
    bandwidth: float
    half: float
    int8: float
    fp8: float
    wgmma: float = 0.0


# docs/gpu-model.md says where these come from.
GPUS = {
    "H100": Gpu(
        arch="sm_90a",
        multiprocessors=132,
        clock=1.7e9,
        bandwidth=3.0e12,
        half=0.62 * 4096,
        int8=0.62 * 8192,
        fp8=0.62 * 4096,
        wgmma=4096,
    ),
    "H200": Gpu(
        arch="sm_90a",
        multiprocessors=132,
        clock=1.7e9,
        bandwidth=4.3e12,
        half=0.62 * 4096,
        int8=0.62 * 8192,
        fp8=0.62 * 4096,
        wgmma=4096,
    ),
    "RTX 5090": Gpu(
        arch="sm_120a",
        multiprocessors=170,
        clock=2.4e9,
        bandwidth=1.6e12,
        half=512,
        int8=2048,
        fp8=2048,  # with block scales
    ),
    "A100": Gpu(
        arch="sm_80",
        multiprocessors=108,
        clock=1.41e9,
        bandwidth=1.8e12,
        half=0.9 * 2048,
        int8=0.9 * 4096,
        fp8=0.0,
    ),
    "B200": Gpu(
        arch="sm_100a",
        multiprocessors=148,
        clock=1.85e9,
        bandwidth=7.2e12,
        half=0.2 * 8192,
        int8=0.2 * 16384,
        fp8=0.2 * 8192,
    ),
}


@dataclass(frozen=True)
class Work:
    """What a kernel does beside moving tensors.

    Attributes:
        trips: of its hot loop, by a block of threads.
        half, int8, fp8: FLOPs of the whole launch by operand.
        looped: of `half`, those inside the hot loop.
        warps: of a block that do it; 0: all.
        steps: of the inner loop a trip; None: as many as `looped` asks for.
        wgmma: whether `wgmma` multiplies.
        selected: the loop over selected blocks where the hot loop is that over pooled keys.
    """

    trips: float = 1
    half: float = 0.0
    int8: float = 0.0
    fp8: float = 0.0
    looped: float = 0.0
    warps: int = 0
    steps: float | None = None
    wgmma: bool = False
    selected: Work | None = None


def work_of(entry: str, p: Problem, selected: int, blocks: int) -> Work:
    """The work of kernel `entry` on a problem whose rows select so many key blocks each.

    Kernels that are not named here multiply no matrices; they run through their code once.
    """
    d, rows = p.width, p.pairs * p.n_q
    tile = 2.0 * p.block_q * p.block_k * d * p.pairs * p.t_m * selected  # one product of the branch
    if entry == "sla2_sparse_fwd":
        return Work(selected, half=2 * tile + 2.0 * rows * d * d, looped=2 * tile)
    if "pooled_fwd" in entry:
        chosen = work_of(sibling_of(entry), p, selected, blocks)
        tiles = -(-p.t_n // p.block_k)
        looped = 2 * tile * tiles / selected
        half = chosen.half - 2.0 * rows * d * d + looped  # there is no phi(Q) H
        if "sm90" in entry:  # in 8 bit the first tile stands before the loop over the others
            steps = tiles - 1 if p.low else tiles
            return replace(chosen, half=half, steps=steps, selected=chosen)
        return replace(chosen, trips=tiles, half=half, looped=looped, selected=chosen)
    if entry in ("sla2_sparse_fwd_low", "sla2_sm90_sparse_fwd_low"):
        qk = {"fp8": tile} if p.precision == "fp8" else {"int8": tile}
        pv = {"int8": tile} if p.precision == "int8_int8" else {"fp8": tile}
        sums = {name: qk.get(name, 0.0) + pv.get(name, 0.0) for name in ("int8", "fp8")}
        sums["half"] = 2.0 * rows * d * d
        return _persistent(p, selected, blocks, sums) if "sm90" in entry else Work(selected, **sums)
    if entry == "sla2_sm90_sparse_fwd":
        return _persistent(p, selected, blocks, {"half": 2 * tile + 2.0 * rows * d * d})
    if entry == "sla2_sparse_bwd_q":
        return Work(selected, half=3 * tile, looped=3 * tile)
    if entry == "sla2_sparse_bwd_kv":
        parts = p.pairs * p.t_m * selected * p.block_q / min(64, p.block_q)
        return Work(parts / blocks, half=4 * tile, looped=4 * tile)
    if entry in ("sla2_pooled_bwd_q", "sla2_pooled_bwd_kv"):
        tiles, row_tiles = -(-p.t_n // p.block_k), p.block_q / min(64, p.block_q)
        product = tile * tiles / selected
        if entry == "sla2_pooled_bwd_q":  # an inner loop walks over the tiles
            return Work(row_tiles, half=3 * product, looped=3 * product, steps=tiles)
        row_tiles *= p.t_m * tiles * p.pairs / blocks
        return Work(row_tiles, half=4 * product, looped=4 * product)
    if entry == "sla2_sm90_sparse_bwd_q":
        return Work(p.pairs * p.t_m / blocks, half=3 * tile, warps=8, steps=selected, wgmma=True)
    if entry == "sla2_sm90_sparse_bwd_kv":
        columns, chosen = p.pairs * p.t_n / blocks, selected * p.t_m / p.t_n
        return Work(columns, half=4 * tile, warps=8, steps=chosen, wgmma=True)
    if entry in ("sla2_keys", "sla2_keys_low"):
        return Work(d / 32, half=2.0 * p.pairs * p.n_k * d * d)
    flops = 2.0 * p.pairs * p.t_m * p.t_n * d * (d + 1)
    # Tiles of 256 rows and 128 columns; the backward has as many steps.
    if entry == "sla2_sm90_masked_sum":
        tiles = -(-p.t_m // 256) * -(-d * (d + 1) // 128) * p.pairs
        return Work(tiles / blocks, half=flops, warps=8, steps=-(-p.t_n // 64), wgmma=True)
    # Of states in 8 bit z_j has two values a channel.
    if entry == "sla2_masked_sum_low":
        return Work(-(-p.t_n // 32), fp8=2.0 * p.pairs * p.t_m * p.t_n * d * (d + 2))
    if entry == "sla2_sm90_masked_sum_low":
        tiles = -(-p.t_m // 256) * (d * (d + 2) // 128) * p.pairs
        flops = 2.0 * p.pairs * p.t_m * p.t_n * d * (d + 2)
        return Work(tiles / blocks, half=flops, warps=8, steps=-(-p.t_n // 64), wgmma=True)
    if entry == "sla2_masked_sum":
        depth = p.t_n if blocks == _sum_blocks(p, p.t_m) else p.t_m
        return Work(-(-depth // 32), half=flops, looped=flops)
    if entry == "sla2_linear_bwd_q":
        return Work(half=4.0 * rows * d * d)
    if entry == "sla2_linear_bwd_kv":
        return Work(half=4.0 * p.pairs * p.n_k * d * d)
    return Work({"sla2_topk": 32, "sla2_scores": d / 32, "sla2_project": d / 4}.get(entry, 1))


def sibling_of(name: str) -> str:
    """The kernel that has the loop over selected blocks of a pooled kernel."""
    return name.replace("pooled_fwd", "sparse_fwd")


def _persistent(p: Problem, selected: int, blocks: int, flops: dict[str, float]) -> Work:
    """Blocks whose eight consumer warps walk over query blocks. The code of a query block has a
    first and a last half step besides its loop, which scores the second to last key block.
    """
    queries = p.pairs * p.t_m / blocks
    return Work(queries, **flops, warps=8, steps=selected - 1, wgmma=True)


def _sum_blocks(p: Problem, rows: int) -> int:
    return -(-p.width * (p.width + 1) // 128) * -(-rows // 128) * p.pairs


def issue_slots(figures: dict[str, Any], work: Work, warps: float) -> float:
    """Instructions that all warps of a launch issue: what stands outside the hot loop once, and
    each trip; an inner loop as often as the work says.
    """
    outside = figures["instructions"] - figures.get("loop", 0) - figures.get("rare", 0)
    return warps * outside + loop_slots(figures, work, warps)


def loop_slots(figures: dict[str, Any], work: Work, warps: float) -> float:
    """Those inside the hot loop."""
    trip = float(figures.get("loop", 0))
    inner = figures.get("inner")
    if inner and work.steps is not None:
        trip += inner[0] * (work.steps - 1)
    elif inner:
        wanted = work.looped / MMA_FLOPS / warps / work.trips
        trip += inner[0] * ((wanted - figures["tensor"]) / inner[1])
    return warps * work.trips * trip


def slots_of(figures: dict[str, Any], name: str, work: Work, warps: float) -> float:
    """issue_slots() of kernel `name` of the committed file. Of a kernel with a second loop that
    loop's trips beyond the one that is counted as outside, by the kernel that has it alone; where
    blocks of threads stay, both are inner loops.
    """
    slots = issue_slots(figures[name], work, warps)
    if work.selected is None:
        return slots
    shared = figures[sibling_of(name)]
    if work.selected.steps is not None:
        return slots + warps * work.trips * shared["inner"][0] * (work.selected.steps - 1)
    once = shared.get("loop", 0) + shared.get("rare", 0)
    return slots + loop_slots(shared, work.selected, warps) - warps * once


def seconds(gpu: Gpu, bytes_moved: float, slots: float, work: Work) -> dict[str, float]:
    """The parts of a launch's time: `memory`, `issue` and `tensor`; see `whole`."""
    clocks = gpu.multiprocessors * gpu.clock
    if work.wgmma:
        tensor = (work.half + (work.int8 + work.fp8) / 2) / gpu.wgmma
    else:
        tensor = work.half / gpu.half + work.int8 / gpu.int8
        tensor += work.fp8 / gpu.fp8 if work.fp8 else 0.0
    return {
        "memory": bytes_moved / gpu.bandwidth,
        "issue": slots / (SCHEDULERS * clocks),
        "tensor": tensor / clocks,
    }


def whole(parts: dict[str, float], work: Work) -> float:
    """Seconds of a launch: copies travel while a kernel computes, but a warp that waits for
    `mma.sync` issues nothing, and there are few others; `wgmma` leaves less of the shorter part
    uncovered.
    """
    issue, tensor = parts["issue"], parts["tensor"]
    busy = max(issue, tensor) + (EXPOSED if work.wgmma else 1.0) * min(issue, tensor)
    return LAUNCH_SECONDS + max(parts["memory"], busy)


STAGES = {  # of the kernels' names; a kernel that is not listed is a stage by itself
    "key_mean": "pool",
    "keys_low": "keys",
    "project": "route",
    "scores": "route",
    "topk": "route",
    "row_bits": "route",
    "column_bits": "columns",
    "column_offsets": "columns",
    "column_rows": "columns",
    "sparse_fwd_low": "sparse_fwd",
    "pooled_fwd_low": "pooled_fwd",
    "sm90_pooled_fwd": "pooled_fwd",
    "sm90_pooled_fwd_low": "pooled_fwd",
    "sm90_pack": "pack",
    "sm90_pack_low": "pack",
    "masked_sum_low": "masked_sum",
    "sm90_masked_sum": "masked_sum",
    "sm90_masked_sum_low": "masked_sum",
    "sm90_sparse_bwd_kv": "sparse_bwd_kv",
    "sm90_sparse_bwd_q": "sparse_bwd_q",
    "sm90_sparse_fwd": "sparse_fwd",
    "sm90_sparse_fwd_low": "sparse_fwd",
}


def moved(launch: Launch, p: Problem, selected: int) -> int:
    """Bytes of a launch where no column of the map is cut (csrc/columns.cuh): without the memory
    for slices' sums, and without dV where it would be their sum.
    """
    from sla2_kernels.backward import slice_plan
    from sla2_kernels.record import bytes_of

    kernel, slices = launch.spec.entry.removeprefix("sla2_"), slice_plan(p, selected)[1]
    idle = bytes_of((p.pairs, slices, 2, p.block_k, p.width), "float32")
    if kernel == "finish_kv":
        return launch.bytes - idle - bytes_of((p.pairs, p.n_k, p.width), p.dtype)
    return launch.bytes - idle if kernel.endswith("sparse_bwd_kv") else launch.bytes


def model(
    gpu: Gpu, launches: list[Launch], p: Problem, selected: int, figures: dict[str, Any]
) -> list[dict[str, Any]]:
    """Rows of launches of one problem, a stage each and their sum: launches, MB, and milliseconds
    of memory, issue, tensor and in all.
    """
    rows: dict[str, dict[str, Any]] = {}
    for launch in launches:
        spec = launch.spec
        work = work_of(spec.entry, p, selected, launch.blocks)
        warps = launch.blocks * (work.warps or spec.threads / 32)
        slots = slots_of(figures, sass_figures.name_of(spec), work, warps)
        size = moved(launch, p, selected)
        parts = seconds(gpu, size, slots, work)
        kernel = spec.entry.removeprefix("sla2_")
        new = {"launches": 1, "MB": size / 1e6, "ms": 1e3 * whole(parts, work)}
        new |= {name: 1e3 * value for name, value in parts.items()}
        row = rows.setdefault(STAGES.get(kernel, kernel), dict.fromkeys(new, 0))
        for name, value in new.items():
            row[name] += value
    total = {name: sum(row[name] for row in rows.values()) for name in next(iter(rows.values()))}
    return [{"stage": stage, **row} for stage, row in (*rows.items(), ("sum", total))]


def problem_of(precision: str, n: int, heads: int) -> Problem:
    """Self-attention over n tokens, head dimension 128, bfloat16."""
    from sla2_kernels.problem import Problem

    return Problem(batch=1, heads=heads, n_q=n, n_k=n, head_dim=128, precision=precision)


def forward_launches(arch: str, p: Problem, topk: float, pooled: bool = False) -> list[Launch]:
    """The launches of a routed forward without gradient, as SLA2Attention makes them; with the
    linear complement, or the pooled one.
    """
    from sla2_kernels.forward import routed_forward
    from sla2_kernels.problem import Alpha, AlphaRule
    from sla2_kernels.record import Recorder

    recorder = Recorder(arch)
    device = recorder.device
    q, k, v = (recorder.tensor(p.batch, p.heads, n, p.head_dim) for n in (p.n_q, p.n_k, p.n_k))
    weight = recorder.allocate((1, p.head_dim, p.head_dim), "float32")
    offset, slope = (recorder.allocate((p.heads,), "float32") for _ in range(2))
    rule = AlphaRule(offset, slope, p.heads)  # alpha from the mass, the default
    alpha = Alpha.of(offset, (1, p.heads, 1)) if pooled else rule
    routed_forward(device, p, q, k, v, weight, weight, 1, topk, None, alpha)
    return recorder.launches


def backward_launches(arch: str, p: Problem, topk: float, pooled: bool = False) -> list[Launch]:
    """The launches of the backward of such a forward."""
    from sla2_kernels.backward import backward
    from sla2_kernels.forward import forward
    from sla2_kernels.problem import Alpha, Map
    from sla2_kernels.record import Recorder

    recorder = Recorder(arch)
    device, rows = recorder.device, (p.batch, p.heads, p.t_m)
    q, k, v, grad = (
        recorder.tensor(p.batch, p.heads, n, p.head_dim) for n in (p.n_q, p.n_k, p.n_k, p.n_q)
    )
    width = max(1, round(topk * p.t_n))
    indices, counts = (recorder.allocate(shape, "int32") for shape in ((*rows, width), rows))
    alpha = Alpha.of(recorder.allocate(rows, "float32"), rows)
    of, complement = Map(indices, counts, width), "pooled" if pooled else "linear"
    saved = forward(device, p, q, k, v, of, alpha, save=True, complement=complement)
    first = len(recorder.launches)
    backward(device, p, saved, grad)
    return recorder.launches[first:]


def measured(gpu: str, precision: str, results: Path = sass_figures.FILE.parent) -> float | None:
    """Milliseconds of the forward that a committed file of `sla2 bench --suite paper` has for this
    GPU; None if none has.
    """
    case = "SLA2 forward" if precision == "full" else f"SLA2 forward {precision}"
    for file in sorted(results.glob("*.json")):
        found = json.loads(file.read_text())
        if found.get("suite") != "paper" or gpu not in found["hardware"]["gpu"]:
            continue
        for row in found["rows"]:
            if row["case"] == case and row["sparsity"] == SHAPE["sparsity"] and "median" in row:
                return float(row["median"])
    return None


def measure(report: Callable[[str, int, int], None], quick: bool) -> dict[str, Any]:
    """The forward at the paper's shape on every GPU, in every precision that it runs, with either
    complement; and their backward, at BACKWARD_SPARSITY, on those whose sparse kernels multiply by
    `wgmma`, where it is not shared memory that they wait for: {"suite", "shape", "nvrtc", "gpus",
    "rows"}. Reads the committed figures of the code; needs neither a GPU nor NVRTC.
    """
    from sla2_kernels.hopper import takes
    from sla2_kernels.kernels import faster_precision, supports
    from sla2_kernels.record import Recorder

    committed = sass_figures.read()
    n, heads = SHAPE["n"], SHAPE["heads"]
    rows = []
    for number, (name, gpu) in enumerate(GPUS.items(), 1):
        report("GPUs", number, len(GPUS))
        for precision in PRECISIONS:
            if not supports(gpu.arch, precision):
                continue
            p = problem_of(precision, int(n), int(heads))
            topk = 1 - SHAPE["sparsity"]
            selected = max(1, round(topk * p.t_n))
            by_wgmma = takes(Recorder(gpu.arch).device, p)
            runs = by_wgmma or faster_precision(gpu.arch, precision) == precision
            for pooled in (False, True) if runs else (False,):
                launches = forward_launches(gpu.arch, p, topk, pooled)
                found = model(gpu, launches, p, selected, committed["figures"][gpu.arch])
                label = f"{precision}, pooled" if pooled else precision
                rows += [{"gpu": name, "precision": label, **row} for row in found]
                if not pooled:
                    rows[-1]["measured"] = measured(name, precision)
        p, topk = problem_of("full", int(n), int(heads)), 1 - BACKWARD_SPARSITY
        if takes(Recorder(gpu.arch).device, p):
            for pooled in (False, True):
                launches = backward_launches(gpu.arch, p, topk, pooled)
                selected = round(topk * p.t_n)
                found = model(gpu, launches, p, selected, committed["figures"][gpu.arch])
                label = f"backward, {BACKWARD_SPARSITY:.0%}" + (", pooled" if pooled else "")
                rows += [{"gpu": name, "precision": label, **row} for row in found]
    return {
        "suite": "model",
        "shape": SHAPE,
        "nvrtc": committed["nvrtc"],
        "gpus": {name: asdict(gpu) for name, gpu in GPUS.items()},
        "rows": rows,
    }


def plot(result: dict[str, Any], path: Path) -> None:
    """Modelled milliseconds, a bar a GPU and precision, made of its stages, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bars: dict[str, dict[str, float]] = {}
    for row in result["rows"]:
        if row["stage"] != "sum" and not row["precision"].startswith("backward"):
            bars.setdefault(f"{row['gpu']} {row['precision']}", {})[row["stage"]] = row["ms"]
    stages = list(dict.fromkeys(stage for parts in bars.values() for stage in parts))
    figure = Figure(figsize=(7, 7.5), layout="constrained")
    axes = figure.add_subplot()
    left = dict.fromkeys(bars, 0.0)
    for stage in stages:
        widths = [parts.get(stage, 0.0) for parts in bars.values()]
        axes.barh(list(bars), widths, left=list(left.values()), label=stage)
        left = {name: left[name] + width for name, width in zip(bars, widths)}
    axes.invert_yaxis()
    axes.set(xlabel="ms")
    figure.suptitle(
        f"Modelled, not measured: the forward at N = {result['shape']['n']:,},"
        f" H = {result['shape']['heads']}, d = 128, {result['shape']['sparsity']:.0%}",
        fontsize=10,
    )
    axes.legend(fontsize=8)
    FigureCanvasAgg(figure).print_png(str(path))
