"""python -m sla2_core.integrations.inspect MODEL: which layers SLA2 would replace, and what that
costs and saves.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from sla2_core.attention import build_attention
from sla2_core.block_map import num_blocks
from sla2_core.config import SLA2Config
from sla2_core.cost import sla2_cost
from sla2_core.integrations.family import family_of, transformer_class
from sla2_core.integrations.loading import local_folder


def read_config(source: str | Path) -> dict[str, Any]:
    """The content of a diffusers transformer's config.json.

    Args:
        source: a transformer's folder, a pipeline's folder with transformer/ in it, or the hub id
            of either.

    Raises:
        FileNotFoundError: no such folder, hub id or file. ValueError: the file is no JSON.
    """
    folder = local_folder(source, ["config.json", "transformer/config.json"])
    for path in (folder / "transformer" / "config.json", folder / "config.json"):
        if path.is_file():
            try:
                return json.loads(path.read_text())
            except ValueError as error:
                raise ValueError(f"{path}: expected JSON, got: {error}") from None
    raise FileNotFoundError(
        f"{folder}: expected transformer/config.json or config.json, found neither"
    )


def inspect_model(
    config: dict[str, Any],
    *,
    topk: float,
    block_q: int,
    block_k: int,
    latent_shape: tuple[int, int, int] | None = None,
    text_tokens: int = 0,
) -> dict[str, Any]:
    """What SLA2 would replace in the model of a diffusers configuration; the model is built without
    weights.

    Args:
        config: as read_config gives it.
        topk: k% in (0, 1]. block_q, block_k: tokens in a query block and in a key block.
        latent_shape: (frames, height, width) of the latents; None takes the family's usual setting.
        text_tokens: text tokens that take part in the attention.

    Returns:
        {"class", "family", "latent_shape", "tokens", "text_tokens", "topk", "block_q", "block_k",
        "layers", "totals"}, JSON values. Each layer has {"name", "heads", "head_dim", "map" (T_m,
        T_n), "selected" (blocks in a row), "flops_before", "flops_after", "bytes_before",
        "bytes_after", "parameters"}, for one forward pass of one sample; a multiply-add counts as
        two. The totals are sums over the layers, of bytes the largest. Bytes are those of what
        attention makes beside Q, K, V and O: the N x N scores of a plain implementation in 16 bits,
        and SLA2's block map, states and log-sum-exp.

    Raises:
        ValueError: a class without an integration, or a k% or block size outside its range.
    """
    kind = transformer_class(config.get("_class_name"), "_class_name")
    with torch.device("meta"):
        transformer = kind.from_config(config)
    family = family_of(transformer)
    shape = latent_shape or family.latent_shape
    tokens = family.tokens(transformer.config, *shape)
    n_k = tokens + text_tokens
    t_m, t_n = num_blocks(tokens, block_q), num_blocks(n_k, block_k)
    layers = []
    for layer, attn in family.attention_layers(transformer).items():
        heads, dim = family.heads(attn)
        cost = sla2_cost(
            n_q=tokens,
            n_k=n_k,
            num_heads=heads,
            head_dim=dim,
            topk=topk,
            block_q=block_q,
            block_k=block_k,
        )
        layer_config = SLA2Config(
            head_dim=dim, num_heads=heads, topk=topk, block_q=block_q, block_k=block_k
        )
        with torch.device("meta"):
            attention = build_attention(layer_config)
        chosen = max(1, round(topk * t_n))
        layers.append(
            {
                "name": layer,
                "heads": heads,
                "head_dim": dim,
                "map": [t_m, t_n],
                "selected": chosen,
                "flops_before": cost.full_flops,
                "flops_after": cost.flops,
                "bytes_before": 2 * heads * tokens * n_k,
                "bytes_after": (
                    heads
                    * (4 * t_m * (chosen + 1) + 4 * (t_m + t_n) * dim * (dim + 1) + 4 * tokens)
                ),
                "parameters": sum(p.numel() for p in attention.parameters()),
            }
        )
    totals = {
        key: sum(layer[key] for layer in layers)
        for key in ("flops_before", "flops_after", "parameters")
    }
    totals |= {key: max(layer[key] for layer in layers) for key in ("bytes_before", "bytes_after")}
    return {
        "class": kind.__name__,
        "family": family.name,
        "latent_shape": list(shape),
        "tokens": tokens,
        "text_tokens": text_tokens,
        "topk": topk,
        "block_q": block_q,
        "block_k": block_k,
        "layers": layers,
        "totals": totals,
    }


def _table(found: dict[str, Any]) -> str:
    frames, height, width = found["latent_shape"]
    rows = [("layer", "heads", "d", "map", "blocks/row", "before", "after", "ratio")]
    for layer in found["layers"]:
        t_m, t_n = layer["map"]
        rows.append(
            (
                layer["name"],
                str(layer["heads"]),
                str(layer["head_dim"]),
                f"{t_m} x {t_n}",
                str(layer["selected"]),
                f"{layer['flops_before'] / 1e12:.3f} TF",
                f"{layer['flops_after'] / 1e12:.3f} TF",
                f"{layer['flops_before'] / layer['flops_after']:.1f}x",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows
    ]
    total = found["totals"]
    head = (
        f"{found['class']} ({found['family']}): {found['tokens']} video tokens and"
        f" {found['text_tokens']} text tokens (latents {frames} x {height} x {width}), k% ="
        f" {found['topk']:g}, blocks {found['block_q']} x {found['block_k']}"
    )
    foot = (
        f"attention of one forward pass: {total['flops_before'] / 1e12:.2f} ->"
        f" {total['flops_after'] / 1e12:.2f} TFLOPs"
        f" ({total['flops_before'] / total['flops_after']:.1f}x fewer); largest layer's scores, if"
        f" made whole: {total['bytes_before'] / 2**20:.0f} MiB ->"
        f" {total['bytes_after'] / 2**20:.1f} MiB of map, states and sums; {total['parameters']}"
        " new parameters"
    )
    return "\n".join([head, *lines, foot])


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m sla2_core.integrations.inspect",
        description=__doc__,
        epilog=(
            "example: python -m sla2_core.integrations.inspect ./Wan2.1-T2V-1.3B-Diffusers --topk"
            " 0.03"
        ),
    )
    parser.add_argument("model", help="folder of a diffusers pipeline or transformer, or a hub id")
    parser.add_argument(
        "--topk", type=float, default=0.03, help="fraction of key blocks per query block"
    )
    parser.add_argument("--block-q", type=int, default=128)
    parser.add_argument("--block-k", type=int, default=64)
    parser.add_argument(
        "--latents",
        help="FRAMESxHEIGHTxWIDTH in latent units; the family's usual setting by default",
    )
    parser.add_argument(
        "--text-tokens", type=int, default=0, help="text tokens that take part in the attention"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    given = parser.parse_args(arguments)
    try:
        shape: tuple[int, int, int] | None = None
        if given.latents:
            parts = given.latents.split("x")
            if len(parts) != 3 or not all(p.isdigit() and int(p) for p in parts):
                raise ValueError(
                    "--latents: expected FRAMESxHEIGHTxWIDTH such as 21x60x104, got"
                    f" {given.latents!r}"
                )
            frames, height, width = (int(p) for p in parts)
            shape = (frames, height, width)
        found = inspect_model(
            read_config(given.model),
            topk=given.topk,
            block_q=given.block_q,
            block_k=given.block_k,
            latent_shape=shape,
            text_tokens=given.text_tokens,
        )
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=2) if given.json else _table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
