"""What the tests of a report show, in words: one short paragraph a metric."""

from __future__ import annotations

from collections.abc import Sequence

from sla2_eval.report.text import number
from sla2_eval.scoring.comparisons import LEVEL, differs

_NAMED = 4  # variants by name in one list; more are counted


def findings(data: dict) -> list[dict]:
    """{"metric", "title", "text"} for each metric of single videos that two variants have, paired
    ones first.
    """
    found = []
    for metric, about in data["metrics"].items():
        groups = [group for group in data["groups"] if metric in group["metrics"]]
        rows = [row for row in data["comparisons"] if row["metric"] == metric]
        if len(groups) > 1 and rows:
            text = _text(metric, about, groups, rows, data["against"])
            found.append({"metric": metric, "title": about["title"], "text": text})
    return sorted(found, key=lambda row: data["metrics"][row["metric"]]["kind"] != "paired")


class _Better:
    """Which variant a metric's tests show to be better than which."""

    def __init__(self, about: dict, rows: list[dict]):
        self.p: dict[tuple[str, str], float | None] = {}
        self.pairs: set[tuple[str, str]] = set()
        for row in rows:
            pair = (row["first"], row["second"])
            self.p[pair] = self.p[pair[::-1]] = row["p_holm"]
            if differs(row["p_holm"]):
                up = (row["mean"] > 0) == about["higher_is_better"]
                self.pairs.add(pair if up else pair[::-1])

    def largest(self, first: str, others: Sequence[str]) -> float:
        """The largest p-value of these pairs."""
        return max(self.p[first, other] or 0.0 for other in others)


def _text(metric: str, about: dict, groups: list[dict], rows: list[dict], against: str) -> str:
    better = _Better(about, rows)
    value = {group["label"]: group["metrics"][metric]["mean"] for group in groups}
    if why := _untestable(rows):
        return f"{_ranked(value, about)}; {why}."
    parts = []
    full = next((group["label"] for group in groups if group["reference"]), None)
    variants = sorted(
        (label for label in value if label != full),
        key=lambda label: value[label],
        reverse=about["higher_is_better"],
    )
    if full is not None:
        parts.append(_against_full(full, against, variants, value, better))
    if len(variants) > 1:
        parts.append(_among(variants, value, better))
    return " ".join(parts)


def _untestable(rows: list[dict]) -> str | None:
    """Why no test of these pairs could show a difference, if none could."""
    if all(row["p_holm"] is None for row in rows):
        return "not tested, as one prompt says nothing of others"
    prompts = max(row["n"] for row in rows)
    if all(row["num_seeds"] == 1 for row in rows) and 2 * 0.5**prompts * len(rows) >= LEVEL:
        few = f"{prompts} prompts are too few to show a difference"
        return f"{few} in {len(rows)} comparisons" if len(rows) > 1 else few
    return None


def _ranked(value: dict[str, float], about: dict) -> str:
    ordered = sorted(value, key=lambda label: value[label], reverse=about["higher_is_better"])
    shown = [f"{label} {number(value[label])}" for label in ordered[:_NAMED]]
    return ", ".join(shown)


def _against_full(
    full: str, against: str, variants: list[str], value: dict[str, float], better: _Better
) -> str:
    """Which variants are worse than full attention, which better, and which are neither."""
    tested = [label for label in variants if (label, full) in better.p]
    worse = [label for label in tested if (full, label) in better.pairs]
    above = [label for label in tested if (label, full) in better.pairs]
    same = [label for label in tested if label not in worse and label not in above]
    theirs, said = f"{against}’s {number(value[full])}", []
    for labels, word in ((worse, "worse"), (above, "better")):
        if labels:
            verb = "is" if len(labels) == 1 else "are"
            p = _p(better.largest(full, labels))
            said.append(f"{_names(labels, tested)} {verb} {word} than {theirs} ({p})")
            theirs = "that"
    if same and not said:
        return f"No difference to {theirs} is shown."
    if same:
        said.append(f"no difference to it is shown for {_names(same, tested)}")
    text = "; ".join(said)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _among(variants: list[str], value: dict[str, float], better: _Better) -> str:
    """Which variants are better than which others, from the best on; of many the first alone."""
    clauses = []
    for label in variants:
        beaten = [other for other in variants if (label, other) in better.pairs]
        if beaten:
            p = _p(better.largest(label, beaten))
            rest = [other for other in variants if other != label]
            shown = f"{label} ({number(value[label])}) is better than {_names(beaten, rest)} ({p})"
            clauses.append(shown)
    if clauses and len(variants) > _NAMED:
        more = "; the table of every two variants has the rest" if len(clauses) > 1 else ""
        return f"{clauses[0]}{more}."
    if clauses:
        return f"{'; '.join(clauses)}."
    found = (better.p.get((a, b)) for a in variants for b in variants)
    known = [value for value in found if value is not None]
    smallest = f" (smallest p {number(min(known))})" if known else ""
    return f"No two variants are shown to differ{smallest}."


def _names(labels: list[str], of: list[str]) -> str:
    """A list in words; long ones are counted."""
    if len(labels) > 1 and len(labels) == len(of):
        return f"all {len(of)} others" if len(labels) > _NAMED else _listed(labels)
    if len(labels) > _NAMED:
        return f"{len(labels)} of {len(of)} others"
    return _listed(labels)


def _listed(labels: list[str]) -> str:
    return labels[0] if len(labels) == 1 else f"{', '.join(labels[:-1])} and {labels[-1]}"


def _p(value: float) -> str:
    return "p < 0.0001" if value < 0.0001 else f"p ≤ {value:.2g}"
