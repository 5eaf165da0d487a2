"""sla2 bench: kernels and modules against the dense baselines on this machine."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import click

from sla2_eval.cli.commands.tables import show

# name -> module of the checkout with `measure(report, quick) -> {"suite", "hardware", "rows":
# [...], ...}`, COLUMNS of the table, and perhaps plot(result, path)
SUITES = {
    "paper": "benchmarks.bench_paper",
    "cpu": "benchmarks.bench_cpu",
    "model": "benchmarks.gpu_model",
}


@click.command("bench")
@click.option(
    "--suite",
    type=click.Choice(["paper", "cpu"]),
    default="paper",
    show_default=True,
    help="paper: the GPU; cpu.",
)
@click.option(
    "--model",
    is_flag=True,
    help="Measure nothing: model each stage's milliseconds on GPUs from the code's counts.",
)
@click.option("--quick", is_flag=True, help="Fewer settings and repetitions.")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write everything to this file, as JSON; a plot beside it.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(suite: str, model: bool, quick: bool, out: Path | None, as_json: bool) -> None:
    """Time SLA2 whole and by stage against dense attention in one process, interleaved; median and
    spread.

    The suites are in benchmarks/ of the repository: it needs a checkout.

    \b
    Example:
      sla2 bench --suite paper --out benchmarks/results/h200.json
    """
    from sla2_eval.runs.progress import ProgressDisplay

    module = _import_suite("model" if model else suite)
    with ProgressDisplay() as report:
        result = module.measure(report, quick)
    show(result["rows"], module.COLUMNS, as_json=as_json)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
        click.echo(f"{out}: {len(result['rows'])} rows", err=True)
        if hasattr(module, "plot"):
            module.plot(result, out.with_suffix(".png"))


def _import_suite(name: str) -> ModuleType:
    """The module of the suite, from the checkout that this file is in. Raises UsageError if it is
    in none, as in an installed wheel.
    """
    file = Path(*SUITES[name].split(".")).with_suffix(".py")
    for folder in Path(__file__).resolve().parents:
        if (folder / file).is_file():
            sys.path.insert(0, str(folder))
            return importlib.import_module(SUITES[name])
    raise click.UsageError(
        f"bench: expected a checkout of the repository, which has {file}, got a package installed"
        f" at {Path(__file__).resolve().parents[2]}"
    )
