"""sla2 report: the report of a finished or half-finished run."""

from __future__ import annotations

import click


@click.command("report")
@click.argument("folder", type=click.Path())
def command(folder):
    """Write FOLDER/report: one HTML page, results.json, CSV and Markdown tables.

    \b
    Example:
      sla2 report runs/quickstart
    """
    from pathlib import Path

    from sla2_eval.report import write_report

    if not (Path(folder) / "run.json").is_file():
        raise click.UsageError(f"FOLDER: expected a folder of quickstart or ablate with run.json, got {folder}")
    click.echo(write_report(Path(folder)))
