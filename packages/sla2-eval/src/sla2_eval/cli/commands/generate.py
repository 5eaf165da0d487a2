"""sla2 generate: videos for a file of prompts, with full attention, an SLA2 adapter, or several
side by side.
"""

from __future__ import annotations

from typing import Any

import click

from sla2_eval.cli.commands.tables import show


def _number_or_benchmark(ctx: click.Context, _: click.Parameter, value: str) -> int | None:
    """None is the benchmark's number."""
    if value == "benchmark":
        return None
    if not value.isdigit() or int(value) < 1:
        raise click.UsageError(
            f"--videos-per-prompt: expected a number of at least 1 or 'benchmark', got {value!r}",
            ctx,
        )
    return int(value)


@click.command("generate")
@click.option(
    "--model",
    default="tiny",
    show_default=True,
    help="'tiny', 'tiny-1k', 'tiny-4k', a diffusers folder, or a hub id.",
)
@click.option(
    "--adapter", type=click.Path(), help="Folder of an SLA2 adapter; without it, full attention."
)
@click.option(
    "--variant",
    "given",
    multiple=True,
    help="NAME=ADAPTER or NAME=full, into OUT/NAME; any number of them.",
)
@click.option(
    "--imports",
    multiple=True,
    metavar="MODULE",
    help="A module that registers members of your own, which an adapter names; any number of them.",
)
@click.option(
    "--prompts",
    required=True,
    type=click.Path(),
    help="Text file of one prompt a line, or VBench's full-info JSON.",
)
@click.option(
    "--names",
    type=click.Path(),
    help="File of the original prompts, line by line, where PROMPTS are longer versions.",
)
@click.option("--info", type=click.Path(), help="VBench's full-info JSON of a text file's prompts.")
@click.option("--dimensions", help="Comma-separated: only prompts of these, by the JSON.")
@click.option(
    "--out",
    required=True,
    type=click.Path(),
    help="Folder for the mp4 files, png of an image model, and their manifest.",
)
@click.option(
    "--videos-per-prompt",
    default="1",
    show_default=True,
    callback=_number_or_benchmark,
    help="A number, or 'benchmark': as many as VBench asks for, by the JSON.",
)
@click.option("--steps", type=click.IntRange(1), help="Denoising steps; the pipeline's own if not.")
@click.option("--guidance", type=click.FloatRange(0), help="Guidance scale; the pipeline's own.")
@click.option("--flow-shift", type=float, help="Shift of the noise schedule; the scheduler's own.")
@click.option("--negative-prompt", help="For every prompt; the pipeline's own if not given.")
@click.option("--fps", type=float, help="Frames a second of the files; the model's own.")
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the initial noise."
)
@click.option(
    "--batch-size", default=4, show_default=True, type=click.IntRange(1), help="Videos at a time."
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
)
@click.option("--num-frames", type=click.IntRange(1), help="The model's own if not given.")
@click.option("--height", type=click.IntRange(1), help="The model's own if not given.")
@click.option("--width", type=click.IntRange(1), help="The model's own if not given.")
@click.option(
    "--lossless/--no-lossless",
    default=True,
    show_default=True,
    help="Keep each video to the bit too, in OUT/lossless, for paired metrics.",
)
@click.option(
    "--workers",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="Processes (CPU models).",
)
@click.option(
    "--ray-address", help="Share the videos by the GPUs of this Ray cluster; 'auto' finds one."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of lines.")
def command(
    model: str,
    adapter: str | None,
    given: tuple[str, ...],
    imports: tuple[str, ...],
    prompts: str,
    names: str | None,
    info: str | None,
    dimensions: str | None,
    out: str,
    videos_per_prompt: int | None,
    workers: int,
    ray_address: str | None,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Write {prompt}-{index}.mp4 for every prompt; run again, finished files are not done twice.

    The same prompts, seed and steps give every adapter the same initial noise. Several GPUs of this
    machine, or of a cluster, share the videos as Ray tasks.

    \b
    Example:
      sla2 generate --model tiny --prompts experiments/tiny_wan/prompts.txt --out runs/full
      sla2 generate --variant full=full --variant sla2=ADAPTER --prompts prompts.txt --out runs/both
      sla2 generate --model MODEL --prompts all_dimension_longer.txt --names all_dimension.txt \\
          --info VBench_full_info.json --videos-per-prompt benchmark --out runs/vbench
    """
    from pathlib import Path

    from sla2_eval.generation.prompts import read_prompts
    from sla2_eval.generation.sampling import SamplingConfig, can_write
    from sla2_eval.generation.variants import generate_variants, read_variants
    from sla2_eval.runs.progress import ProgressDisplay

    if adapter and given:
        raise ValueError("--adapter: expected none beside --variant, got one")
    chosen = [name.strip() for name in (dimensions or "").split(",") if name.strip()]
    lines = read_prompts(prompts, names=names, info=info, dimensions=chosen)
    can_write(out, "--out")
    variants = read_variants(given, Path(out)) or {Path(out): adapter}
    with ProgressDisplay() as report:
        manifests = generate_variants(
            model,
            variants,
            lines,
            SamplingConfig(**sampling),
            indices=None if videos_per_prompt is None else range(videos_per_prompt),
            imports=imports,
            workers=workers,
            ray_address=ray_address,
            report=report,
        )
    if as_json:
        rows = [{"manifest": str(manifest)} for manifest in manifests]
        show(rows, ("manifest",), as_json=True)
        return
    for manifest in manifests:
        click.echo(manifest)
