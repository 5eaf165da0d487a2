"""Writes the report of a run: one HTML page that needs nothing but itself, and the same figures as
JSON, CSV and Markdown.
"""

from __future__ import annotations

import base64
import io
import json
import mimetypes
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from sla2_eval.report.charts import chart, legend
from sla2_eval.report.data import describe, ordered
from sla2_eval.report.findings import findings
from sla2_eval.report.groups import Group, grouped
from sla2_eval.report.paper import FAMILIES, belonging, paper
from sla2_eval.report.sources import read_json, read_source
from sla2_eval.report.tables import (
    as_csv,
    as_latex,
    as_markdown,
    comparisons_csv,
    facts,
    kinds,
    methods,
)
from sla2_eval.report.text import flat, number, percent, seconds, signed, unbroken
from sla2_eval.runs.extras import needed_for
from sla2_eval.runs.store import write_atomic
from sla2_eval.scoring.vbench_dimensions import DIMENSIONS

if TYPE_CHECKING:
    from markupsafe import Markup

VIDEO_BYTES = (
    48 << 20
)  # of videos in the page before base64; at least one prompt is shown whatever its size
MAX_PROMPTS = 12
SPRITE_HEIGHT = 128


def _parted(text: str) -> Markup:
    """Text whose long identifiers may end a line after a dot or an underscore, as HTML."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"(?<=\w[._/])(?=[A-Za-z])", "<wbr>", str(escape(text))))


def _data_uri(path: Path) -> str:
    """A file of a video or an image as a URI that holds it."""
    kind = mimetypes.guess_type(path.name)[0] or "video/mp4"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _videos(shown: list[dict]) -> tuple[list[dict], int]:
    """Prompts with a data URI per variant, as many as the page may hold, and how many there are in
    all.

    Videos that one variant has alone, such as full attention's at seeds that are not shown, are
    left out where others can be compared.
    """
    from sla2_eval.videos.video import frame_rate

    counts = Counter(name for variant in shown for name in variant["entries"])
    names = sorted(name for name in counts if counts[name] > 1) or sorted(counts)
    rows: list[dict] = []
    used = 0
    for name in names:
        entries = [variant["entries"].get(name) for variant in shown]
        present = [
            entry
            for entry in entries
            if entry and entry.path.is_file() and entry.path.stat().st_size
        ]
        size = sum(entry.path.stat().st_size for entry in present)
        if not present:
            continue
        if rows and (used + size > VIDEO_BYTES or len(rows) == MAX_PROMPTS):
            break
        used += size
        sources = [_data_uri(entry.path) if entry in present else None for entry in entries]
        about = {"prompt": present[0].prompt, "index": present[0].index}
        fps = max(frame_rate(entry.path) for entry in present) or 8.0
        rows.append({**about, "fps": fps, "sources": sources})
    return rows, len(names)


def _sprite(path: Path, count: int) -> dict | None:
    """`count` frames of a video, evenly spread, side by side in one JPEG; None if it does not
    decode.
    """
    import numpy as np
    from PIL import Image

    from sla2_eval.videos.video import VideoError, read_video

    try:
        frames = read_video(path).frames
    except VideoError:
        return None
    chosen = frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]
    width = max(1, round(SPRITE_HEIGHT * chosen.shape[2] / chosen.shape[1]))
    strip = Image.new("RGB", (width * count, SPRITE_HEIGHT))
    for index, frame in enumerate(chosen):
        strip.paste(Image.fromarray(frame).resize((width, SPRITE_HEIGHT)), (index * width, 0))
    buffer = io.BytesIO()
    strip.save(buffer, "JPEG", quality=86)
    uri = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"src": uri, "width": width, "height": SPRITE_HEIGHT}


def _shown(groups: list[Group]) -> list[dict]:
    """Variants whose videos are there: the first seed of each, with its entries by file name."""
    shown = []
    for group in groups:
        for seed in group.seeds():
            members = group.of_seed(seed)
            entries = {k: entry for m in members for k, entry in m.entries().items()}
            if entries:
                about = {"label": group.label, "sparsity": group.sparsity}
                shown.append({**about, "entries": entries})
                break
    return shown


def _block_maps(groups: list[Group], shown: list[dict]) -> list[dict]:
    """The router's block maps of the first seed of each variant that has one, with frames to draw
    them over.

    Raises ValueError naming the file for a map that lacks a key or does not fit its grid.
    """
    entries = {variant["label"]: variant["entries"] for variant in shown}
    found = []
    for group in groups:
        path = next((m.maps for m in group.of_seed(group.seeds()[0]) if m.maps), None)
        if path is None:
            continue
        maps = read_json(path, "block maps")
        missing = [key for key in ("grid", "block_q", "block_k", "layers") if key not in maps]
        if missing:
            raise ValueError(f"{path}: expected block maps with {', '.join(missing)}, got none")
        if maps["grid"] is None:  # of a model whose tokens' places in the video are not known
            continue
        _check_map(maps, path)
        videos = entries.get(group.label, {})
        over = videos.get(maps.get("frame_of")) or next(iter(videos.values()), None)
        keys = ("grid", "block_q", "block_k", "layers")
        found.append(
            {
                "label": group.label,
                **{key: maps[key] for key in keys},
                "order": maps.get("order"),
                "text_tokens": maps.get("text_tokens", 0),
                "frames": _sprite(over.path, maps["grid"][0]) if over else None,
                "prompt": over.prompt if over else None,
            }
        )
    return found


def _check_map(maps: dict, path: Path) -> None:
    tokens = maps["grid"][0] * maps["grid"][1] * maps["grid"][2]
    keys = tokens + maps.get("text_tokens", 0)
    rows, columns = -(-tokens // maps["block_q"]), -(-keys // maps["block_k"])
    order = maps.get("order")
    if order is not None and sorted(order) != list(range(tokens)):
        raise ValueError(
            f"{path}: expected an order of the {tokens} tokens of its grid, got {len(order)} places"
        )
    for layer in maps["layers"]:
        if len(layer["map"]) != rows or any(
            not 0 <= key < columns for row in layer["map"] for key in row
        ):
            raise ValueError(
                f"{path}: expected {rows} rows of key blocks below {columns} for its grid, "
                f"got {len(layer['map'])} rows in layer {layer['layer']}"
            )


def _glance(data: dict) -> list[dict]:
    """Up to four variants for the top of the page, all of them or the sparsest of each family, with
    three metrics each: {"label", "sparsity", "speedup", "cells"}.
    """
    scored = [row for row in data["groups"] if row["metrics"] and not row["reference"]]
    if len(scored) > 4:
        by_sparsity = sorted(scored, key=lambda row: row["sparsity"] or 0)
        chosen = [row["label"] for row in {row["family"]: row for row in by_sparsity}.values()]
        scored = [row for row in scored if row["label"] in chosen]
    kinds = {name: about["kind"] for name, about in data["metrics"].items()}
    paired = [name for name, kind in kinds.items() if kind == "paired"][:2]
    others = sorted(
        (name for name in kinds if name not in paired), key=lambda name: name != "caption_accuracy"
    )
    names = (paired + others)[:3]
    return [
        {
            "label": row["label"],
            "sparsity": row["sparsity"],
            "speedup": row["speedup"],
            "cells": [
                {
                    "title": data["metrics"][name]["title"],
                    **row["metrics"][name],
                    "full": _full(data, name),
                }
                for name in names
                if name in row["metrics"]
            ],
        }
        for row in scored[:4]
    ]


def _charts(data: dict) -> list[dict]:
    """For each axis that is known of some variant, a panel for each metric: {"axis", "title",
    "panels", "legend", "left_out"}, the last being the variants of which it is not known.
    """
    found = []
    for axis, title in (
        ("sparsity", "Sparsity"),
        ("flops", "FLOPs"),
        ("seconds", "Seconds a video"),
    ):
        scored = [row for row in data["groups"] if row["metrics"] and not row["reference"]]
        dense = [row for row in scored if row["sparsity"] == 0]
        known = [row for row in scored if row[axis] is not None and row not in dense]
        numbers = _numbers(dict.fromkeys(row["family"] for row in scored))
        panels = [
            chart(
                about["title"],
                _note(about),
                families,
                numbers,
                _full(data, metric),
                axis=axis,
                dense={
                    row["label"]: (numbers[row["family"]], row["metrics"][metric]["mean"])
                    for row in dense
                    if metric in row["metrics"]
                },
            )
            for metric, about in data["metrics"].items()
            if (families := _families(known, metric, axis))
        ]
        if panels:
            left_out = [row["label"] for row in scored if row not in known + dense]
            about = {"axis": axis, "title": title, "left_out": left_out}
            drawn = {row["family"] for row in known}
            key = legend({name: number for name, number in numbers.items() if name in drawn})
            found.append({**about, "panels": panels, "legend": key})
    return found


def _families(rows: list[dict], metric: str, axis: str) -> dict[str, list[dict]]:
    """The points of a metric by family."""
    families: dict[str, list[dict]] = {}
    for row in rows:
        if cell := row["metrics"].get(metric):
            point = {axis: row[axis], "value": cell["mean"], "label": row["label"]}
            point |= {"low": cell["low"], "high": cell["high"]}
            families.setdefault(row["family"], []).append(point)
    return families


def _note(about: dict) -> str:
    better = "higher is better" if about["higher_is_better"] else "lower is better"
    return f"{about['kind']}, {better}"


def _full(data: dict, metric: str) -> float | None:
    rows = (row for row in data["groups"] if row["reference"])
    return next((row["metrics"].get(metric, {}).get("mean") for row in rows), None)


def _numbers(families: Iterable[str]) -> dict[str, int]:
    """A colour and glyph for each family; SLA2 and SLA have the same ones in every chart."""
    fixed = ("SLA2", "SLA")
    ordered = sorted(families, key=lambda name: fixed.index(name) if name in fixed else len(fixed))
    offset = 0 if "SLA2" in ordered else 1
    return {name: i + offset for i, name in enumerate(ordered)}


def _paper_charts(data: dict) -> list[dict]:
    """This report's points and the paper's in one panel a metric that both have, on one scale, for
    each model of the paper that the runs may stand beside.
    """
    found, theirs = [], paper()["models"]
    rows = [row for row in data["groups"] if not row["reference"] and row["sparsity"]]
    for model in belonging(data["runs"]):
        shared = [name for name in theirs[model]["metrics"] if name in data["metrics"]]
        names = [*(row["family"] for row in rows), *FAMILIES.values()]
        numbers = _numbers(dict.fromkeys(names))
        panels = [
            chart(
                data["metrics"][name]["title"],
                _note(data["metrics"][name]),
                _families(rows, name, "sparsity"),
                numbers,
                _full(data, name),
                theirs=theirs[model]["metrics"][name]["families"],
                their_full=theirs[model]["metrics"][name]["full"],
            )
            for name in shared
        ]
        if panels:
            ours = {name: numbers[name] for name in numbers if name in names[: len(rows)]}
            there = {
                family for name in shared for family in theirs[model]["metrics"][name]["families"]
            }
            key = legend(ours, {name: numbers[name] for name in numbers if name in there})
            found.append({"title": theirs[model]["title"], "panels": panels, "legend": key})
    return found


def write_report(
    folders: str | Path | Sequence[str | Path],
    *,
    reference: str | Path | None = None,
    out: str | Path | None = None,
    title: str | None = None,
) -> Path:
    """Write index.html, results.json, .csv, .md and .tex, and comparisons.csv of one folder or of
    several together; returns the path of the page.

    Reads what there is in each: of a run, of `sla2 score`, of `sla2 generate`, or another report's
    results.json. `reference`: one of the folders, or a variant's label, that the others are
    compared with. `out`: report/ in the folder if there is one alone, else in this folder.

    Raises ValueError naming the file for one of another form, OSError where `out` cannot be
    written.
    """
    with needed_for("the page of a report"):
        from jinja2 import Environment, PackageLoader, StrictUndefined

    given = [folders] if isinstance(folders, str | Path) else list(folders)
    sources = [read_source(folder) for folder in given]
    groups = ordered(grouped(sources, reference))
    data = describe(sources, groups, title, chosen=reference is not None)
    shown = _shown(groups)
    rows, num_rows = _videos(shown)
    environment = Environment(
        loader=PackageLoader("sla2_eval.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "signed": signed,
        "percent": percent,
        "flat": flat,
        "methods": methods,
        "seconds": seconds,
        "unbroken": unbroken,
        "parted": _parted,
    }
    templates = files("sla2_eval.report") / "templates"
    page = environment.get_template("report.html").render(
        data=data,
        findings=findings(data),
        glance=_glance(data),
        charts=_charts(data),
        kinds=kinds(data),
        dimensions=DIMENSIONS,
        columns=[(title[:1].upper() + title[1:], key, say) for title, key, say in facts(data)],
        paper_charts=_paper_charts(data),
        paper_source=paper()["source"],
        player={
            "variants": [{"label": v["label"], "sparsity": percent(v["sparsity"])} for v in shown],
            "prompts": rows,
        },
        num_prompts_all=num_rows,
        block_maps=_block_maps(groups, shown),
        style=(templates / "report.css").read_text(),
        script=(templates / "report.js").read_text(),
    )
    out = Path(out) if out is not None else _where(given)
    write_atomic(
        out / "results.json", json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    )
    write_atomic(out / "results.csv", as_csv(data))
    write_atomic(out / "comparisons.csv", comparisons_csv(data))
    write_atomic(out / "results.md", as_markdown(data))
    write_atomic(out / "results.tex", as_latex(data))
    write_atomic(out / "index.html", page)
    return out / "index.html"


def _where(given: list[str | Path]) -> Path:
    """The folder of the report of these, where none is named."""
    if len(given) > 1:
        return Path("report")
    only = Path(given[0])
    return (only if only.is_dir() else only.parent) / "report"
