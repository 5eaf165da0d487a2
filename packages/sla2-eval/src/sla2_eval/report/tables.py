"""The tables of a report beside its page: CSV, Markdown and LaTeX."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable
from html import escape
from typing import Any

from sla2_eval.report.findings import findings
from sla2_eval.report.text import number, percent, seconds
from sla2_eval.scoring.vbench_dimensions import DIMENSIONS


def _rows(data: dict) -> list[dict]:
    """One flat row per group and metric, for the CSV file."""
    rows = []
    for group in data["groups"]:
        for metric, cell in group["metrics"].items():
            difference = cell.get("difference", {})
            rows.append(
                {
                    "variant": group["label"],
                    "family": group["family"],
                    "sparsity": group["sparsity"],
                    "flops": group["flops"],
                    "seconds": group["seconds"],
                    "speedup": group["speedup"],
                    "metric": metric,
                    "kind": data["metrics"][metric]["kind"],
                    "mean": cell["mean"],
                    "low": cell["low"],
                    "high": cell["high"],
                    "interval": cell["method"],
                    "prompts": cell.get("n"),
                    "seeds": cell.get("num_seeds"),
                    "videos": cell.get("num_videos"),
                    "of_videos": cell.get("of_videos"),
                    "difference": difference.get("mean"),
                    "difference_low": difference.get("low"),
                    "difference_high": difference.get("high"),
                    "p": difference.get("p"),
                    "p_holm": difference.get("p_holm"),
                    "within_noise": difference.get("within_noise"),
                }
            )
    return rows


def as_csv(data: dict) -> str:
    """The figures as CSV, one line per variant and metric."""
    return _csv(_rows(data), ["variant", "metric", "mean"])


def comparisons_csv(data: dict) -> str:
    """Every two variants in every metric as CSV: the difference first minus second and its test."""
    return _csv(data["comparisons"], ["metric", "first", "second", "mean"])


def _csv(rows: list[dict], columns: list[str]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]) if rows else columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def kinds(data: dict) -> list[tuple[str, str, list[str]]]:
    """Each kind of metric that the report has, with its heading and its metrics."""
    headings = {
        "paired": f"Paired: against {data['against']}",
        "unpaired": "Unpaired: each video by itself",
        "set": "Sets of videos",
    }
    found = [
        (kind, heading, [name for name, about in data["metrics"].items() if about["kind"] == kind])
        for kind, heading in headings.items()
    ]
    return [row for row in found if row[2]]


def facts(data: dict) -> list[tuple[str, str, Callable[[dict], str]]]:
    """The columns before the metrics, as title, key of a group, and how it is written: sparsity,
    and what of the cost is known of any variant.
    """
    columns: list[tuple[str, str, Callable[[dict], str]]] = [
        ("sparsity", "sparsity", lambda group: percent(group["sparsity"])),
        ("FLOPs", "flops", lambda group: percent(group["flops"])),
        ("seconds a video", "seconds", lambda group: seconds(group["seconds"])),
    ]
    there = [any(group[key] is not None for group in data["groups"]) for _, key, _ in columns]
    return [column for column, any_ in zip(columns, there) if any_ or column[1] == "sparsity"]


def methods(data: dict) -> list[str]:
    """How the intervals of the page were made, each way once."""
    cells = (cell for group in data["groups"] for cell in group["metrics"].values())
    return list(dict.fromkeys(cell["method"] for cell in cells)) or ["none"]


def _markdown_cell(text: str) -> str:
    """Text that neither ends its cell nor is taken for HTML."""
    return escape(" ".join(text.split()), quote=False).replace("|", "\\|")


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _score(cell: dict | None) -> str:
    """A mean with its interval, of how many videos if not of all, and whether it is no other than
    the reference's.
    """
    if cell is None:
        return "–"
    text = number(cell["mean"])
    if cell["low"] is not None:
        text += f" [{number(cell['low'])}, {number(cell['high'])}]"
    if cell.get("num_videos", 0) < cell.get("of_videos", 0):
        text += f" ({cell['num_videos']} of {cell['of_videos']})"
    if cell.get("difference", {}).get("within_noise"):
        text += " ≈"
    return text


def as_markdown(data: dict) -> str:
    """The figures as one Markdown table per kind of metric, after what the tests show."""
    parts = [f"# {data['title']}\n"]
    if said := findings(data):
        parts.append("\n".join(f"- **{row['title']}**: {row['text']}" for row in said) + "\n")
    columns = facts(data)
    for _, heading, names in kinds(data):
        groups = [group for group in data["groups"] if any(n in group["metrics"] for n in names)]
        if not groups:
            continue
        titles = [_markdown_cell(data["metrics"][name]["title"]) for name in names]
        lines = [
            _line("variant", *(title for title, _, _ in columns), *titles),
            "|---" * (1 + len(columns) + len(names)) + "|",
        ]
        for group in groups:
            cells = [_score(group["metrics"].get(name)) for name in names]
            costs = [say(group) for _, _, say in columns]
            lines.append(_line(_markdown_cell(group["label"]), *costs, *cells))
        parts.append(f"## {heading}\n\n" + "\n".join(lines) + "\n")
    parts += _vbench(data)
    parts.append(
        f"Intervals are 95 %: {'; '.join(methods(data))}. (n of N): videos that have a score."
        f" ≈: no difference to {data['against']} is shown, over the videos that both have (Holm's"
        " correction over every two variants, 5 %).\n"
    )
    counts = [
        f"{about['title']} {about['num_videos']} of {about['of_videos']}"
        for about in data["metrics"].values()
        if about["of_videos"]
    ]
    if counts:
        parts.append(f"Videos with a score: {'; '.join(counts)}.\n")
    parts += [
        f"{data['metrics'][name]['title']}: {'; '.join(texts)}.\n"
        for name, texts in data["warnings"].items()
    ]
    missing = [f"- {name}: {why}" for name, why in data["unavailable"].items()]
    missing += [f"- {task}: not done: {why}" for task, why in data["lost"].items()]
    missing += [
        f"- {row['variant']}, {row['file_name']}: failed: {row['error']}" for row in data["failed"]
    ]
    if missing:
        parts.append("## Unavailable or failed\n\n" + "\n".join(missing) + "\n")
    return "\n".join(parts)


def _vbench_rows(data: dict) -> tuple[list, list]:
    """(title, value of each variant) of VBench's dimensions, as means, and of its scores."""
    rows = data["vbench"]
    dimensions = [
        (name.replace("_", " "), [row["dimensions"].get(name, {}).get("mean") for row in rows])
        for name in DIMENSIONS
        if any(name in row["dimensions"] for row in rows)
    ]
    titles = rows[0]["scores"] if rows else []
    return dimensions, [(title, [row["scores"][title] for row in rows]) for title in titles]


def _vbench(data: dict) -> list[str]:
    """VBench's dimensions, a row each, with its scores."""
    rows = data["vbench"]
    if not rows:
        return []
    lines = [
        _line("dimension", *(_markdown_cell(row["label"]) for row in rows)),
        "|---" * (1 + len(rows)) + "|",
    ]
    dimensions, scores = _vbench_rows(data)
    lines += [_line(title, *map(number, values)) for title, values in dimensions]
    lines += [_line(f"**{title}**", *map(number, values)) for title, values in scores]
    return ["## VBench\n\n" + "\n".join(lines) + "\n"]


_LATEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "≈": r"$\approx$",
    "–": "--",
    "’": "'",
    " %": r"\,\%",
}


def latex(text: str) -> str:
    """Text as LaTeX prints it."""
    signs = sorted(_LATEX, key=len, reverse=True)
    pattern = "|".join(map(re.escape, signs))
    return re.sub(pattern, lambda found: _LATEX[found[0]], " ".join(text.split()))


def as_latex(data: dict) -> str:
    """The figures as one LaTeX table per kind of metric, for booktabs, and one of VBench's
    dimensions and scores; the best variant of each metric is bold.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("sla2_eval.report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        variable_start_string="<<",
        variable_end_string=">>",
        block_start_string="<%",
        block_end_string="%>",
        comment_start_string="<#",
        comment_end_string="#>",
    )
    environment.filters |= {"latex": latex, "number": number}
    tables = [
        {
            "kind": kind,
            "heading": heading,
            "metrics": {name: data["metrics"][name] for name in names},
            "best": {name: _best(data, name) for name in names},
            "groups": [g for g in data["groups"] if any(n in g["metrics"] for n in names)],
        }
        for kind, heading, names in kinds(data)
    ]
    return environment.get_template("results.tex").render(
        data=data,
        tables=[table for table in tables if table["groups"]],
        vbench=_vbench_rows(data),
        columns=facts(data),
        methods=methods(data),
    )


def _best(data: dict, metric: str) -> str | None:
    """The label of the variant with the best mean, the reference aside; None of one alone."""
    means: Iterable[tuple[float, str]] = (
        (group["metrics"][metric]["mean"], group["label"])
        for group in data["groups"]
        if metric in group["metrics"] and not group["reference"]
    )
    ordered: list[Any] = sorted(means, reverse=data["metrics"][metric]["higher_is_better"])
    return ordered[0][1] if len(ordered) > 1 else None
