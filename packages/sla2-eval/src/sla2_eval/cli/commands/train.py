"""sla2 train teacher|router|finetune."""

from __future__ import annotations

import click

CONFIG = click.option("--config", required=True, type=click.Path(), help="YAML settings.")


@click.group("train")
def command():
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
def teacher(config, out):
    """Train the built-in tiny Wan from scratch; run again, it goes on from its last checkpoint.

    \b
    Example:
      sla2 train teacher --config experiments/tiny_wan/teacher.yaml --out runs/teacher
    """
    from sla2_eval.generation.sampling import can_write
    from sla2_eval.runs.progress import ProgressDisplay
    from sla2_eval.runs.settings import TeacherSettings, load_settings

    settings = load_settings(config, TeacherSettings)
    folder = can_write(out, "--out")
    from sla2_eval.tiny.teacher import TeacherConfig, train_teacher

    with ProgressDisplay() as report:
        done = train_teacher(
            TeacherConfig(**settings.model_dump(exclude={"videos"})),
            folder,
            videos=settings.videos,
            report=lambda step, loss: report("teacher", step, settings.steps),
        )
    click.echo(done)


@command.command("router")
@CONFIG
@click.option(
    "--out", required=True, type=click.Path(), help="Folder for captures, stage 1 and its adapter."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def router(config, out, as_json):
    """Stage 1: capture Q, K, V and train router and alpha; run again, it goes on where it was.

    Prints, for each layer and k%, the softmax mass that the learned router finds beside the
    heuristic one and the best.

    \b
    Example:
      sla2 train router --config experiments/tiny_wan/finetune.yaml --out runs/sla2
    """
    from sla2_eval.cli.commands.tables import show

    report = _train(config, out, tune=False)
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
@click.option(
    "--out", required=True, type=click.Path(), help="Folder for both stages and the adapter."
)
def finetune(config, out):
    """Stages 1 and 2: train router and alpha, then the model with the hard operator, low bit
    included.

    Prints the adapter's folder, which `sla2 generate --adapter` takes. Run again, finished parts
    are not done twice.

    \b
    Example:
      sla2 train finetune --config experiments/tiny_wan/finetune.yaml --out runs/sla2
    """
    _train(config, out, tune=True)
    click.echo(f"{out}/stage2/adapter")


def _train(config: str, out: str, *, tune: bool) -> dict:
    """Data, capture, stage 1, and stage 2 if `tune`; the last one's report. Refuses a folder made
    with other settings.
    """
    from sla2_eval.generation.sampling import can_write, load_generator, model_fingerprint
    from sla2_eval.grid import steps as pipeline
    from sla2_eval.runs.folders import note_settings
    from sla2_eval.runs.progress import ProgressDisplay
    from sla2_eval.runs.settings import TrainSettings, load_settings

    settings = load_settings(config, TrainSettings)
    folder = can_write(out, "--out")
    attention, inputs = (
        settings.attention,
        settings.model_dump(mode="json", include={"data", "capture"}),
    )
    if settings.data.videos is not None:
        inputs["data"]["videos"] = str(settings.data.videos.resolve())
    made = any((folder / name).exists() for name in ("data", "captures"))
    note_settings(
        folder / "inputs.json",
        {"model": model_fingerprint(settings.model), **inputs},
        replace=not made,
    )
    with ProgressDisplay() as report:
        data = pipeline.write_data(settings.data, folder / "data", report=report)
        pipeline.capture_qkv(
            load_generator(settings.model),
            data,
            settings.capture,
            folder / "captures",
            report=report,
        )
        found = pipeline.stage1(
            load_generator(settings.model),
            attention,
            folder / "captures",
            settings.stage1,
            settings.seed,
            folder / "stage1",
            report=report,
        )
        if tune:
            router = folder / "stage1" if attention.method == "sla2" else None
            found = pipeline.stage2(
                load_generator(settings.model),
                attention,
                router,
                data,
                settings.stage2,
                settings.seed,
                folder / "stage2",
                report=report,
            )
    return found
