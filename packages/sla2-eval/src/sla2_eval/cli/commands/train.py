"""sla2 train teacher|router|finetune."""

from __future__ import annotations

from typing import Any

import click

CONFIG = click.option("--config", required=True, type=click.Path(), help="YAML settings.")
VIDEOS = click.option(
    "--videos",
    type=click.Path(),
    help="Folder of captioned mp4 files; the settings' data.videos if not given.",
)
GPUS = click.option(
    "--gpus", default=1, show_default=True, type=click.IntRange(1), help="Of the dry run."
)
RATE = click.option(
    "--rate",
    default=4e14,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="FLOP/s that one GPU reaches, of the dry run.",
)
DRY_RUN = click.option(
    "--dry-run",
    is_flag=True,
    help="Print parameters, memory and time by the cost model; nothing is loaded or written.",
)


@click.group("train")
def command() -> None:
    """Train the tiny teacher, a router (stage 1), or a whole variant (stages 1 and 2).

    \b
    Example:
      sla2 train teacher --config experiments/tiny_wan/teacher.yaml --out runs/teacher
    """


@command.command("teacher")
@CONFIG
@click.option(
    "--out",
    default="runs/teacher",
    show_default=True,
    type=click.Path(),
    help="Folder of the training.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the folder.")
def teacher(config: str, out: str, as_json: bool) -> None:
    """Train the built-in tiny Wan from scratch; run again, it goes on from its last checkpoint.

    \b
    Example:
      sla2 train teacher --config experiments/tiny_wan/teacher.yaml --out runs/teacher
    """
    from sla2_eval.cli.commands.tables import show
    from sla2_eval.generation.sampling import can_write
    from sla2_eval.runs.progress import ProgressDisplay
    from sla2_eval.runs.settings import load_settings
    from sla2_eval.tiny.teacher import TeacherConfig, train_teacher

    settings = load_settings(config, TeacherConfig)
    folder = can_write(out, "--out")
    with ProgressDisplay() as report:
        done = train_teacher(
            settings, folder, report=lambda step, loss: report("teacher", step, settings.steps)
        )
    if as_json:
        show([{"model": str(done)}], ("model",), as_json=True)
    else:
        click.echo(done)


@command.command("router")
@CONFIG
@VIDEOS
@click.option("--out", type=click.Path(), help="Folder for captures, stage 1 and its adapter.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@DRY_RUN
@GPUS
@RATE
def router(
    config: str,
    videos: str | None,
    out: str | None,
    as_json: bool,
    dry_run: bool,
    gpus: int,
    rate: float,
) -> None:
    """Stage 1: capture Q, K, V and train router and alpha; run again, it goes on where it was.

    The model is the built-in tiny one or a video pipeline of diffusers. Prints, for each
    layer and k%, the softmax mass that the learned router finds beside the heuristic one and the
    best.

    \b
    Example:
      sla2 train router --config experiments/tiny_wan/finetune.yaml --out runs/sla2
    """
    from sla2_eval.cli.commands.tables import show

    if dry_run:
        _estimate(config, gpus, rate, as_json)
        return
    report = _train(config, videos, _folder(out), tune=False)
    rows = [
        {
            "layer": row["layer"],
            "topk": row["topk"],
            **{f"mass {k}": v for k, v in row["mass"].items()},
        }
        | {f"error {k}": v for k, v in row["error"].items()}
        for row in report["layers"]
    ]
    show(rows, list(rows[0]) if rows else ["layer"], as_json=as_json)


@command.command("finetune")
@CONFIG
@VIDEOS
@click.option("--out", type=click.Path(), help="Folder for both stages and the adapter.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of lines.")
@DRY_RUN
@GPUS
@RATE
def finetune(
    config: str,
    videos: str | None,
    out: str | None,
    as_json: bool,
    dry_run: bool,
    gpus: int,
    rate: float,
) -> None:
    """Stages 1 and 2: train router and alpha, then the model with the hard operator, low bit
    included.

    Prints the adapter's folder, which `sla2 generate --adapter` takes. Run again, finished parts
    are not done twice.

    \b
    Example:
      sla2 train finetune --config experiments/tiny_wan/finetune.yaml --out runs/sla2
      sla2 train finetune --config experiments/wan2.1_1.3b/train.yaml --dry-run --gpus 8

    On several GPUs, after `sla2 train router` on one:

    \b
      accelerate launch -m sla2_eval.cli.main train finetune --config ... --out ...
    """
    from sla2_eval.cli.commands.tables import show
    from sla2_eval.parallel.launch import is_first_process

    if dry_run:
        _estimate(config, gpus, rate, as_json)
        return
    folder = _folder(out)
    _train(config, videos, folder, tune=True)
    if is_first_process():
        adapter = f"{folder}/stage2/adapter"
        if as_json:
            show([{"adapter": adapter}], ("adapter",), as_json=True)
        else:
            click.echo(adapter)


def _folder(out: str | None) -> str:
    if out is None:
        raise click.UsageError("--out: expected a folder, got none; only --dry-run needs none")
    return out


def _estimate(config: str, gpus: int, rate: float, as_json: bool) -> None:
    """Print what the training would take."""
    from dataclasses import asdict

    from sla2_eval.cli.commands.tables import show
    from sla2_eval.grid.estimate import estimate, rows
    from sla2_eval.grid.settings import TrainSettings
    from sla2_eval.runs.settings import load_settings

    found = estimate(load_settings(config, TrainSettings), gpus=gpus, rate=rate)
    if as_json:
        values = {**asdict(found), "memory_bytes": found.memory_bytes, "rate": rate}
        show([values], (), as_json=True)
        return
    show(rows(found), ("part", "what", "value"), as_json=False)
    click.echo(
        f"From the cost model, at {rate:.3g} FLOP/s on each GPU; not measured. Text encoders, VAE"
        " and the framework's own memory come on top."
    )


def _train(config: str, videos: str | None, out: str, *, tune: bool) -> dict[str, Any]:
    """The report of the last stage."""
    from pathlib import Path

    from sla2_eval.generation.sampling import can_write
    from sla2_eval.grid.settings import TrainSettings
    from sla2_eval.grid.train import train
    from sla2_eval.runs.progress import ProgressDisplay
    from sla2_eval.runs.settings import load_settings

    settings = load_settings(config, TrainSettings)
    if videos is not None:
        data = settings.data.model_copy(update={"videos": Path(videos)})
        settings = settings.model_copy(update={"data": data})
    folder = can_write(out, "--out")
    with ProgressDisplay() as report:
        return train(settings, folder, tune=tune, report=report)
