"""sla2 preference: a blind page of two variants side by side, and the count of its votes."""

from __future__ import annotations

import click

from sla2_eval.cli.commands.tables import show


@click.group("preference")
def command() -> None:
    """Which of two variants people prefer, when they do not know which is which.

    \b
    Example:
      sla2 preference page runs/full runs/sla2 --variant sla2 --out runs/preference
      sla2 preference count runs/preference votes-*.json
      sla2 report runs/full runs/sla2 runs/preference
    """


@command.command("page")
@click.argument("folders", nargs=-1, required=True, type=click.Path(), metavar="FOLDER...")
@click.option("--variant", required=True, help="The label of its row in the report.")
@click.option("--reference", help="The folder, or the label, that it is compared with.")
@click.option("--out", required=True, type=click.Path(), help="A new folder.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the path.")
def page(
    folders: tuple[str, ...], variant: str, reference: str | None, out: str, as_json: bool
) -> None:
    """Write OUT/page, which raters open in a browser, and OUT/key.json, which they must not see.

    A FOLDER is one that sla2 report takes, with its videos. Give raters the folder OUT/page; their
    names and votes stay in their browser until they save them as a file.

    \b
    Example:
      sla2 preference page runs/full runs/sla2 --variant sla2 --out runs/preference
    """
    from sla2_eval.report.preference import export

    written = export(folders, variant, out, reference=reference)
    if as_json:
        show([{"page": str(written)}], ("page",), as_json=True)
    else:
        click.echo(written)


@command.command("count")
@click.argument("out", type=click.Path(), metavar="OUT")
@click.argument("votes", nargs=-1, required=True, type=click.Path(), metavar="VOTES...")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def count(out: str, votes: tuple[str, ...], as_json: bool) -> None:
    """Count the files that raters saved, into OUT/results.json; OUT is a folder for sla2 report.

    \b
    Example:
      sla2 preference count runs/preference votes-anna.json votes-ben.json
    """
    from sla2_eval.report.preference import count as count_votes

    found = count_votes(out, votes)
    low, high = found["interval"] or (None, None)
    undecided = found.get("num_left_out", 0)
    row = {
        "metric": "preference",
        "mean": found["mean"],
        "low": low,
        "high": high,
        "pairs": found["num_videos"],
        "undecided": undecided,
        "raters": found["num_raters"],
        "not_shown": found["num_not_shown"],
        **{f"votes_{side}": number for side, number in found["votes"].items()},
    }
    show([row], tuple(row), as_json=as_json)
