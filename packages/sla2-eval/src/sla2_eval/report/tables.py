"""The tables of a report beside its page: CSV and Markdown."""

from __future__ import annotations

import csv
import io
from html import escape

from sla2_eval.report.findings import findings
from sla2_eval.report.text import number, percent


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
    buffer = io.StringIO()
    rows = _rows(data)
    writer = csv.DictWriter(
        buffer, list(rows[0]) if rows else ["variant", "metric", "mean"], lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def methods(data: dict) -> list[str]:
    """How the intervals of the page were made, each way once."""
    cells = (cell for group in data["groups"] for cell in group["metrics"].values())
    return list(dict.fromkeys(cell["method"] for cell in cells)) or ["none"]


def _markdown_cell(text: str) -> str:
    """Text that neither ends its cell nor is taken for HTML."""
    return escape(" ".join(text.split()), quote=False).replace("|", "\\|")


def as_markdown(data: dict) -> str:
    """The figures as one Markdown table per kind of metric; ≈ marks a difference to full
    attention within noise.
    """
    parts = [f"# {data['title']}\n"]
    if said := findings(data):
        parts.append("\n".join(f"- **{row['title']}**: {row['text']}" for row in said) + "\n")
    kinds = {
        "paired": f"Paired: against {data['against']}",
        "unpaired": "Unpaired: each video by itself",
        "set": "Sets of videos",
    }
    for kind, heading in kinds.items():
        names = [name for name, about in data["metrics"].items() if about["kind"] == kind]
        groups = [
            group for group in data["groups"] if any(name in group["metrics"] for name in names)
        ]
        if not groups:
            continue
        titles = [_markdown_cell(data["metrics"][name]["title"]) for name in names]
        lines = [
            "| variant | sparsity | " + " | ".join(titles) + " |",
            "|---|---|" + "---|" * len(names),
        ]
        for group in groups:
            cells = []
            for name in names:
                cell = group["metrics"].get(name)
                text = number(cell["mean"]) if cell else "–"
                if cell and cell["low"] is not None:
                    text += f" [{number(cell['low'])}, {number(cell['high'])}]"
                if cell and cell.get("num_videos", 0) < cell.get("of_videos", 0):
                    text += f" ({cell['num_videos']} of {cell['of_videos']})"
                if cell and cell.get("difference", {}).get("within_noise"):
                    text += " ≈"
                cells.append(text)
            lines.append(
                f"| {_markdown_cell(group['label'])} | {percent(group['sparsity'])} | "
                + " | ".join(cells)
                + " |"
            )
        parts.append(f"## {heading}\n\n" + "\n".join(lines) + "\n")
    parts.append(
        f"Intervals are 95 %: {'; '.join(methods(data))}. (n of N): videos that have a score."
        f" ≈: no difference to {data['against']} is shown, over the videos that both have (Holm's"
        " correction over every two variants, 5 %).\n"
    )
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
