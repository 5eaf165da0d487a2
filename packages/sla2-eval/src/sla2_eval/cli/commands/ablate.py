"""sla2 ablate: a grid of variants, each trained, generated, scored and compared with full
attention.
"""

from __future__ import annotations

import click


@click.command("ablate")
@click.option("--config", required=True, type=click.Path(), help="YAML file of the grid.")
@click.option("--out", required=True, type=click.Path(), help="Folder of the run.")
@click.option(
    "--workers",
    type=click.IntRange(0),
    help="Processes of one thread each; the file's if not given.",
)
@click.option(
    "--ray-address",
    help="Run as Ray tasks on this cluster, a GPU each where it has any; 'auto' finds one.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(
    config: str, out: str, workers: int | None, ray_address: str | None, as_json: bool
) -> int:
    """Run a grid of variants over seeds; run again, finished parts are not done twice.

    On a machine with several GPUs, or a Ray cluster, it runs as Ray tasks of one GPU each instead
    of --workers processes.

    \b
    Example:
      sla2 ablate --config experiments/tiny_wan/ablation.yaml --out runs/ablation
    """
    from sla2_eval.cli.commands.grid import run
    from sla2_eval.grid.ablation import run_grid
    from sla2_eval.grid.settings import AblationSettings
    from sla2_eval.runs.settings import load_settings

    settings = load_settings(config, AblationSettings)
    if workers is not None:
        settings = settings.model_copy(update={"workers": workers})

    return run(
        lambda report: run_grid(settings, out, ray_address=ray_address, report=report),
        out,
        as_json,
    )
