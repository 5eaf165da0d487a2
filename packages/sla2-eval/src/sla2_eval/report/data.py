"""What a report says, from the folders that it is made of: means and intervals, comparisons, speed,
what failed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path

from sla2_eval.report.groups import Group, grouped
from sla2_eval.report.sources import FORMAT, Source, read_source
from sla2_eval.report.speed import speeds
from sla2_eval.report.vbench import part_means, vbench_rows
from sla2_eval.scoring import metrics
from sla2_eval.scoring.comparisons import Values, compare, differs, holm
from sla2_eval.scoring.intervals import over_seeds, over_seeds_and_prompts


def gather(
    folders: str | Path | Sequence[str | Path],
    reference: str | Path | None = None,
    title: str | None = None,
) -> dict:
    """What the report of these folders says, without their videos and block maps.

    `reference`: one of the folders, or a variant's label, that the others are compared with; the
    first that a folder has if not given. Raises ValueError naming the file if one is of another
    form.
    """
    given = [folders] if isinstance(folders, str | Path) else folders
    sources = [read_source(folder) for folder in given]
    return describe(sources, grouped(sources, reference), title, chosen=reference is not None)


def describe(
    sources: Sequence[Source], groups: list[Group], title: str | None = None, *, chosen: bool
) -> dict:
    """As gather; `chosen`: the reference was asked for by name."""
    results = [m.results for g in groups for _, m in g.members if m.results]
    kinds = _kinds(results)
    rows = [_row(g, kinds) for g in ordered(groups)]
    _count(kinds, rows)
    comparisons = _compare(groups, kinds)
    speed = speeds(ordered(groups))
    _note_speed(rows, speed)
    _note_differences(rows, comparisons)
    _note_old_differences(rows, groups)
    prompts = [{row["prompt"] for s in g.seeds() for row in g.rows(s).values()} for g in groups]
    return {
        "format": FORMAT,
        "title": title or _title(sources),
        "reference": next((g.label for g in groups if g.reference), None),
        "against": _against(groups, chosen),
        "num_prompts": max(map(len, prompts), default=0),
        "num_videos": sum(_num_scored(part) for row in rows for part in row["parts"]),
        "metrics": kinds,
        "groups": rows,
        "comparisons": comparisons,
        "vbench": vbench_rows(ordered(groups)),
        "not_scored": [part["name"] for row in rows for part in row["parts"] if part["bare"]],
        "failed": [
            {"variant": part["name"], **failure}
            for row in rows
            for part in row["parts"]
            for failure in part["failed"]
        ],
        "lost": {k: why for s in sources for k, why in s.about.get("lost", {}).items()},
        "unavailable": _unavailable(results, rows),
        "warnings": _warnings(results),
        "speed": speed,
        "runs": [_run(source) for source in sources],
        "notes": list(dict.fromkeys([*_notes(sources), *_of_other_references(groups, kinds)])),
    }


def _count(kinds: dict[str, dict], rows: list[dict]) -> None:
    """Write into each metric how many videos of all variants it is of, and how many there are."""
    for metric, about in kinds.items():
        cells = [row["metrics"][metric] for row in rows if metric in row["metrics"]]
        for key in ("num_videos", "of_videos"):
            about[key] = sum(cell.get(key) or 0 for cell in cells)


def _title(sources: Sequence[Source]) -> str:
    titles = [source.about.get("title", source.name) for source in sources]
    return " · ".join(dict.fromkeys(titles))


def _against(groups: list[Group], chosen: bool) -> str:
    """What the reference is called in a sentence."""
    found = next((g for g in groups if g.reference), None)
    if found is None:
        return "the reference"
    source, member = found.members[0]
    if not member.reference or (chosen and source.kind != "grid"):
        return found.label
    return source.against if source.kind in ("grid", "scores", "report") else found.label


def _row(group: Group, kinds: dict[str, dict]) -> dict:
    """One row of the table."""
    cells = {}
    for metric, about in kinds.items():
        if about["kind"] != "unpaired" and group.reference:
            continue
        if cell := _cell(group, metric, about):
            cells[metric] = cell
    seeds = group.seeds()
    return {
        "label": group.label,
        "family": group.family,
        "sparsity": group.sparsity,
        "flops": group.flops,
        "reference": group.reference,
        "num_seeds": sum(seed is not None for seed in seeds),
        "metrics": cells,
        "parts": [_part(group, seed, kinds) for seed in seeds],
    }


def _part(group: Group, seed: int | None, kinds: dict[str, dict]) -> dict:
    """One training of a variant, with the values that a report can be made of again."""
    members = group.of_seed(seed)
    results = [member.results for member in members if member.results]
    sets = {
        metric: {k: entry[k] for k in ("mean", "num_videos", "warnings") if k in entry}
        for metric, about in kinds.items()
        if about["kind"] == "set" and (entry := group.entries(metric).get(seed))
    }
    return {
        "name": members[0].name if len(group.members) == 1 or seed is not None else group.label,
        "seed": seed,
        "sources": [source.name for source, member in group.members if member.seed == seed],
        "bare": not results,
        "metrics": {
            **{m: {} for r in results for m in r["metrics"]},
            **part_means(group, seed),
            **sets,
        },
        "videos": list(group.rows(seed).values()),
        "failed": [failure for found in results for failure in found["failed"]],
        "versions": {k: v for found in results for k, v in found.get("versions", {}).items()},
    }


def _cell(group: Group, metric: str, about: dict) -> dict | None:
    """The mean over seeds and prompts with its interval, and how many of the videos it is of."""
    count = {"of_videos": sum(len(group.rows(seed)) for seed in group.seeds())}
    if about["kind"] == "set":
        entries = list(group.entries(metric).values())
        if entries:
            count["num_videos"] = sum(entry.get("num_videos", 0) for entry in entries)
            interval = over_seeds([entry["mean"] for entry in entries])
            return {**interval.to_dict(), **count, "num_seeds": len(entries)}
    elif values := list(group.values(metric).values()):
        count["num_videos"] = sum(map(len, values))
        interval = over_seeds_and_prompts(
            [_by_prompt(found) for found in values], binary=about["binary"]
        )
        return {**interval.to_dict(), **count, "num_seeds": len(values)}
    return next((m.cells[metric] for _, m in group.members if metric in m.cells), None)


def _by_prompt(values: Values) -> dict[str, list[float]]:
    grouped: dict[str, list[float]] = {}
    for (prompt, _), value in values.items():
        grouped.setdefault(prompt, []).append(value)
    return grouped


def _compare(groups: list[Group], kinds: dict[str, dict]) -> list[dict]:
    """Every two variants in every metric of single videos, over the videos that both have, with
    Holm's correction over the pairs of a metric.
    """
    found = []
    for metric, about in kinds.items():
        if about["kind"] == "set":
            continue
        values = {
            group.label: known
            for group in ordered(groups)
            if (known := group.values(metric))
            and (about["kind"] != "paired" or not group.reference)
        }
        pairs = {
            (first, second): difference
            for first, second in combinations(values, 2)
            if (difference := compare(values[first], values[second], binary=about["binary"]))
        }
        corrected = holm({pair: difference.p for pair, difference in pairs.items()})
        found += [
            {
                "metric": metric,
                "first": first,
                "second": second,
                **difference.to_dict(),
                "p_holm": corrected[first, second],
            }
            for (first, second), difference in pairs.items()
        ]
    return found


def _note_speed(rows: list[dict], speed: list[dict]) -> None:
    """Write each variant's seconds a video into its row: those on the machine that most variants
    ran on, as seconds of other machines cannot be compared with them.
    """
    devices = [timed["device"] for timed in speed]
    machine = max(dict.fromkeys(devices), key=devices.count, default=None)
    known = {timed["variant"]: timed for timed in speed if timed["device"] == machine}
    for row in rows:
        timed = known.get(row["label"], {})
        row |= {key: timed.get(key) for key in ("seconds", "speedup", "device")}


def _note_differences(rows: list[dict], comparisons: list[dict]) -> None:
    """Write each variant's difference to the reference into its cells."""
    cells = {row["label"]: row["metrics"] for row in rows}
    full = next((row["label"] for row in rows if row["reference"]), None)
    for pair in comparisons:
        if full not in (pair["first"], pair["second"]):
            continue
        sign = -1 if pair["first"] == full else 1
        other = pair["second"] if pair["first"] == full else pair["first"]
        ends = [None if pair[end] is None else sign * pair[end] for end in ("low", "high")]
        cells[other][pair["metric"]]["difference"] = {
            **{key: pair[key] for key in ("n", "method", "num_videos", "num_seeds", "test")},
            "mean": sign * pair["mean"] + 0.0,  # never -0.0
            "low": ends[::sign][0],
            "high": ends[::sign][1],
            "p": pair["p"],
            "p_holm": pair["p_holm"],
            "within_noise": not differs(pair["p_holm"]),
        }


def _note_old_differences(rows: list[dict], groups: list[Group]) -> None:
    """The differences of members whose values were not kept, as they were reported."""
    members = {g.label: [m for _, m in g.members] for g in groups}
    for row in rows:
        for member in members[row["label"]]:
            for metric, difference in member.differences.items():
                if metric in row["metrics"]:
                    row["metrics"][metric].setdefault("difference", difference)


def _kinds(results: Iterable[dict]) -> dict[str, dict]:
    """Description of each metric that any variant has, in the registry's order."""
    found = {name: about for one in results for name, about in one["metrics"].items()}
    known = metrics.specs()
    order = {name: number for number, name in enumerate(known)}
    kept = ("kind", "title", "definition", "source", "higher_is_better")
    return {
        name: {
            **{key: found[name][key] for key in kept},
            "binary": found[name].get("binary", name in known and known[name].binary),
        }
        for name in sorted(found, key=lambda name: order.get(name, len(order)))
    }


def ordered(groups: list[Group]) -> list[Group]:
    """The reference first, then the families as they appear, each by sparsity."""
    families = list(dict.fromkeys(group.family for group in groups))
    return sorted(
        groups,
        key=lambda g: (not g.reference, families.index(g.family), g.sparsity or 0),
    )


def _num_scored(part: dict) -> int:
    """How many videos have a score, or features in a set: all but those that failed as files."""
    broken = {row["file_name"] for row in part["failed"] if row["metric"] is None}
    return sum(bool(row["scores"]) or row["file_name"] not in broken for row in part["videos"])


def _warnings(results: Iterable[dict]) -> dict[str, list[str]]:
    """What a set metric says of how much its number is worth, by metric, each text once."""
    found: dict[str, list[str]] = {}
    for one in results:
        for name, about in one["metrics"].items():
            found.setdefault(name, []).extend(about.get("warnings", []))
    return {name: list(dict.fromkeys(texts)) for name, texts in found.items() if texts}


def _unavailable(results: Iterable[dict], rows: list[dict]) -> dict[str, str]:
    """The metrics that no folder has, with the reason that one gives."""
    there = {metric for row in rows for metric in row["metrics"]}
    found = {name: why for one in results for name, why in one["unavailable"].items()}
    return {name: found[name] for name in sorted(found) if name not in there}


def _run(source: Source) -> dict:
    """What a folder says of how it was made."""
    versions: dict[str, str] = {}
    for member in source.members:
        versions |= (member.results or {}).get("versions", {})
    about = source.about
    return {
        "name": source.name,
        "kind": source.kind,
        "title": about.get("title", source.name),
        "settings": about.get("settings", {}),
        "versions": {**versions, **about.get("versions", {})},
        "hardware": about.get("hardware", {}),
    }


def _notes(sources: Sequence[Source]) -> list[str]:
    several = len(sources) > 1
    return [
        f"{source.name}: {note}" if several else note
        for source in sources
        for note in source.about.get("notes", [])
    ]


def _of_other_references(groups: list[Group], kinds: dict[str, dict]) -> list[str]:
    """A note for each variant whose paired metrics are against other videos than the reference's,
    where that is known.
    """
    full = next((g for g in groups if g.reference), None)
    paired = [about["title"] for about in kinds.values() if about["kind"] == "paired"]
    if full is None or not paired:
        return []
    theirs = {
        name: row["sha256"]
        for seed in full.seeds()
        for name, row in full.rows(seed).items()
        if row.get("sha256")
    }
    notes = []
    for group in groups:
        used = {
            name: row["reference"]["sha256"]
            for seed in group.seeds()
            for name, row in group.rows(seed).items()
            if row.get("reference")
        }
        if any(name in theirs and theirs[name] != digest for name, digest in used.items()):
            notes.append(
                f"{group.label}: {', '.join(paired)} are against other videos than those of"
                f" {full.label}; score it with --reference set to them to compare."
            )
    return notes
