"""sla2 report: one page and tables over the folders of runs, scores and generated videos."""

from __future__ import annotations

import click

from sla2_eval.cli.commands.tables import show


@click.command("report")
@click.argument("folders", nargs=-1, required=True, type=click.Path(), metavar="FOLDER...")
@click.option(
    "--reference",
    help="The folder, or the label of the variant, that the others are compared with.",
)
@click.option(
    "--out",
    type=click.Path(),
    help="Folder of the report; FOLDER/report if there is one FOLDER, else ./report.",
)
@click.option("--title", help="Of the page; the runs' own if not given.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the path.")
def command(
    folders: tuple[str, ...],
    reference: str | None,
    out: str | None,
    title: str | None,
    as_json: bool,
) -> None:
    """Write one HTML page, results.json, CSV and Markdown tables over any number of folders.

    A FOLDER is that of quickstart, of ablate, of score or of generate, or the results.json of
    another report. Parts of one variant, such as other seeds or other metrics of the same videos,
    share a row.

    \b
    Example:
      sla2 report runs/quickstart
      sla2 report runs/full runs/sla2 scores/full scores/sla2 --reference runs/full --out report
    """
    from sla2_eval.report.page import write_report

    page = write_report(folders, reference=reference, out=out, title=title)
    if as_json:
        show([{"report": str(page)}], ("report",), as_json=True)
    else:
        click.echo(page)
