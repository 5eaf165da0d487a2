"""Small charts of quality against sparsity as SVG, coloured by the style sheet of the page they
stand in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 320, 224
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 14, 12, 34
_MARKERS = ("circle", "square", "triangle", "diamond", "cross", "ring", "bar", "star")
NUM_COLOURS = 8


def marker(number: int, x: float, y: float, size: float = 4.2) -> str:
    """The glyph of family `number`: families differ in colour and in shape."""
    shape = _MARKERS[(number + number // NUM_COLOURS) % len(_MARKERS)]
    style = f'class="mark c{number % NUM_COLOURS}"'
    if shape in ("circle", "ring"):
        extra = ' fill-opacity="0"' if shape == "ring" else ""
        return f'<circle {style}{extra} cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}"/>'
    outline = {
        "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        "triangle": [(0, -1.15), (1.1, 0.85), (-1.1, 0.85)],
        "diamond": [(0, -1.3), (1.2, 0), (0, 1.3), (-1.2, 0)],
        "bar": [(-1.3, -0.45), (1.3, -0.45), (1.3, 0.45), (-1.3, 0.45)],
        "cross": [
            (-0.4, -1.2),
            (0.4, -1.2),
            (0.4, -0.4),
            (1.2, -0.4),
            (1.2, 0.4),
            (0.4, 0.4),
            (0.4, 1.2),
            (-0.4, 1.2),
            (-0.4, 0.4),
            (-1.2, 0.4),
            (-1.2, -0.4),
            (-0.4, -0.4),
        ],
        "star": [
            (
                (1.5 if k % 2 == 0 else 0.62) * math.sin(k * math.pi / 5),
                -(1.5 if k % 2 == 0 else 0.62) * math.cos(k * math.pi / 5),
            )
            for k in range(10)
        ],
    }[shape]
    points = " ".join(f"{x + size * dx:.1f},{y + size * dy:.1f}" for dx, dy in outline)
    return f'<polygon {style} points="{points}"/>'


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers inside [low, high], about `count` of them."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _span(values: Sequence[float], least: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = max((high - low) * 0.12, least)
    return low - margin, high + margin


def _dodge(families: Mapping[str, Sequence[Mapping]]) -> dict[tuple[str, float], float]:
    """How far to move each point sideways, so that families of the same sparsity do not cover one
    another.
    """
    beside: dict[float, list[str]] = {}
    for name, family in families.items():
        for point in family:
            beside.setdefault(round(point["sparsity"], 2), []).append(name)
    step = {place: min(7.0, 28.0 / len(names)) for place, names in beside.items()}
    return {
        (name, point["sparsity"]): (
            step[place] * (beside[place].index(name) - (len(beside[place]) - 1) / 2)
        )
        for name, family in families.items()
        for point in family
        for place in [round(point["sparsity"], 2)]
    }


def chart(
    title: str,
    note: str,
    families: Mapping[str, Sequence[Mapping]],
    numbers: Mapping[str, int],
    full: float | None = None,
    theirs: bool = False,
) -> str:
    """One panel: a line a family over sparsity in percent, with error bars, and full attention as a
    dashed line.

    `families`: points {"sparsity", "value", "low"?, "high"?, "label"?} by name; `numbers`: the
    colour and glyph of each; `theirs` marks points that are the paper's and not measured here.
    """
    points = [point for family in families.values() for point in family]
    if not points:
        raise ValueError(f"families: expected at least one point for {title!r}, got none")
    values = [v for p in points for v in (p["value"], p.get("low"), p.get("high")) if v is not None]
    low, high = _span(
        values + ([full] if full is not None else []),
        0.02 * max(1e-6, max(abs(v) for v in values)) / 2,
    )
    sparsities = [100 * point["sparsity"] for point in points]
    left, right = _span(sparsities, 1.0)

    def at(sparsity: float, value: float) -> tuple[float, float]:
        x = _LEFT + (100 * sparsity - left) / (right - left) * (WIDTH - _LEFT - _RIGHT)
        y = HEIGHT - _BOTTOM - (value - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)
        return x, y

    parts = [
        f'<svg class="chart{" theirs" if theirs else ""}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
        f' aria-label="{escape(title)} against sparsity">'
    ]
    for tick in ticks(low, high):
        _, y = at(0, tick)
        parts.append(
            f'<line class="gridline" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(
            f'<text class="tick" x="{_LEFT - 7}" y="{y + 3.5:.1f}"'
            f' text-anchor="end">{tick:g}</text>'
        )
    known = sorted(set(sparsities))
    gaps = [(b - a) / (right - left) * (WIDTH - _LEFT - _RIGHT) for a, b in pairwise(known)]
    for tick in known if len(known) <= 5 and min(gaps, default=99) > 25 else ticks(left, right):
        x, _ = at(tick / 100, low)
        parts.append(
            f'<line class="stub" x1="{x:.1f}" x2="{x:.1f}" y1="{HEIGHT - _BOTTOM}"'
            f' y2="{HEIGHT - _BOTTOM + 4}"/>'
        )
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{HEIGHT - _BOTTOM + 16}"'
            f' text-anchor="middle">{tick:.3g}</text>'
        )
    parts.append(
        f'<text class="axis" x="{WIDTH - _RIGHT}" y="{HEIGHT - 4}" text-anchor="end">sparsity,'
        " %</text>"
    )
    parts.append(
        f'<line class="frame" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{HEIGHT - _BOTTOM}"'
        f' y2="{HEIGHT - _BOTTOM}"/>'
    )
    if full is not None:
        _, y = at(0, full)
        above = y - 5 if y > _TOP + 14 else y + 13
        parts.append(
            f'<line class="full" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(
            f'<text class="fulllabel" x="{_LEFT + 4}" y="{above:.1f}">full attention'
            f" {full:.4g}</text>"
        )
    shift = _dodge(families)
    for name, family in families.items():
        number = numbers[name]
        ordered = sorted(family, key=lambda point: point["sparsity"])
        places = [
            (x + shift[name, p["sparsity"]], y)
            for p in ordered
            for x, y in [at(p["sparsity"], p["value"])]
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        if len(ordered) > 1:
            parts.append(f'<polyline class="line c{number % NUM_COLOURS}" points="{path}"/>')
        for point, (x, y) in zip(ordered, places, strict=True):
            said = f"{point.get('label', name)}: {point['value']:.4g}"
            parts.append("<g>")
            if point.get("low") is not None:
                (_, bottom), (_, top) = at(0, point["low"]), at(0, point["high"])
                parts.append(
                    f'<line class="error c{number % NUM_COLOURS}" x1="{x:.1f}" x2="{x:.1f}"'
                    f' y1="{bottom:.1f}" y2="{top:.1f}"/>'
                )
                said += f" [{point['low']:.4g}, {point['high']:.4g}]"
            parts.append(f"<title>{escape(said)}</title>{marker(number, x, y)}</g>")
    parts.append("</svg>")
    caption = f"<figcaption><b>{escape(title)}</b> <span>{escape(note)}</span></figcaption>"
    return f"<figure>{caption}{''.join(parts)}</figure>"


def legend(numbers: Mapping[str, int]) -> str:
    """The glyph and name of each family."""
    items = (
        '<li><svg viewBox="0 0 16 16"'
        f' aria-hidden="true">{marker(number, 8, 8)}</svg>{escape(name)}</li>'
        for name, number in numbers.items()
    )
    return f'<ul class="legend">{"".join(items)}</ul>'
