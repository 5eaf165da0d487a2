"""Times what the CPU operator is made of in torch and in numba, interleaved, and prints the table
of cpu/README.md.

    python -m benchmarks.bench_cpu_choices [--threads 1]

N = 32,760, d = 128, one head, blocks 128 x 64, 97 %. Milliseconds of CPU time of the process,
median and quartiles of 9.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from sla2_core.formats import format_of
from sla2_core.routing.softtopk import _bisect
from sla2_kernels.cpu import build, pool, route, softtopk
from sla2_kernels.cpu import quantize as low_bit
from sla2_kernels.cpu.tiles import gemm

from benchmarks.timing import interleave

N, D, BLOCK_Q, BLOCK_K, SELECTED = 32760, 128, 128, 64, 15
BATCH = 16  # products at once


@build.kernel
def _products(a: np.ndarray, b: np.ndarray, c: np.ndarray, lo: int, hi: int) -> None:
    for i in range(lo, hi):
        gemm(
            a[i],
            0,
            a.shape[2],
            1,
            b[i],
            0,
            b.shape[2],
            c[i],
            0,
            c.shape[2],
            c.shape[1],
            c.shape[2],
            b.shape[1],
            0,
        )


def cases(threads: int) -> dict[str, tuple[Callable, Callable]]:
    """What is compared -> (torch's, numba's)."""
    torch.manual_seed(0)
    x = torch.randn(1, 1, N, D)
    heads, lengths = x[0].numpy(), np.array([N])
    t_m, t_n = -(-N // BLOCK_Q), -(-N // BLOCK_K)
    scores = torch.randn(1, t_m, t_n)
    logits, k = torch.randn(12 * t_m, t_n) * 10, torch.full((12 * t_m, 1), float(SELECTED))
    a, b = torch.randn(BATCH, BLOCK_Q, D), torch.randn(BATCH, D, SELECTED * BLOCK_K)
    c = torch.empty(BATCH, BLOCK_Q, SELECTED * BLOCK_K)

    def plain_means() -> torch.Tensor:
        return (
            torch.nn.functional.pad(x, (0, 0, 0, -N % BLOCK_K)).unflatten(2, (-1, BLOCK_K)).mean(3)
        )

    def plain_top() -> torch.Tensor:
        return (
            torch.sort(scores, dim=-1, descending=True, stable=True)
            .indices[..., :SELECTED]
            .sort(-1)
            .values
        )

    found = {
        f"fp32 product {BLOCK_Q} x {D} x {SELECTED * BLOCK_K}, {BATCH} of them": (
            lambda: torch.bmm(a, b, out=c),
            lambda: build.run(_products, BATCH, threads, a.numpy(), b.numpy(), c.numpy()),
        ),
        "block means of K, fp32": (
            plain_means,
            lambda: pool.block_means(heads, lengths, BLOCK_K, threads),
        ),
        f"top-k of {t_m} x {t_n} scores": (
            plain_top,
            lambda: route.top_k(scores.numpy(), SELECTED, threads),
        ),
        f"SoftTop-k of {len(logits)} x {t_n} scores": (
            lambda: _bisect(logits, k),
            lambda: softtopk.soft_top_k(logits.numpy(), k[:, 0].numpy(), threads),
        ),
    }
    for fmt in ("int8", "fp8"):
        found[f"K to {fmt} and back, a scale a block"] = (
            lambda fmt=fmt: format_of(fmt).round_blocks(x, BLOCK_K),
            lambda fmt=fmt: low_bit.quantize_blocks(heads, lengths, BLOCK_K, fmt, threads),
        )
        found[f"V to {fmt} and back, a scale a channel"] = (
            lambda fmt=fmt: format_of({"int8": "int8_int8"}.get(fmt, fmt)).round_values(x, BLOCK_K),
            lambda fmt=fmt: low_bit.quantize_channels(heads, lengths, fmt, threads),
        )
    return found


def _clock(function: Callable) -> float:
    start = time.process_time()
    function()
    return 1e3 * (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    threads = parser.parse_args().threads
    torch.set_num_threads(threads)
    print("| what | torch, ms | numba, ms |\n|---|---|---|")
    for name, (plain, compiled) in cases(threads).items():
        times = interleave({"torch": plain, "numba": compiled}, _clock, 9)
        cells = (f"{t['median']:.2f} ({t['low']:.2f} to {t['high']:.2f})" for t in times.values())
        print("|", " | ".join((name, *cells)), "|")


if __name__ == "__main__":
    main()
