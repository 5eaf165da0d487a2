"""Stage 1 of one layer at the shape of Wan2.1-1.3B on this machine's CPU: seconds a step, and
memory above the inputs.

python experiments/wan2.1_1.3b/stage1_cpu.py --json stage1_cpu.json
Router and alpha learn as in train.yaml, by the ordinary train_stage1, from random Q, K, V written
as captures. The peak counts everything that stage 1 holds, its held-out measurement and report too.
Linux.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from sla2_core.adapter import write_json, write_tensors
from sla2_core.integrations.diffusers import SLA2Handle
from sla2_core.training.capture import INDEX_NAME, Captures
from sla2_core.training.stage1.train import train_stage1
from sla2_eval.grid.settings import Attention, TrainSettings
from sla2_eval.grid.steps import apply
from sla2_eval.runs.hardware import hardware
from sla2_eval.runs.settings import load_settings

TOKENS = 32_760  # 81 frames of 480 x 832
HEADS, HEAD_DIM = 12, 128
SETTINGS = Path(__file__).with_name("train.yaml")


def one_layer(attention: Attention) -> SLA2Handle:
    """A Wan transformer of one layer with the heads of the real one; its other weights play no part
    here.
    """
    from diffusers import WanTransformer3DModel

    transformer = WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=1,
        text_dim=8,
        ffn_dim=8,
    )
    return apply(transformer, attention.in_precision("full"))


def write_captures(handle: SLA2Handle, tokens: int, dtype: torch.dtype, folder: Path) -> int:
    """One call of random Q, K, V, as capture() writes them; returns their size in bytes."""
    config, rng = handle.config, torch.Generator().manual_seed(0)
    shape = (1, config.num_heads, tokens, config.head_dim)
    write_tensors(
        folder / "capture-00000.safetensors",
        {f"0.{x}": torch.randn(shape, generator=rng).to(dtype) for x in "qkv"},
    )
    size = 3 * config.num_heads * tokens * config.head_dim * dtype.itemsize
    call = {
        "shard": "capture-00000.safetensors",
        "key": "0",
        "layer": 0,
        "sample": 0,
        "timestep": 500.0,
        "heads": list(range(config.num_heads)),
        "shape": list(shape),
        "text_tokens": 0,
        "kv_lengths": None,
    }
    settings = {"model": handle.model_identity(), **config.order_geometry()}
    content = {"format_version": 1, "settings": settings, "full": False}
    write_json(
        folder / INDEX_NAME, content | {"samples": [{"sample": 0, "bytes": size, "calls": [call]}]}
    )
    return size


def memory(name: str) -> int:
    """Bytes of this process from Linux's /proc: VmRSS now, VmHWM at most so far."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024


def run(
    settings: TrainSettings, tokens: int, rows: int, steps: int, dtype: str, folder: Path
) -> dict:
    """Train and measure; the folder gets captures and the run."""
    handle, seconds = one_layer(settings.attention), []
    folder.mkdir()
    size = write_captures(handle, tokens, getattr(torch, dtype), folder)
    config = replace(
        settings.stage1,
        topk=(handle.config.topk,),
        steps=steps,
        rows=rows,
        eval_rows=rows,
    )
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before, last = memory("VmRSS"), time.perf_counter()

    def progress(step: int, total: int, metrics: dict) -> None:
        nonlocal last
        seconds.append(time.perf_counter() - last)
        print(f"step {step}/{total}  loss {metrics['loss']:.4g}  {seconds[-1]:.1f} s", flush=True)
        last = time.perf_counter()

    report = train_stage1(handle, Captures(folder), config, folder / "stage1", progress=progress)
    return {
        "tokens": tokens,
        "heads": handle.config.num_heads,
        "head_dim": handle.config.head_dim,
        "rows": rows,
        "steps": steps,
        "dtype": dtype,
        "topk": config.topk[0],
        "input_bytes": size,
        "seconds": seconds,
        "seconds_per_step": statistics.median(seconds),
        "bytes_above_inputs": memory("VmHWM") - before - size,
        "loss": report.loss,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument(
        "--rows", type=int, help="query blocks a step; those of train.yaml if not given"
    )
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the captures"
    )
    parser.add_argument("--json", type=Path, help="where to write the result")
    given = parser.parse_args(arguments)
    settings = load_settings(SETTINGS, TrainSettings)
    rows = given.rows or settings.stage1.rows
    with tempfile.TemporaryDirectory() as folder:
        run(
            settings, 1024, rows, 1, given.dtype, Path(folder) / "warm"
        )  # imports and compiled kernels are no part of it
        found = run(settings, given.tokens, rows, given.steps, given.dtype, Path(folder) / "run")
    found["hardware"] = hardware() | {"threads": torch.get_num_threads()}
    found["versions"] = {name: version(name) for name in ("sla2-core", "torch", "diffusers")}
    print(
        f"{found['tokens']} tokens, {found['heads']} heads of {found['head_dim']}, {rows} query"
        f" blocks a step: {found['seconds_per_step']:.1f} s a step,"
        f" {found['bytes_above_inputs'] / 2**30:.2f} GiB above the"
        f" {found['input_bytes'] / 2**30:.2f} GiB of inputs; {found['hardware']['processor']},"
        f" {found['hardware']['threads']} threads, torch {found['versions']['torch']}"
    )
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
