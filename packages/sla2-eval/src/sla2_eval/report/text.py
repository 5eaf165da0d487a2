"""How a report writes figures and settings."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping


def number(value: float | None) -> str:
    """A figure for the tables: two decimals from ten on, else four, or two digits where four
    decimals show none; a dash for none.
    """
    if value is None:
        return "–"
    if 0 < abs(value) < 0.0001:
        return f"{value:.1e}"
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.4f}"


def seconds(value: float | None) -> str:
    """Seconds to three digits, or "unknown"."""
    if value is None:
        return "unknown"
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def unbroken(text: str) -> str:
    """Text whose lines do not end before a percent sign or inside "p ≤ 0.01"."""
    return re.sub(r" (?=%)|(?<=\bp) (?=[≤<0-9])|(?<=[≤<]) (?=\d)", "\u00a0", text)


def signed(value: float) -> str:
    """A difference for the tables: a figure with its sign."""
    return f"{'' if value < 0 else '+'}{number(value)}"


def percent(fraction: float | None) -> str:
    """A sparsity as percent, without needless digits; "unknown" where it is not known."""
    if fraction is None:
        return "unknown"
    return f"{100 * fraction:.1f}".removesuffix(".0") + " %"


def flat(value: Mapping, prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted name, text) pairs."""
    rows = []
    for key, item in value.items():
        if isinstance(item, Mapping):
            rows += flat(item, f"{prefix}{key}.")
        else:
            rows.append(
                (
                    f"{prefix}{key}",
                    item if isinstance(item, str) else json.dumps(item, ensure_ascii=False),
                )
            )
    return rows
