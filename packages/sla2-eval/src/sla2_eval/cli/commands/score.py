"""sla2 score: metrics of a folder of videos."""

from __future__ import annotations

import click

from sla2_eval.cli.commands.tables import show


@click.command("score")
@click.option(
    "--videos",
    type=click.Path(),
    help="Folder of videos or of pictures, a JSONL manifest, or one file.",
)
@click.option(
    "--reference",
    type=click.Path(),
    help="Folder of the same file names, for paired and set metrics.",
)
@click.option(
    "--root",
    "roots",
    multiple=True,
    type=click.Path(),
    help="Folder that symbolic links of the videos may lead into; any number.",
)
@click.option(
    "--metrics",
    "names",
    help="Comma-separated names (see --list), MODULE:NAME of your own, or groups: paired, unpaired,"
    " set, vbench, all.",
)
@click.option(
    "--set",
    "given",
    multiple=True,
    metavar="METRIC.KEY=VALUE",
    help="A setting of a metric, such as fvd.clips=all or lpips.files.alexnet=PATH; any number.",
)
@click.option(
    "--out", type=click.Path(), help="Folder for results.json and the store of per-video results."
)
@click.option(
    "--num-workers",
    type=click.IntRange(1),
    help="Processes that decode and score; one for each GPU if not given, or one.",
)
@click.option("--ray-address", help="Join this Ray cluster; 'auto' finds one.")
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True
)
@click.option(
    "--decoder",
    type=click.Choice(["pyav", "torchcodec"]),
    default="pyav",
    show_default=True,
    help="Of the videos.",
)
@click.option(
    "--allow-failures",
    is_flag=True,
    help="Exit code 0 even if some videos failed; they are listed all the same.",
)
@click.option(
    "--allow-missing",
    is_flag=True,
    help="Exit code 0 even if a metric lacks its weights or package; it is listed all the same.",
)
@click.option(
    "--list", "list_metrics", is_flag=True, help="List the metrics and whether they can run here."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(
    videos: str | None,
    reference: str | None,
    roots: tuple[str, ...],
    names: str | None,
    given: tuple[str, ...],
    out: str | None,
    num_workers: int | None,
    ray_address: str | None,
    device: str,
    decoder: str,
    allow_failures: bool,
    allow_missing: bool,
    list_metrics: bool,
    as_json: bool,
) -> int | None:
    """Score every video of a folder, alone or against a reference folder.

    \b
    Example:
      sla2 score --videos runs/sparse --reference runs/full --metrics psnr,ssim --out runs/scores
    """
    from sla2_eval.scoring import metrics

    if list_metrics:
        _list(as_json)
        return None
    videos, names = _needed("--videos", videos), _needed("--metrics", names)
    out = _needed("--out", out)
    asked = [name.strip() for name in names.split(",") if name.strip()]
    try:
        chosen = metrics.select(asked, reference=reference is not None)
    except ValueError as error:
        raise click.UsageError(f"--metrics: {error}") from None
    settings = _settings(given)
    try:
        metrics.check_settings(settings, chosen)
    except ValueError as error:
        raise click.UsageError(f"--set: {error}") from None
    from sla2_eval.generation.sampling import can_write
    from sla2_eval.runs.progress import ProgressDisplay
    from sla2_eval.scoring.score import ScoringError, score

    can_write(out, "--out")
    failed = 0
    with ProgressDisplay() as report:
        try:
            results = score(
                videos,
                reference,
                asked,
                out,
                num_workers,
                ray_address,
                progress=lambda name, done, total: report(f"score {name}", done, total),
                device=device,
                decoder=decoder,
                settings=settings,
                roots=roots,
            )
        except ScoringError as error:
            results, failed = error.results, 0 if allow_failures else 1
    rows = [_row(name, results) for name in chosen]
    show(rows, ("metric", "mean", "low", "high", "videos", "difference", "note"), as_json=as_json)
    for side, found in results["left_out"].items():
        kinds = ", ".join(f"{number} {suffix}" for suffix, number in found.items())
        place = reference if side == "reference" else videos
        click.echo(f"sla2: warning: {place}: left out {kinds}", err=True)
    for row in results["failed"]:
        click.echo(f"sla2: error: {row['error']}", err=True)
    for name, reason in results["unavailable"].items():
        if not allow_missing:
            click.echo(f"sla2: error: {name}: {reason}", err=True)
    missing = bool(results["unavailable"]) and not allow_missing
    return int(failed or missing or not results["metrics"])


def _needed(option: str, value: str | None) -> str:
    if not value:
        raise click.UsageError(f"{option}: expected a value, got none")
    return value


def _settings(given: tuple[str, ...]) -> dict[str, dict]:
    """{metric: {key: value}} of METRIC.KEY=VALUE, values as YAML has them."""
    import yaml

    found: dict[str, dict] = {}
    for text in given:
        path, equals, value = text.partition("=")
        *parts, last = path.split(".")
        if not equals or not parts or not all((*parts, last)):
            raise click.UsageError(f"--set: expected METRIC.KEY=VALUE, got {text!r}")
        at = found
        for part in parts:
            at = at.setdefault(part, {})
            if not isinstance(at, dict):
                raise click.UsageError(f"--set: expected {part} once, got it twice in {text!r}")
        if last in at:
            raise click.UsageError(f"--set: expected {path} once, got it twice")
        try:
            at[last] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise click.UsageError(f"--set: expected a value in YAML, got {value!r}") from error
    return found


def _row(name: str, results: dict) -> dict:
    if name in results["unavailable"]:
        return {"metric": name, "note": results["unavailable"][name]}
    found = results["metrics"][name]
    low, high = found.get("interval") or (None, None)
    row = {
        "metric": name,
        "mean": found["mean"],
        "low": low,
        "high": high,
        "videos": found.get("num_videos"),
    }
    difference = found.get("difference")
    if difference:
        row["difference"] = difference["mean"]
        row["note"] = _tested(difference)
    encoded = found.get("num_videos", 0) - found.get("num_lossless", 0)
    if found["kind"] == "paired" and encoded:
        row["note"] = f"{encoded} of {found['num_videos']} as encoded, the codec's loss included"
    if found.get("warnings"):
        row["note"] = "; ".join(found["warnings"])
    return row


def _tested(difference: dict) -> str:
    """What the test of a difference to the reference says."""
    if difference["p"] is None:
        return "difference not tested: one prompt"
    shown = "no difference to the reference is shown" if difference["within_noise"] else "differs"
    return f"{shown} (p = {difference['p']:.2g})"


def _list(as_json: bool) -> None:
    from sla2_eval.scoring import metrics

    rows = [
        {
            "metric": name,
            "kind": spec.kind,
            "title": spec.title,
            "better": "higher" if spec.higher_is_better else "lower",
            "range": list(spec.value_range),
            "here": metrics.why_unavailable(spec) or "yes",
            "definition": spec.definition,
            "source": spec.source,
            "licence": spec.licence,
        }
        for name, spec in metrics.specs().items()
    ]
    show(
        rows,
        list(rows[0]) if as_json else ("metric", "kind", "better", "here", "definition", "licence"),
        as_json=as_json,
    )
