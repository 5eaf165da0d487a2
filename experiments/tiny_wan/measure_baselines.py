"""What each baseline selects on the tiny Wan before any training: sparsity, FLOPs and attention
error, for settings of the adaptive ones. By it `baselines.yaml` has its top_p and k%.

    python experiments/tiny_wan/measure_baselines.py --samples 4
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sla2_core import SLA2Attention, SLA2Config
from sla2_core.attend import full_attention
from sla2_core.cost import measured_share
from sla2_core.integrations.diffusers import apply_sla2
from sla2_core.integrations.family import family_of
from sla2_core.training.capture import Captured, Captures, capture
from sla2_core.training.stage2.objectives import noisy_and_target
from sla2_core.variants import build_config
from sla2_eval.generation.sampling import load_generator
from sla2_eval.tiny.model import encode_captions, to_latents
from sla2_eval.tiny.shapes import sample

ROWS: tuple[tuple[str, dict[str, Any]], ...] = (
    *(("sparse_only", {"topk": k}) for k in (0.03, 0.10)),
    *(("sla", {"topk": k}) for k in (0.03, 0.10)),
    *(("vsa", {"topk": k}) for k in (0.03, 0.10)),
    *(
        ("vmoba", {"topk": k, "options": {"own_block": own}})
        for own in (False, True)
        for k in (0.03, 0.05, 0.10, 0.14, 0.15, 0.25)
    ),
    *(
        ("sparge_attention2", {"topk": k, "options": {"top_p": p}})
        for k in (0.015, 0.03)
        for p in (0.03, 0.05, 0.1, 0.15, 0.2)
    ),
)


def calls(model: str, samples: int, order: str, sizes: dict[str, int]) -> Iterator[Captured]:
    """Q, K, V of every layer of the model, on scenes at noise levels spread from 0 to 1."""
    transformer = load_generator(model).transformer.eval()
    family = family_of(transformer)
    heads, dim = family.heads(next(iter(family.attention_layers(transformer).values())))
    config = SLA2Config(head_dim=dim, num_heads=heads, topk=1.0, token_order=order, **sizes)

    @torch.no_grad()
    def run(index: int) -> None:
        video, caption = sample(1, index)
        clean = to_latents((video * 255).round().astype(np.uint8)[None])
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(index))
        level = torch.tensor([(index + 0.5) / samples], dtype=torch.float64)
        text = {"encoder_hidden_states": encode_captions([caption])}
        family.predict(transformer, noisy_and_target(clean, noise, level)[0], level, text)

    with tempfile.TemporaryDirectory() as folder:
        capture(apply_sla2(transformer, config), run, Path(folder), samples=samples)
        captures = Captures(Path(folder))
        for call in captures.calls:
            yield captures.load(call)


@torch.no_grad()
def measure(found: list[Captured], name: str, values: dict[str, Any]) -> tuple[float, float, float]:
    """Sparsity, FLOPs as a share of full attention's, and squared error relative to full
    attention's mean square, averaged over the captured calls.
    """
    _, heads, _, dim = found[0].q.shape
    config = build_config({"variant": name, **values}, head_dim=dim, num_heads=heads)
    attention = SLA2Attention(config)
    rows = []
    for call in found:
        full = full_attention(call.q, call.k, call.v)
        out, block_map, _ = attention.attend(call.q, call.k, call.v)
        error = float((out - full).square().mean() / full.square().mean())
        rows.append((block_map.sparsity, measured_share(block_map, config), error))
    sparsity, flops, error = np.mean(rows, axis=0).tolist()
    return sparsity, flops, error


def main(arguments: list[str] | None = None) -> int:
    """Print one line for each row."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0] if __doc__ else "")
    parser.add_argument("--model", default="tiny", help="the built-in model, or a folder")
    parser.add_argument("--samples", type=int, default=4, help="scenes, each at one noise level")
    parser.add_argument("--token-order", default="raster")
    parser.add_argument("--block-q", type=int, default=32)
    parser.add_argument("--block-k", type=int, default=16)
    given = parser.parse_args(arguments)
    sizes = {"block_q": given.block_q, "block_k": given.block_k}
    found = list(calls(given.model, given.samples, given.token_order, sizes))
    print(f"{given.model}, {found[0].q.shape[2]} tokens, {given.token_order}, {len(found)} calls")
    print("variant            settings                           sparsity  FLOPs   error")
    for name, values in ROWS:
        sparsity, flops, error = measure(found, name, {**values, **sizes})
        settings = ", ".join(f"{k}={v}" for k, v in {**values, **values.get("options", {})}.items())
        settings = settings.replace(f"options={values.get('options')}, ", "")
        print(f"{name:18} {settings:34} {sparsity:8.3f} {flops:7.3f} {error:7.3f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
