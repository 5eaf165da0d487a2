"""Attention error by layer and noise level: the attention of each shipped adapter beside full
attention, on the same Q, K and V of the same trained model.

    python experiments/tiny_wan/measure_error.py --model tiny-1k --out runs/error-1k.json

The error is the mean square of the difference over the mean square of full attention's output.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from sla2_core.attend import full_attention
from sla2_core.integrations.handle import SLA2Handle
from sla2_core.integrations.loading import apply_adapter
from sla2_core.training.capture import Captures, capture
from sla2_core.training.stage2.objectives import noisy_and_target
from sla2_eval.generation.sampling import load_generator
from sla2_eval.runs.store import write_atomic
from sla2_eval.tiny.model import encode_captions, to_latents, weights_of
from sla2_eval.tiny.shapes import sample

SEED = 7  # of scenes that no training has seen: theirs have seeds 0 and 1
Errors = dict[int, dict[float, float]]  # by layer, then by noise level


def levels(count: int) -> list[float]:
    """`count` noise levels in the middle of equal parts of [0, 1]."""
    return [(index + 0.5) / count for index in range(count)]


@torch.no_grad()
def measure(handle: SLA2Handle, count: int, scenes: int) -> Errors:
    """The attention error of every layer at `count` noise levels, averaged over `scenes` scenes.
    Q, K and V are those of the model with full attention and the adapter's weights.
    """
    transformer = handle.transformer.eval()

    def run(index: int) -> None:
        video, caption = sample(SEED, index // count)
        clean = to_latents((video * 255).round().astype(np.uint8)[None])
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(index))
        level = torch.tensor([levels(count)[index % count]], dtype=torch.float64)
        text = {"encoder_hidden_states": encode_captions([caption])}
        handle.family.predict(transformer, noisy_and_target(clean, noise, level)[0], level, text)

    found: dict[int, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    with tempfile.TemporaryDirectory() as folder:
        capture(handle, run, folder, samples=count * scenes)
        for call in Captures(folder):
            full = full_attention(call.q, call.k, call.v)
            out = handle.attentions[call.layer].attend(call.q, call.k, call.v)[0]
            error = float((out - full).square().mean() / full.square().mean())
            found[call.layer][levels(count)[call.sample % count]].append(error)
    return {
        layer: {level: float(np.mean(errors)) for level, errors in sorted(row.items())}
        for layer, row in sorted(found.items())
    }


def table(name: str, errors: Errors) -> str:
    """Markdown: a row a layer, a column a noise level, and the means of both."""
    columns = list(next(iter(errors.values())))
    head = ["layer", *(f"sigma {level:.2g}" for level in columns), "mean"]
    rows = [
        [str(layer), *row.values(), np.mean(list(row.values()))] for layer, row in errors.items()
    ]
    means = np.mean([row[1:] for row in rows], axis=0)
    rows.append(["mean", *means])
    lines = [f"{name}:", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for first, *values in rows:
        lines.append(f"| {first} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Print a table for each adapter."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0] if __doc__ else "")
    parser.add_argument("--model", default="tiny", help="a built-in model")
    parser.add_argument("--adapter", type=Path, action="append", help="instead of the shipped ones")
    parser.add_argument("--levels", type=int, default=5, help="noise levels")
    parser.add_argument("--scenes", type=int, default=4, help="scenes, each at every noise level")
    parser.add_argument("--out", type=Path, help="a JSON file to write the errors to")
    given = parser.parse_args(arguments)
    adapters = given.adapter or sorted((weights_of(given.model) / "adapters").iterdir())
    found = {}
    for folder in adapters:
        transformer = load_generator(given.model).transformer
        handle = apply_adapter(transformer, folder)
        found[folder.name] = measure(handle, given.levels, given.scenes)
        print(table(folder.name, found[folder.name]), flush=True)
    if given.out is not None:
        write_atomic(given.out, json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
