"""What the commands print on stdout: a plain aligned table, or JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence

import click


def show(rows: Sequence[dict], columns: Sequence[str], *, as_json: bool) -> None:
    """Print `rows` (dicts) as JSON with all their keys, or as a table of `columns`."""
    if as_json:
        click.echo(json.dumps(list(rows), indent=2))
        return
    cells = [list(columns)] + [[_text(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


def _text(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
