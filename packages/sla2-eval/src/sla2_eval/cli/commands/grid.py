"""What quickstart and ablate share: progress, the table, the report's path, the exit code."""

from __future__ import annotations

from collections.abc import Callable

import click

from sla2_eval.cli.commands.tables import show


def run(grid: Callable, out: str, as_json: bool) -> int:
    """Call grid(report) with a progress display, print its table and where the report is; 1 if a
    video failed or a task was lost.
    """
    from sla2_eval.generation.sampling import can_write
    from sla2_eval.runs.progress import ProgressDisplay

    can_write(out, "--out")
    with ProgressDisplay() as report:
        result = grid(report)
    columns = list(dict.fromkeys(key for row in result.rows for key in row))
    show(result.rows, columns, as_json=as_json)
    click.echo(f"report: {result.report}", err=as_json)
    if result.failed:
        click.echo(f"sla2: error: {result.failed} scores failed; the report lists them", err=True)
    for task, reason in result.lost.items():
        click.echo(f"sla2: error: {task}: {reason}; run again to go on", err=True)
    return int(bool(result.failed or result.lost))
