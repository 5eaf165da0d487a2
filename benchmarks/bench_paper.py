"""The paper's speed table on a GPU: SLA2 whole and by stage against every dense attention of torch
and FlexAttention.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.timing import cuda_clock, interleave

if TYPE_CHECKING:
    import torch
    from sla2_kernels.problem import Device, Pointer, Problem, Strided
    from torch import Tensor
    from torch.nn.attention import SDPBackend

Attention = Callable[["Tensor", "Tensor", "Tensor"], "Tensor"]
Case = Callable[[], object]

COLUMNS = (
    "shape",
    "sparsity",
    "case",
    "median",
    "low",
    "high",
    "speedup",
    "c_over_t",
    "floor",
    "times_floor",
)

BLOCK_Q, BLOCK_K, HEAD_DIM = 128, 64, 128
# Tokens and heads of Wan2.1's self-attention, warm-ups and repetitions: dense attention takes
# seconds at the second shape.
SHAPES = {"1.3B 480p": (32760, 12, 3, 50), "14B 720p": (75600, 40, 1, 7)}
SPARSITIES = (0.85, 0.90, 0.95, 0.97)


@dataclass(frozen=True)
class Floor:
    """FLOPs and compulsory bytes of a stage."""

    flops: float
    bytes: float

    def milliseconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        return 1e3 * max(self.flops / flops_per_second, self.bytes / bytes_per_second)


def floors(n: int, heads: int, selected: int, d: int = HEAD_DIM) -> dict[str, Floor]:
    """What each stage must compute and move at least, for `selected` of the key blocks a row;
    16-bit tensors.
    """
    t_m, t_n = -(-n // BLOCK_Q), -(-n // BLOCK_K)
    tensor, states = 2 * n * heads * d, 2 * heads * d * (d + 1)
    pairs = selected * BLOCK_K / n
    full = 4.0 * n * n * d * heads
    stages = {
        "pool": Floor(4.0 * n * d * heads, 2 * tensor),
        "keys": Floor(2.0 * n * d * d * heads, 2 * tensor + t_n * states),
        "route": Floor(
            2.0 * heads * (t_m * t_n * d + (t_m + t_n) * d * d),
            4 * heads * (t_m + t_n) * d + 4 * heads * t_m * t_n,
        ),
        "linear sums": Floor(2.0 * heads * t_m * t_n * d * (d + 1), (t_n + t_m) * states),
        "sparse forward": Floor(pairs * full + 2.0 * n * d * d * heads, 5 * tensor + t_m * states),
    }
    whole = Floor(sum(f.flops for f in stages.values()), sum(f.bytes for f in stages.values()))
    return {**stages, "forward": whole, "backward": Floor(2.5 * whole.flops, 2 * whole.bytes)}


def measure(report: Callable[[str, int, int], None], quick: bool) -> dict:
    """Every shape and sparsity -> {"suite", "hardware", "rates", "settings", "rows"}; needs a GPU.

    Rows: shape, sparsity, case, median, low, high (ms), speedup over SDPA-flash of the same
    direction, c_over_t (TFLOP/s of full attention, 4 N^2 d H, over the time: the paper's measure),
    and for stages the floor (ms, at the measured GEMM rate and copy bandwidth) and the time over
    it. SLA2's cases are replays of CUDA graphs; those called "launched" are not, and hold what
    Python takes to launch the kernels one by one, as do those of the module, SLA2Attention. Raises
    RuntimeError in one line without a GPU or without CuPy.
    """
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError(
            "suite 'paper': needs a CUDA GPU, and torch sees none; --suite cpu runs here"
        )
    rates = _rates(10 if quick else 50)
    rows = []
    for shape, (n, heads, warmups, repetitions) in list(SHAPES.items())[: 1 if quick else None]:
        for sparsity in SPARSITIES[-1:] if quick else SPARSITIES:
            progress = partial(report, f"{shape} {sparsity:.0%}")
            turns = (warmups, 10 if quick else repetitions)
            found, selected = _setting(n, heads, sparsity, *turns, progress)
            rows += _rows(shape, n, heads, sparsity, selected, found, rates)
            torch.cuda.empty_cache()
    settings = {
        "block_q": BLOCK_Q,
        "block_k": BLOCK_K,
        "head_dim": HEAD_DIM,
        "dtype": "bfloat16",
        "repetitions": 10 if quick else {shape: turns[-1] for shape, turns in SHAPES.items()},
    }
    return {
        "suite": "paper",
        "hardware": hardware(),
        "rates": rates,
        "settings": settings,
        "rows": rows,
    }


def hardware() -> dict:
    """GPU, driver, versions of what the figures depend on, and date."""
    import datetime
    import importlib.metadata

    import torch

    about = torch.cuda.get_device_properties(0)
    versions = {}
    for name in ("torch", "cupy-cuda12x", "cupy-cuda13x", "sla2-kernels"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "gpu": about.name,
        "capability": f"{about.major}.{about.minor}",
        "memory_gb": round(about.total_memory / 2**30),
        "cuda": torch.version.cuda,
        "driver": _driver(),
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _driver() -> str | None:
    import shutil
    import subprocess

    if (tool := shutil.which("nvidia-smi")) is None:
        return None
    done = subprocess.run(
        [tool, "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None


def _rates(repetitions: int) -> dict[str, float]:
    """The machine's copy bandwidth (bytes read plus written a second) and bf16 GEMM rate (FLOP/s),
    measured.
    """
    import torch

    size = 8192
    source, a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    source = source.repeat(8, 1)
    target = torch.empty_like(source)
    found = interleave(
        {"copy": lambda: target.copy_(source), "gemm": lambda: a @ b}, cuda_clock, repetitions
    )
    return {
        "copy_bytes_per_second": 2e3 * source.numel() * 2 / found["copy"]["median"],
        "gemm_flops_per_second": 2e3 * size**3 / found["gemm"]["median"],
    }


def _rows(
    shape: str,
    n: int,
    heads: int,
    sparsity: float,
    selected: int,
    found: dict[str, dict],
    rates: dict[str, float],
) -> list[dict]:
    least = floors(n, heads, selected)
    full = 4.0 * n * n * HEAD_DIM * heads
    rows = []
    for case, times in found.items():
        backward = "backward" in case
        row = {"shape": shape, "sparsity": sparsity, "case": case, **times}
        if "median" in times:
            base = found.get(f"SDPA flash {'backward' if backward else 'forward'}", {}).get(
                "median"
            )
            whole = case.startswith(
                ("SLA2 forward", "SLA2 backward", "SLA2Attention", "SDPA", "FlexAttention")
            )
            row["speedup"] = base / times["median"] if base and whole else None
            row["c_over_t"] = (
                full * (2.5 if backward else 1.0) / times["median"] / 1e9 if whole else None
            )
            if (stage := case.removeprefix("SLA2 ").removesuffix(", mma.sync")) in least:
                row["floor"] = least[stage].milliseconds(
                    rates["gemm_flops_per_second"], rates["copy_bytes_per_second"]
                )
                row["times_floor"] = times["median"] / row["floor"]
            if stage == "sparse forward":
                row["effective_tflops"] = full * selected * BLOCK_K / n / times["median"] / 1e9
        rows.append(row)
    return rows


def _setting(
    n: int,
    heads: int,
    sparsity: float,
    warmups: int,
    repetitions: int,
    report: Callable[[int, int], None],
) -> tuple[dict[str, dict], int]:
    """Times of every case at one shape and sparsity, and how many key blocks a row selects."""
    import torch

    torch.manual_seed(0)
    q, k, v, grad = (
        torch.randn(1, heads, n, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(4)
    )
    kernels = _Kernels(q, k, v, 1 - sparsity)
    cases = kernels.cases(grad) | _module(q, k, v, grad, 1 - sparsity) | _dense(q, k, v, grad)
    cases |= _flex(q, k, v, grad, kernels)
    return interleave(cases, cuda_clock, repetitions, warmups, report), kernels.block_map.width


class _Kernels:
    """SLA2's stages on one input, through the kernels' own operator; buffers are torch's."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, topk: float):
        import torch
        from sla2_kernels import forward as operator
        from sla2_kernels.kernels import wgmma_allowed
        from sla2_kernels.problem import Alpha, Problem
        from sla2_kernels.specs import architecture_of

        self.operator, self.arch = operator, architecture_of(*torch.cuda.get_device_capability())
        self.inputs = [self.strided(x) for x in (q, k, v)]
        self.shape = dict(
            batch=q.shape[0], heads=q.shape[1], n_q=q.shape[2], n_k=k.shape[2], head_dim=q.shape[3]
        )
        self.problem = Problem(**self.shape)
        weight = torch.eye(q.shape[3], device="cuda")[None].contiguous()
        self.weight, self.topk = self.pointer(weight), topk
        self.alpha = Alpha.of(
            self.pointer(torch.full((1, q.shape[1], 1), 0.8, device="cuda")), (1, q.shape[1], 1)
        )
        self.wgmma = wgmma_allowed()
        first = self.pool(self.problem)
        self.block_map = self.route(self.problem, first)
        self.made = self.keys(self.problem, first)
        self.linear = operator.linear_sums(self.device, self.problem, self.made, self.block_map)

    @staticmethod
    def pointer(tensor: Tensor) -> Pointer:
        from sla2_kernels.problem import Pointer

        return Pointer(tensor.data_ptr(), tensor)

    def strided(self, tensor: Tensor) -> Strided:
        from sla2_kernels.problem import Strided

        return Strided(self.pointer(tensor), tensor.stride()[:3])

    @property
    def device(self) -> Device:
        """On the current stream, which is another one while a graph is captured."""
        import torch
        from sla2_kernels.problem import Device

        stream = torch.cuda.current_stream().cuda_stream
        return Device(
            allocate=self.allocate,
            target="cuda",
            arch=self.arch,
            stream=stream,
            wgmma=self.wgmma,
        )

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Pointer:
        import torch

        return self.pointer(torch.empty(shape, dtype=getattr(torch, dtype), device="cuda"))

    def pool(self, problem: Problem) -> Any:
        from sla2_kernels import prepare

        return prepare.pool(self.device, problem, *self.inputs, pooled=True)

    def keys(self, problem: Problem, made: Any) -> Any:
        from sla2_kernels import prepare
        from sla2_kernels.hopper import takes

        device = self.device
        return prepare.keys(device, problem, made, tiles=takes(device, problem))

    def route(self, problem: Problem, made: Any) -> Any:
        return self.operator.route(
            self.device,
            problem,
            made.pooled_q,
            made.pooled_k,
            self.weight,
            self.weight,
            1,
            self.topk,
        ).block_map

    def forward(self, problem: Problem, save: bool = False) -> Any:
        made = self.pool(problem)
        block_map = self.route(problem, made)
        return self.operator.forward(
            self.device, problem, *self.inputs, block_map, self.alpha, made=made, save=save
        )

    def sparse_forward(self) -> Any:
        return self.operator.sparse_forward(
            self.device, self.problem, self.made, self.block_map, self.linear, self.alpha, False
        )

    def cases(self, grad: Tensor) -> dict[str, Case]:
        """Each stage, forward and backward; those called "mma.sync" are on GPUs that run them by
        wgmma.
        """
        from copy import copy
        from dataclasses import replace

        from sla2_kernels.backward import backward
        from sla2_kernels.hopper import takes
        from sla2_kernels.kernels import supports

        op, problem = self.operator, self.problem
        saved, d_out = self.forward(problem, save=True), self.strided(grad)
        cases: dict[str, Case] = {
            "SLA2 forward": lambda: self.forward(problem),
            "SLA2 pool": lambda: self.pool(problem),
            "SLA2 route": lambda: self.route(problem, self.made),
            "SLA2 keys": lambda: self.keys(problem, self.made),
            "SLA2 linear sums": lambda: op.linear_sums(
                self.device, problem, self.made, self.block_map
            ),
            "SLA2 sparse forward": self.sparse_forward,
            "SLA2 backward": lambda: backward(self.device, problem, saved, d_out),
        }
        for precision in ("int8", "int8_int8"):
            if supports(self.arch, precision):
                low = replace(problem, precision=precision)
                cases[f"SLA2 forward {precision}"] = lambda low=low: self.forward(low)
        if takes(self.device, problem):
            plain, low = copy(self), replace(problem, precision="int8")
            plain.wgmma = False
            cases["SLA2 forward, mma.sync"] = lambda: plain.forward(problem)
            cases["SLA2 forward int8, mma.sync"] = lambda: plain.forward(low)
            cases["SLA2 sparse forward, mma.sync"] = plain.sparse_forward
            cases["SLA2 backward, mma.sync"] = lambda: backward(plain.device, problem, saved, d_out)
        launched = {f"{name}, launched": cases[name] for name in ("SLA2 forward", "SLA2 backward")}
        return {name: _graphed(case) for name, case in cases.items()} | launched


def _graphed(function: Case) -> Callable[[], None]:
    """The function as a CUDA graph, captured at the first call; a plain call before it loads its
    kernels.
    """
    graphs: list[torch.cuda.CUDAGraph] = []

    def replay() -> None:
        import torch

        if not graphs:
            function()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                function()
            graphs.append(graph)
        graphs[0].replay()

    return replay


def _both(
    function: Attention, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, name: str
) -> dict[str, Case]:
    """Forward and backward of an attention function as two cases; the backward of a graph that is
    kept.
    """
    import torch

    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    graph: list[Tensor] = []

    def forward() -> Tensor:
        with torch.no_grad():
            return function(q, k, v)

    def backward() -> tuple[Tensor, ...]:
        if not graph:
            graph.append(function(*leaves))
        return torch.autograd.grad(graph[0], leaves, grad, retain_graph=True)

    return {f"{name} forward": forward, f"{name} backward": backward}


def _module(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, topk: float) -> dict[str, Case]:
    """What users call: SLA2Attention through torch's custom ops and autograd, launched one by one;
    also on tensors whose
    tokens come before their heads, as models hold them."""
    from sla2_core import SLA2Attention, SLA2Config

    sizes = dict(block_q=BLOCK_Q, block_k=BLOCK_K, backend="cuda")
    attention = SLA2Attention(
        SLA2Config(head_dim=q.shape[3], num_heads=q.shape[1], topk=topk, **sizes)
    ).to(q.device)
    tokens_first = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, grad))
    return _both(attention, q, k, v, grad, "SLA2Attention") | _both(
        attention, *tokens_first, "SLA2Attention (B, N, H, d)"
    )


def _dense(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> dict[str, Case]:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    cases: dict[str, Case] = {}
    for name, backend in (
        ("flash", SDPBackend.FLASH_ATTENTION),
        ("cuDNN", SDPBackend.CUDNN_ATTENTION),
        ("efficient", SDPBackend.EFFICIENT_ATTENTION),
    ):

        def attention(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v)

        cases |= _both(attention, q, k, v, grad, f"SDPA {name}")
    return cases


def _flex(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, kernels: _Kernels) -> dict[str, Case]:
    """FlexAttention over the blocks that the router chose."""
    compiled: list[Attention] = []

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not compiled:
            compiled.append(_compiled_flex(q, k, kernels))
        return compiled[0](q, k, v)

    return _both(attention, q, k, v, grad, "FlexAttention")


def _compiled_flex(q: Tensor, k: Tensor, kernels: _Kernels) -> Attention:
    import torch
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    counts, indices = kernels.block_map.counts.owner, kernels.block_map.indices.owner
    padded = indices.new_zeros(*indices.shape[:3], -(-k.shape[2] // BLOCK_K))
    padded[..., : indices.shape[3]] = indices.clamp(min=0)
    mask = BlockMask.from_kv_blocks(
        torch.zeros_like(counts),
        torch.zeros_like(padded),
        counts,
        padded,
        BLOCK_SIZE=(BLOCK_Q, BLOCK_K),
        seq_lengths=(q.shape[2], k.shape[2]),
    )
    tiles = {
        "fwd_BLOCK_M": BLOCK_Q,
        "fwd_BLOCK_N": BLOCK_K,
    }  # the defaults are wider than a key block
    tiles |= {f"bwd_BLOCK_{side}{half}": BLOCK_K for side in "MN" for half in "12"}
    return partial(torch.compile(flex_attention), block_mask=mask, kernel_options=tiles)
