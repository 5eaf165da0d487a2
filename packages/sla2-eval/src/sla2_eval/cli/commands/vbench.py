"""sla2 vbench: the same folder of videos through the original VBench."""

from __future__ import annotations

import click

from sla2_eval.cli.commands.tables import show


@click.command("vbench")
@click.option(
    "--videos", type=click.Path(), help="Folder of mp4 files, or a JSONL manifest, to export."
)
@click.option(
    "--out", required=True, type=click.Path(), help="Folder for VBench's input and results."
)
@click.option(
    "--dimensions", help="Comma-separated dimensions; all that are known here if not given."
)
@click.option("--run", is_flag=True, help="Call `vbench evaluate`, which must be installed.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(videos: str | None, out: str, dimensions: str | None, run: bool, as_json: bool) -> None:
    """Write the folder and info file that VBench expects, run it, and read its results back.

    \b
    Example:
      sla2 vbench --videos runs/sparse --out runs/vbench --dimensions imaging_quality --run
    """
    from sla2_eval.scoring import vbench

    chosen = (
        [name.strip() for name in dimensions.split(",") if name.strip()]
        if dimensions
        else vbench.dimensions()
    )
    info = vbench.export(videos, out, chosen) if videos else None
    if info and not run:
        if as_json:
            show([{"info": str(info)}], ("info",), as_json=True)
        else:
            click.echo(info)
        return
    if info:
        click.echo(info, err=as_json)
    found = vbench.run(out, chosen) if run else vbench.read(out)
    rows = [{"dimension": name, **values} for name, values in found.items()]
    show(rows, ("dimension", "mean", "normalised"), as_json=as_json)
