"""sla2 quickstart: the whole pipeline on the built-in tiny model."""

from __future__ import annotations

import click


@click.command("quickstart")
@click.option(
    "--out",
    default="runs/quickstart",
    show_default=True,
    type=click.Path(),
    help="Folder of the run.",
)
@click.option(
    "--model",
    default="tiny-4k",
    show_default=True,
    help="'tiny-4k', of 4,096 tokens; 'tiny' or 'tiny-1k', of 1,024; or a folder of such a model.",
)
@click.option(
    "--workers",
    default=2,
    show_default=True,
    type=click.IntRange(0),
    help="Processes of one thread each.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(out: str, model: str, workers: int, as_json: bool) -> int:
    """Train, generate, score and report SLA2 on a built-in tiny model, in minutes on two CPU
    cores.

    Killed half-way and started again, it goes on where it was.

    \b
    Example:
      sla2 quickstart --out runs/quickstart
    """
    from sla2_eval.cli.commands.grid import run
    from sla2_eval.grid.quickstart import run_quickstart, settings

    return run(
        lambda report: run_quickstart(settings(model, workers), out, report=report), out, as_json
    )
