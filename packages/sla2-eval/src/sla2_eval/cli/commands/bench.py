"""sla2 bench: kernels and modules against the dense baselines on this machine."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import click

from sla2_eval.cli.commands.tables import show

# name -> module with `measure(report, quick) -> {"suite", "hardware", "rows": [...], ...}`, COLUMNS
# of the table, and perhaps plot(result, path)
SUITES = {"paper": "sla2_eval.bench_paper", "cpu": "sla2_eval.bench_cpu"}


@click.command("bench")
@click.option(
    "--suite",
    type=click.Choice(list(SUITES)),
    default="paper",
    show_default=True,
    help="paper: the GPU; cpu.",
)
@click.option("--quick", is_flag=True, help="Fewer settings and repetitions.")
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write everything to this file; a plot beside it.",
)
def command(suite, quick, json_file):
    """Time SLA2 whole and by stage against dense attention in one process, interleaved; median and
    spread.

    \b
    Example:
      sla2 bench --suite paper --json benchmarks/results/h200.json
    """
    from sla2_eval.runs.progress import ProgressDisplay

    module = importlib.import_module(SUITES[suite])
    with ProgressDisplay() as report:
        result = module.measure(report, quick)
    show(result["rows"], module.COLUMNS, as_json=False)
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(result, indent=1) + "\n")
        click.echo(f"{json_file}: {len(result['rows'])} rows", err=True)
        if hasattr(module, "plot"):
            module.plot(result, json_file.with_suffix(".png"))
