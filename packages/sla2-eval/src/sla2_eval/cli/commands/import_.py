"""sla2 import turbodiffusion: checkpoints of other projects as folders that load here."""

from __future__ import annotations

from typing import Any

import click

from sla2_eval.cli.commands.tables import show


@click.group("import")
def command() -> None:
    """Bring checkpoints of other projects into a folder that diffusers and sla2 load.

    \b
    Example:
      sla2 import turbodiffusion TurboWan2.1-T2V-1.3B-480P.pth --out turbo
    """


@command.command("turbodiffusion")
@click.argument("file", type=click.Path())
@click.option("--out", required=True, type=click.Path(), help="Folder to make.")
@click.option(
    "--low-noise", type=click.Path(), help="The low-noise file of a Wan2.2 pair; FILE is the other."
)
@click.option(
    "--base",
    help="Pipeline of the same model, a diffusers folder or a hub id: OUT becomes a pipeline too.",
)
@click.option(
    "--topk", default=0.1, show_default=True, type=click.FloatRange(0, 1, min_open=True), help="k%."
)
@click.option("--block-q", default=128, show_default=True, type=click.IntRange(1))
@click.option("--block-k", default=64, show_default=True, type=click.IntRange(1))
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float32", "float16"]),
    default="bfloat16",
    show_default=True,
    help="The weights are stored in.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the folder.")
def turbodiffusion(
    file: str,
    out: str,
    low_noise: str | None,
    base: str | None,
    dtype: str,
    as_json: bool,
    **geometry: Any,
) -> None:
    """An SLA checkpoint of TurboDiffusion, of its own layout or FastVideo's or sglang's, as OUT.

    OUT/transformer holds diffusers' files and SLA as an adapter beside them, OUT/scheduler rCM's
    four-step sampler. The file does not say its block sizes and k%; the defaults are
    TurboDiffusion's for inference. Quantised checkpoints are dequantised. Prints OUT.

    \b
    Example:
      sla2 import turbodiffusion TurboWan2.1-T2V-1.3B-480P.pth --out turbo \\
          --base Wan-AI/Wan2.1-T2V-1.3B-Diffusers
      sla2 generate --model turbo --adapter turbo --steps 4 --guidance 1 --prompts p.txt --out runs
    """
    import torch
    from sla2_core.integrations.turbodiffusion import import_turbodiffusion

    from sla2_eval.generation.sampling import hide_loading_bars

    hide_loading_bars()
    folder = import_turbodiffusion(
        file, out, low_noise=low_noise, base=base, torch_dtype=getattr(torch, dtype), **geometry
    )
    if as_json:
        show([{"folder": str(folder)}], ("folder",), as_json=True)
    else:
        click.echo(folder)
