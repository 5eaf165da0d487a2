"""Small charts of quality against sparsity, FLOPs or seconds as SVG, coloured by the style sheet of
the page they stand in. A screen reader is told every point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 320, 224
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 14, 12, 34
_MARKERS = ("circle", "square", "triangle", "diamond", "cross", "ring", "bar", "star")
NUM_COLOURS = 8
_CHARACTER = 6.6  # width of a digit at the size of the ticks


@dataclass(frozen=True)
class Axis:
    """What stands below a chart: a key of its points, times `scale`."""

    label: str
    spoken: str
    scale: float = 1.0
    unit: str = ""


AXES = {
    "sparsity": Axis("sparsity, %", "sparsity", 100.0, " %"),
    "flops": Axis("attention FLOPs, % of full attention", "flops", 100.0, " %"),
    "seconds": Axis("seconds a video", "seconds a video", unit=" s"),
}


def marker(number: int, x: float, y: float, size: float = 4.2, style: str = "") -> str:
    """The glyph of family `number`: families differ in colour and in shape."""
    shape = _MARKERS[(number + number // NUM_COLOURS) % len(_MARKERS)]
    style = f'class="mark c{number % NUM_COLOURS}{style}"'
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


def _heights(points: Sequence[Mapping], lines: Sequence[float]) -> tuple[float, float]:
    """Where the y axis begins and ends: at the values, and at their intervals as far as these leave
    the values room. Two seeds may give intervals a hundred times as long.
    """
    values = [point["value"] for point in points] + list(lines)
    known = [point for point in points if point.get("low") is not None]
    halves = [(point["high"] - point["low"]) / 2 for point in known]
    least, most = min(values), max(values)
    room = 2 * max(most - least, min(halves, default=0.0), 1e-9)
    ends = [max(point["low"], least - room) for point in known]
    ends += [min(point["high"], most + room) for point in known]
    return _span(values + ends, 0.01 * max(1e-6, *(abs(value) for value in values)))


def _dodge(families: Mapping[str, Sequence[Mapping]], axis: str) -> dict[tuple[str, float], float]:
    """How far to move each point sideways, so that families at one place do not cover one
    another.
    """
    beside: dict[float, list[str]] = {}
    for name, family in families.items():
        for point in family:
            beside.setdefault(_place(point, axis), []).append(name)
    step = {place: min(7.0, 28.0 / len(names)) for place, names in beside.items()}
    return {
        (name, point[axis]): (
            step[place] * (beside[place].index(name) - (len(beside[place]) - 1) / 2)
        )
        for name, family in families.items()
        for point in family
        for place in [_place(point, axis)]
    }


def _place(point: Mapping, axis: str) -> float:
    """About where a point stands: to a percent, or to two digits."""
    return round(point[axis], 2) if AXES[axis].unit == " %" else float(f"{point[axis]:.2g}")


def _marks(places: Sequence[float], left: float, right: float) -> list[tuple[float, str]]:
    """Places on the x axis and their labels: the points' own where the labels have room, else round
    numbers.
    """
    per = (WIDTH - _LEFT - _RIGHT) / (right - left)
    own = [(place, f"{place:.3g}") for place in sorted(set(places))]
    wide = max(len(text) for _, text in own) * _CHARACTER + 6
    if len(own) <= 5 and all((b[0] - a[0]) * per > wide for a, b in pairwise(own)):
        return own
    return [(place, f"{place:g}") for place in ticks(left, right)]


def chart(
    title: str,
    note: str,
    families: Mapping[str, Sequence[Mapping]],
    numbers: Mapping[str, int],
    full: float | None = None,
    *,
    axis: str = "sparsity",
    dense: Mapping[str, tuple[int, float]] | None = None,
    theirs: Mapping[str, Sequence[Mapping]] | None = None,
    their_full: float | None = None,
) -> str:
    """One panel: a line a family over `axis`, one of AXES, with error bars; full attention is a
    dashed line, whose value stands in the caption.

    `families`: points {axis, "value", "low"?, "high"?, "label"?} by name; `numbers`: the colour and
    glyph of each. `dense`: the number and value of other variants without sparsity, dashed lines
    too, since their place would leave the others no room. `theirs`, `their_full`: the paper's, on
    the same scale, which were not measured here. Raises ValueError where there is no point.
    """
    theirs = theirs or {}
    points = [p for group in (families, theirs) for family in group.values() for p in family]
    if not points:
        raise ValueError(f"families: expected at least one point for {title!r}, got none")
    about = AXES[axis]
    lines = [
        *(
            (label, value, f"full c{number % NUM_COLOURS}")
            for label, (number, value) in (dense or {}).items()
        ),
        *((("full attention", full, "full"),) if full is not None else ()),
        *((("the paper’s full attention", their_full, "full theirs"),) if their_full else ()),
    ]
    low, high = _heights(points, [value for _, value, _ in lines])
    across = [about.scale * point[axis] for point in points]
    left, right = _span(across, 1.0 if about.unit == " %" else 0.02 * max(across))

    def at(place: float, value: float) -> tuple[float, float]:
        x = _LEFT + (place - left) / (right - left) * (WIDTH - _LEFT - _RIGHT)
        y = HEIGHT - _BOTTOM - (value - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)
        return x, min(max(y, _TOP / 2), HEIGHT - _BOTTOM)

    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="group"'
        f' aria-label="{escape(title)} against {about.spoken}">',
        '<g aria-hidden="true">',
    ]
    for tick in ticks(low, high):
        _, y = at(left, tick)
        parts += [_line("gridline", _LEFT, WIDTH - _RIGHT, y, y)]
        parts += [_text("tick", _LEFT - 7, y + 3.5, "end", f"{tick:g}")]
    for tick, label in _marks(across, left, right):
        x, _ = at(tick, low)
        parts += [_line("stub", x, x, HEIGHT - _BOTTOM, HEIGHT - _BOTTOM + 4)]
        parts += [_text("tick", x, HEIGHT - _BOTTOM + 16, "middle", label)]
    parts += [_text("axis", WIDTH - _RIGHT, HEIGHT - 4, "end", about.label)]
    parts += [_line("frame", _LEFT, WIDTH - _RIGHT, HEIGHT - _BOTTOM, HEIGHT - _BOTTOM)]
    for _, value, style in lines:
        _, y = at(left, value)
        parts += [_line(style, _LEFT, WIDTH - _RIGHT, y, y)]
    parts += ["</g>"]
    shift = _dodge({**families, **{f"{name} ": family for name, family in theirs.items()}}, axis)
    for name, family in families.items():
        moved = [(point, shift[name, point[axis]]) for point in family]
        parts += _family(name, moved, numbers[name], at, axis, "")
    for name, family in theirs.items():
        moved = [(point, shift[f"{name} ", point[axis]]) for point in family]
        parts += _family(f"{name} of the paper", moved, numbers[name], at, axis, " theirs")
    parts += ["</svg>"]
    return f"<figure>{_caption(title, note, lines)}{''.join(parts)}</figure>"


def _family(
    name: str,
    points: Sequence[tuple[Mapping, float]],
    number: int,
    at: Callable[[float, float], tuple[float, float]],
    axis: str,
    style: str,
) -> list[str]:
    """The line, error bars and glyphs of one family, whose points are moved by so much."""
    about, colour = AXES[axis], f"c{number % NUM_COLOURS}{style}"
    ordered = sorted(points, key=lambda moved: moved[0][axis])
    places = [
        (x + by, y)
        for point, by in ordered
        for x, y in [at(about.scale * point[axis], point["value"])]
    ]
    parts = []
    if len(ordered) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline class="line {colour}" points="{path}"/>')
    for (point, _), (x, y) in zip(ordered, places, strict=True):
        said = f"{point.get('label', name)}: {point['value']:.4g}"
        bar = ""
        if point.get("low") is not None:
            place = about.scale * point[axis]
            (_, bottom), (_, top) = at(place, point["low"]), at(place, point["high"])
            bar = _line(f"error {colour}", x, x, bottom, top)
            said += f" [{point['low']:.4g}, {point['high']:.4g}]"
        said += f" at {about.spoken} {about.scale * point[axis]:.3g}{about.unit}"
        glyph = marker(number, x, y, style=style)
        parts.append(f'<g role="img" aria-label="{escape(said)}"><title>{escape(said)}</title>')
        parts.append(f"{bar}{glyph}</g>")
    return parts


def _line(style: str, x1: float, x2: float, y1: float, y2: float) -> str:
    return f'<line class="{style}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def _text(style: str, x: float, y: float, anchor: str, text: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _caption(title: str, note: str, lines: Sequence[tuple[str, float, str]]) -> str:
    """The title, and the dashed lines' names and values, which inside a panel would lie on its
    points.
    """
    keys = "".join(
        f'<span class="key"><svg viewBox="0 0 22 6" aria-hidden="true">'
        f'<line class="{style}" x1="0" x2="22" y1="3" y2="3"/></svg>{escape(label)} {value:.4g}'
        "</span>"
        for label, value, style in lines
    )
    return f"<figcaption><b>{escape(title)}</b> <span>{escape(note)}</span>{keys}</figcaption>"


def legend(numbers: Mapping[str, int], theirs: Mapping[str, int] | None = None) -> str:
    """The glyph and name of each family; `theirs`: those that the paper has."""
    rows = [(name, number, "") for name, number in numbers.items()]
    rows += [(f"{name}, the paper’s", n, " theirs") for name, n in (theirs or {}).items()]
    items = (
        '<li><svg viewBox="0 0 16 16"'
        f' aria-hidden="true">{marker(number, 8, 8, style=style)}</svg>{escape(name)}</li>'
        for name, number, style in rows
    )
    return f'<ul class="legend">{"".join(items)}</ul>'
