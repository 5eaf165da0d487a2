"""sla2 report: the report of a finished or half-finished run."""

from __future__ import annotations

import click


@click.command("report")
@click.argument("folder", type=click.Path())
def command(folder: str) -> None:
    """Write FOLDER/report: one HTML page, results.json, CSV and Markdown tables.

    FOLDER is that of a quickstart, of an ablation or of `sla2 score`.

    \b
    Example:
      sla2 report runs/quickstart
    """
    from pathlib import Path

    from sla2_eval.report.data import is_run
    from sla2_eval.report.page import write_report

    if not is_run(Path(folder)):
        known = "of quickstart or ablate with run.json, or of score with inputs.json"
        raise click.UsageError(f"FOLDER: expected a folder {known}, got {folder}")
    click.echo(write_report(Path(folder)))
