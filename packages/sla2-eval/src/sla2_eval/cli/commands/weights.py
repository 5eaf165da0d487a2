"""sla2 weights list|fetch: the files that metrics need."""

from __future__ import annotations

import click

from sla2_eval.cli.commands.tables import show


@click.group("weights")
def command() -> None:
    """List and fetch the weights that metrics need.

    \b
    Example:
      sla2 weights list
      sla2 weights fetch alexnet
    """


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def list_(as_json: bool) -> None:
    """Every file with its size, licence, metrics, and whether it is here.

    \b
    Example:
      sla2 weights list --json
    """
    from sla2_eval.scoring.weights import weights_list

    rows = [{**row, "used_by": ", ".join(row["used_by"])} for row in weights_list()]
    show(rows, ("name", "megabytes", "present", "used_by", "licence", "path"), as_json=as_json)


@command.command("fetch")
@click.argument("names", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of paths.")
def fetch(names: tuple[str, ...], as_json: bool) -> None:
    """Download files by name and check their sha256.

    \b
    Example:
      sla2 weights fetch alexnet clip_b32
    """
    from sla2_eval.runs.progress import ProgressDisplay
    from sla2_eval.scoring.weights import FILES, weights_fetch

    for name in names:
        if name not in FILES:
            raise click.UsageError(f"NAME: expected one of {', '.join(FILES)}, got {name!r}")
    found: list[dict[str, str]] = []
    with ProgressDisplay() as report:
        for name in names:

            def progress(got: int, expected: int | None, name: str = name) -> None:
                report(name, got, expected or got + 1)

            path = weights_fetch(name, progress)
            found.append({"name": name, "path": str(path)})
            if not as_json:
                click.echo(path)
    if as_json:
        show(found, ("name", "path"), as_json=True)
