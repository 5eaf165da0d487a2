"""Reads the folder of a run and gathers what its report says: groups of seeds, intervals, curves,
maps, the paper's points.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib.resources import files
from itertools import combinations
from pathlib import Path

from sla2_eval.runs.folders import INPUTS
from sla2_eval.runs.progress import SPEED
from sla2_eval.scoring import metrics
from sla2_eval.scoring.comparisons import Values, compare, differs, holm
from sla2_eval.scoring.intervals import over_seeds, over_seeds_and_prompts
from sla2_eval.videos.manifest import read_manifest

PAPER_METRICS = {
    "IQ": "Imaging quality",
    "OC": "Overall consistency",
    "AQ": "Aesthetic quality",
    "MS": "Motion smoothness",
    "SC": "Subject consistency",
    "VR": "VisionReward",
}
PAPER_MODELS = {"wan2.1-1.3b-480p": "Wan2.1 1.3B, 480p", "wan2.1-14b-720p": "Wan2.1 14B, 720p"}
PAPER_FAMILIES = {
    "sla2": "SLA2",
    "sla": "SLA",
    "vsa": "VSA",
    "vmoba": "VMoBA",
    "sla2-no-qat": "SLA2 without QAT",
    "sla2-topk-router": "SLA2, heuristic router",
}


def read_json(path: Path, what: str) -> dict:
    """A JSON object. Raises ValueError naming the file if it is missing or of another form."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: expected {what}, got nothing there") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: expected {what}, got {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected {what}, got a {type(value).__name__}")
    return value


def _values(results: dict, metric: str) -> dict[tuple[str, str], float]:
    return {
        (row["prompt"], row["file_name"]): row["scores"][metric]
        for row in results["videos"]
        if metric in row["scores"]
    }


def _by_prompt(values: Values) -> dict[str, list[float]]:
    grouped: dict[str, list[float]] = {}
    for (prompt, _), value in values.items():
        grouped.setdefault(prompt, []).append(value)
    return grouped


def _cell(metric: str, about: dict, seeds: Mapping[int | None, dict]) -> dict | None:
    """One cell of the table: the mean over seeds and prompts with its interval, and how many of
    the videos it is of. `seeds`: results by training seed.
    """
    count = {"of_videos": sum(len(results["videos"]) for results in seeds.values())}
    if about["kind"] == "set":
        entries = [r["metrics"][metric] for r in seeds.values() if metric in r["metrics"]]
        entries = [entry for entry in entries if entry.get("mean") is not None]
        if not entries:
            return None
        count["num_videos"] = sum(entry.get("num_videos", 0) for entry in entries)
        interval = over_seeds([entry["mean"] for entry in entries])
        return {**interval.to_dict(), **count, "num_seeds": len(entries)}
    values = [found for results in seeds.values() if (found := _values(results, metric))]
    if not values:
        return None
    count["num_videos"] = sum(map(len, values))
    interval = over_seeds_and_prompts([_by_prompt(v) for v in values], binary=about["binary"])
    return {**interval.to_dict(), **count, "num_seeds": len(values)}


def _seeds(group: dict, scored: dict[str, dict]) -> dict[int | None, dict]:
    """The results of a group by training seed."""
    return {
        seed: scored[name] for name, seed in zip(group["names"], group["seeds"]) if name in scored
    }


def _compare(groups: list[dict], kinds: dict[str, dict], scored: dict[str, dict]) -> list[dict]:
    """Every two variants in every metric of single videos, over the videos that both have, with
    Holm's correction over the pairs of a metric.
    """
    found = []
    for metric, about in kinds.items():
        if about["kind"] == "set":
            continue
        values = {
            group["label"]: {
                seed: _values(results, metric) for seed, results in _seeds(group, scored).items()
            }
            for group in groups
            if metric in group["metrics"]
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


def _note_differences(groups: list[dict], comparisons: list[dict]) -> None:
    """Write each variant's difference to full attention into its cells."""
    cells = {group["label"]: group["metrics"] for group in groups}
    full = next((group["label"] for group in groups if group["reference"]), None)
    for row in comparisons:
        if full not in (row["first"], row["second"]):
            continue
        sign = -1 if row["first"] == full else 1
        other = row["second"] if row["first"] == full else row["first"]
        ends = [None if row[end] is None else sign * row[end] for end in ("low", "high")]
        cells[other][row["metric"]]["difference"] = {
            **{key: row[key] for key in ("n", "method", "num_videos", "num_seeds", "test")},
            "mean": sign * row["mean"] + 0.0,  # never -0.0
            "low": ends[::sign][0],
            "high": ends[::sign][1],
            "p": row["p"],
            "p_holm": row["p_holm"],
            "within_noise": not differs(row["p_holm"]),
        }


def _holds_scores(folder: Path) -> bool:
    """Whether a folder holds what `sla2 score` leaves, and not a run."""
    return (folder / INPUTS).is_file() and not (folder / "run.json").is_file()


def is_run(folder: Path) -> bool:
    """Whether `gather` finds a run, or the results of `sla2 score`, in a folder."""
    return (folder / "run.json").is_file() or _holds_scores(folder)


def _run(run_dir: Path) -> tuple[dict, dict[str, dict]]:
    """The description of a run and the results of its variants by name."""
    run = read_json(run_dir / "run.json", "the description of a run")
    variants = run.get("variants")
    if (
        not isinstance(variants, list)
        or not variants
        or not all(isinstance(v, dict) and "name" in v for v in variants)
    ):
        raise ValueError(
            f'{run_dir / "run.json"}: expected "variants", a list of objects with a "name", got'
            " another form"
        )
    scored = {}
    for variant in variants:
        path = run_dir / "scores" / variant["name"] / "results.json"
        if path.is_file():
            scored[variant["name"]] = _checked(read_json(path, "results of scoring"), path)
    return run, scored


def _scores(run_dir: Path) -> tuple[dict, dict[str, dict]]:
    """The results of `sla2 score` as a run of one variant of unknown sparsity, beside its reference
    if it had one.
    """
    inputs, path = read_json(run_dir / INPUTS, "what was scored"), run_dir / "results.json"
    results = _checked(read_json(path, "results of scoring"), path)
    labels = {side: Path(source).stem for side, source in inputs.items()}
    if "reference" in labels:
        labels["reference"] += ", the reference"
        means = {name: about.get("reference_mean") for name, about in results["metrics"].items()}
        metrics = {
            name: {**about, "mean": means[name]}
            for name, about in results["metrics"].items()
            if means[name] is not None
        }
        reference = {**results, "metrics": metrics, "videos": [], "failed": [], "unavailable": {}}
    variants = [{"name": side, "label": label, "sparsity": None} for side, label in labels.items()]
    scored = {"videos": results} | ({"reference": reference} if "reference" in labels else {})
    return {"reference": "reference", "against": "the reference", "variants": variants}, scored


def gather(run_dir: Path) -> dict:
    """What the report of a run, or of the results of `sla2 score`, says, without its videos and
    block maps.

    Raises ValueError naming the file if run.json is missing or lacks "variants", or a results.json
    is of another form.
    """
    is_scores = _holds_scores(run_dir)
    run, scored = (_scores if is_scores else _run)(run_dir)
    variants, reference = run["variants"], run.get("reference", "full")
    kinds = _kinds(scored.values())
    groups: dict[str, dict] = {}
    for variant in variants:
        label = variant.get("label", variant["name"])
        new = {"label": label, "names": [], "seeds": [], "metrics": {}}
        group = groups.setdefault(label, new)
        # Runs of one training a variant may say no seed.
        group["seeds"].append(variant.get("seed", len(group["names"]) or None))
        group["names"].append(variant["name"])
        group.setdefault("family", variant.get("family", label))
        group.setdefault("sparsities", []).append(variant.get("sparsity"))
    for group in groups.values():
        sparsities = group.pop("sparsities")
        group["sparsity"] = (
            None if None in sparsities else sum(map(float, sparsities)) / len(sparsities)
        )
        group["reference"] = reference in group["names"]
        for metric, about in kinds.items():
            if about["kind"] != "unpaired" and group["reference"]:
                continue
            if cell := _cell(metric, about, _seeds(group, scored)):
                group["metrics"][metric] = cell
    ordered = _ordered(groups)
    comparisons = _compare(ordered, kinds, scored)
    _note_differences(ordered, comparisons)
    if is_scores:
        _note_of_score(groups.values(), scored)
    return {
        "format": 2,
        "title": run.get("title", run_dir.name),
        "reference": reference,
        "against": run.get("against", "full attention"),
        "num_prompts": max(
            (len({row["prompt"] for row in r["videos"]}) for r in scored.values()), default=0
        ),
        "num_videos": sum(_num_scored(results) for results in scored.values()),
        "metrics": kinds,
        "groups": ordered,
        "comparisons": comparisons,
        "not_scored": [v["name"] for v in variants if v["name"] not in scored],
        "failed": _failed(scored),
        "lost": run.get("lost", {}),
        "unavailable": _unavailable(scored),
        "warnings": _warnings(scored),
        "speed": run.get("speed") or _speed(run_dir, ordered),
        "settings": run.get("settings", {}),
        "versions": _versions(run, scored),
        "hardware": run.get("hardware", {}),
        "notes": run.get("notes", []),
    }


def _note_of_score(groups: Iterable[dict], scored: dict[str, dict]) -> None:
    """What the results of `sla2 score` say of the reference, whose videos they do not list."""
    for group in groups:
        for metric, about in scored["videos"]["metrics"].items():
            if not group["reference"] and (difference := about.get("difference")):
                group["metrics"][metric]["difference"] = difference
            if group["reference"] and about.get("reference_mean") is not None:
                unknown = {"low": None, "high": None, "method": "unknown: not kept"}
                group["metrics"][metric] = {"mean": about["reference_mean"], **unknown}


def _checked(results: dict, path: Path) -> dict:
    if results.get("format") != 1 or not all(
        key in results for key in ("metrics", "videos", "failed", "unavailable")
    ):
        raise ValueError(
            f"{path}: expected results of format 1, got format {results.get('format')!r}"
        )
    return results


def _kinds(scored: Iterable[dict]) -> dict[str, dict]:
    """Description of each metric that any variant has, in the registry's order."""
    found = {name: about for results in scored for name, about in results["metrics"].items()}
    known = metrics.specs()
    return {
        name: {
            "kind": found[name]["kind"],
            "title": found[name]["title"],
            "definition": found[name]["definition"],
            "source": found[name]["source"],
            "higher_is_better": found[name]["higher_is_better"],
            "binary": found[name].get("binary", name in known and known[name].binary),
        }
        for name in sorted(
            found, key=lambda name: list(known).index(name) if name in known else len(known)
        )
    }


def _ordered(groups: dict[str, dict]) -> list[dict]:
    """Full attention first, then the families as they appear, each by sparsity."""
    families = list(dict.fromkeys(group["family"] for group in groups.values()))
    return sorted(
        groups.values(),
        key=lambda g: (not g["reference"], families.index(g["family"]), g["sparsity"] or 0),
    )


def _num_scored(results: dict) -> int:
    """How many videos have a score, or features in a set: all but those that failed as files."""
    broken = {row["file_name"] for row in results["failed"] if row["metric"] is None}
    return sum(bool(row["scores"]) or row["file_name"] not in broken for row in results["videos"])


def _failed(scored: dict[str, dict]) -> list[dict]:
    return [
        {"variant": name, **row} for name, results in scored.items() for row in results["failed"]
    ]


def _warnings(scored: dict[str, dict]) -> dict[str, list[str]]:
    """What a set metric says of how much its number is worth, by metric, each text once."""
    found: dict[str, list[str]] = {}
    for results in scored.values():
        for name, about in results["metrics"].items():
            found.setdefault(name, []).extend(about.get("warnings", []))
    return {name: list(dict.fromkeys(texts)) for name, texts in found.items() if texts}


def _unavailable(scored: dict[str, dict]) -> dict[str, str]:
    return dict(
        sorted(
            {
                n: why for results in scored.values() for n, why in results["unavailable"].items()
            }.items()
        )
    )


def _speed(run_dir: Path, groups: list[dict]) -> list[dict]:
    """Seconds a video, by wall clock while it was generated, from the speed.jsonl that generation
    leaves.
    """
    rows, full = [], None
    for group in groups:
        videos = seconds = 0.0
        for name in group["names"]:
            path = run_dir / "videos" / name / SPEED
            for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
                batch = json.loads(line)
                videos, seconds = videos + batch["videos"], seconds + batch["seconds"]
        if videos:
            each = seconds / videos
            full = each if group["reference"] else full
            against = f"{full / each:.2f} x" if full else "–"
            rows.append(
                {
                    "variant": group["label"],
                    "seconds a video": round(each, 3),
                    "against full attention": against,
                }
            )
    return rows


def _versions(run: dict, scored: dict[str, dict]) -> dict[str, str]:
    found: dict[str, str] = {}
    for results in scored.values():
        found |= results.get("versions", {})
    return {**found, **run.get("versions", {})}


def paper() -> dict:
    """The paper's own points by model, metric and family: [{"sparsity", "value"}], and full
    attention's value.
    """
    tables = json.loads((files("sla2_eval.report") / "templates" / "paper_tables.json").read_text())
    columns = tables["columns"]
    models = {}
    for model, title in PAPER_MODELS.items():
        by_metric = {}
        for code, name in PAPER_METRICS.items():
            column = columns.index(code)
            families = {
                PAPER_FAMILIES[family]: [
                    {"sparsity": row[columns.index("sparsity")], "value": row[column]}
                    for row in points.values()
                ]
                for family in PAPER_FAMILIES
                if (points := tables[model].get(family))
            }
            by_metric[code] = {
                "title": name,
                "full": tables[model]["full"]["0"][column],
                "families": families,
            }
        models[model] = {"title": title, "metrics": by_metric}
    return {"source": tables["source"], "models": models}


def first_of_each(run_dir: Path, data: dict) -> list[dict]:
    """Variants to show: the first seed of every group whose folder of videos is there, with its
    entries by file name.
    """
    shown = []
    inputs = read_json(run_dir / INPUTS, "what was scored") if _holds_scores(run_dir) else {}
    for group in data["groups"]:
        folder = inputs.get(group["names"][0], run_dir / "videos" / group["names"][0])
        try:
            entries = {entry.file_name: entry for entry in read_manifest(folder)}
        except ValueError:
            continue
        shown.append(
            {
                "name": group["names"][0],
                "label": group["label"],
                "entries": entries,
                "sparsity": group["sparsity"],
            }
        )
    return shown
