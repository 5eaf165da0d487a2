"""sla2 doctor: what works here."""

from __future__ import annotations

import click

from sla2_eval.cli.commands.tables import show


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(as_json: bool) -> int:
    """Say what works on this machine, what is missing, and how to get it; 1 if something that is
    needed is broken.

    \b
    Example:
      sla2 doctor
    """
    from sla2_eval.cli.doctor import examine

    rows = [finding.to_dict() for finding in examine()]
    show(rows, ("what", "status", "detail", "get"), as_json=as_json)
    return int(any(row["status"] == "broken" for row in rows))
