"""sla2 vbench: a folder of videos through the original VBench, and the table of its dimensions."""

from __future__ import annotations

import click

from sla2_eval.cli.commands.tables import show


@click.command("vbench")
@click.option(
    "--setup", is_flag=True, help="Make the environment that VBench runs in, with uv; minutes."
)
@click.option(
    "--videos", type=click.Path(), help="Folder of mp4 files, or a JSONL manifest, to export."
)
@click.option(
    "--info", type=click.Path(), help="VBench's full-info JSON: the dimensions of each prompt."
)
@click.option("--out", type=click.Path(), help="Folder for VBench's input and results.")
@click.option(
    "--dimensions", help="Comma-separated; all that VBench can score with what is known if not."
)
@click.option("--run", is_flag=True, help="Run VBench's own code on a GPU; it fetches its weights.")
@click.option(
    "--python", type=click.Path(), help="Of another environment with VBench than --setup's."
)
@click.option(
    "--scores",
    "folders",
    multiple=True,
    type=click.Path(),
    help="Folder of sla2 score with dimensions of the same videos; any number.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(
    setup: bool,
    videos: str | None,
    info: str | None,
    out: str | None,
    dimensions: str | None,
    run: bool,
    python: str | None,
    folders: tuple[str, ...],
    as_json: bool,
) -> None:
    """Run VBench's own code on videos, and print its 16 dimensions with Quality, Semantic and
    Total.

    A score is printed where all its dimensions are known, be it from VBench or from --scores. OUT
    is a folder that sla2 report takes.

    \b
    Example:
      sla2 vbench --setup
      sla2 vbench --videos runs/sla2 --info VBench_full_info.json --out runs/vbench \\
          --dimensions scene,color --run --scores runs/scores
    """
    from sla2_eval.scoring import vbench
    from sla2_eval.scoring.vbench_environment import environment
    from sla2_eval.scoring.vbench_environment import setup as make_environment

    said: list[dict] = []
    if setup:
        packages = make_environment()
        said.append({"environment": str(environment()), "packages": len(packages)})
    elif out is None:
        raise click.UsageError("--out: expected a folder, got none")
    found: dict[str, dict] = {}
    if out is not None:
        if videos:
            chosen = _names(dimensions)
            said.append({"info": str(vbench.export(videos, out, chosen, info))})
        if run:
            chosen = _names(dimensions) or vbench.exported_dimensions(out)
            found = vbench.run(out, chosen, python=python)
        elif vbench.has_results(out) or not (videos or folders or setup):
            found = vbench.read(out)
        if found and (source := videos or vbench.exported_from(out)):
            vbench.write_results(out, source, found)
        for folder in folders:
            found = vbench.with_scores(found, out, folder)
    if found:
        columns = ("dimension", "mean", "normalised", "note")
        show(vbench.table(found), columns, as_json=as_json)
    elif as_json:
        show(said, (), as_json=True)
    else:
        for row in said:
            click.echo(" ".join(str(value) for value in row.values()))


def _names(dimensions: str | None) -> list[str] | None:
    names = [name.strip() for name in (dimensions or "").split(",")]
    return [name for name in names if name] or None
