"""Reads the folder of a run and gathers what its report says: groups of seeds, intervals, curves,
maps, the paper's points.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path

from sla2_eval.runs.folders import INPUTS
from sla2_eval.runs.progress import SPEED
from sla2_eval.scoring import metrics
from sla2_eval.scoring.intervals import Interval, over_prompts, over_seeds, paired_difference
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


def _mean_over_seeds(seeds: list[dict[tuple[str, str], float]]) -> dict[tuple[str, str], float]:
    keys = set().union(*seeds) if seeds else set()
    found = {key: [seed[key] for seed in seeds if key in seed] for key in sorted(keys)}
    return {key: sum(values) / len(values) for key, values in found.items()}


def _prompt_interval(values: dict[tuple[str, str], float]) -> Interval:
    grouped: dict[str, list[float]] = {}
    for (prompt, _), value in values.items():
        grouped.setdefault(prompt, []).append(value)
    return over_prompts(grouped)


def _cell(metric: str, kind: str, seeds: list[dict], full: dict | None) -> dict | None:
    """One cell of the table: the mean over seeds and prompts, both intervals, and the difference to
    full attention.
    """
    if kind == "set":
        means = [
            r["metrics"][metric]["mean"]
            for r in seeds
            if r["metrics"].get(metric, {}).get("mean") is not None
        ]
        return (
            {"mean": sum(means) / len(means), "seeds": over_seeds(means).to_dict()}
            if means
            else None
        )
    per_seed = [values for results in seeds if (values := _values(results, metric))]
    if not per_seed:
        return None
    together = _mean_over_seeds(per_seed)
    prompts = _prompt_interval(together)
    cell = {"mean": prompts.mean, "prompts": prompts.to_dict()}
    if len(per_seed) > 1:
        cell["seeds"] = over_seeds([_prompt_interval(values).mean for values in per_seed]).to_dict()
    if kind == "unpaired" and not full and len(seeds) == 1:
        if difference := seeds[0]["metrics"][metric].get("difference"):
            cell["difference"] = difference
    elif kind == "unpaired" and full:
        by_name = {name: value for (_, name), value in _values(full, metric).items()}
        difference = paired_difference(
            together, {key: by_name[key[1]] for key in together if key[1] in by_name}
        )
        if difference:
            cell["difference"] = {
                **difference.to_dict(),
                "within_noise": not difference.excludes_zero,
            }
    return cell


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
        group = groups.setdefault(label, {"label": label, "names": [], "metrics": {}})
        group["names"].append(variant["name"])
        group.setdefault("family", variant.get("family", label))
        group.setdefault("sparsities", []).append(variant.get("sparsity", 0.0))
    for group in groups.values():
        sparsities = group.pop("sparsities")
        group["sparsity"] = (
            None if None in sparsities else sum(map(float, sparsities)) / len(sparsities)
        )
        group["reference"] = reference in group["names"]
        seeds = [scored[name] for name in group["names"] if name in scored]
        for metric, about in kinds.items():
            if about["kind"] != "unpaired" and group["reference"]:
                continue
            if is_scores and group["reference"]:
                cell = next(
                    (
                        {"mean": r["metrics"][metric]["mean"]}
                        for r in seeds
                        if metric in r["metrics"]
                    ),
                    None,
                )
            else:
                full = None if is_scores or group["reference"] else scored.get(reference)
                cell = _cell(metric, about["kind"], seeds, full)
            if cell:
                group["metrics"][metric] = cell
    return {
        "format": 1,
        "title": run.get("title", run_dir.name),
        "reference": reference,
        "against": run.get("against", "full attention"),
        "num_prompts": max(
            (len({row["prompt"] for row in r["videos"]}) for r in scored.values()), default=0
        ),
        "num_videos": sum(_num_scored(results) for results in scored.values()),
        "metrics": kinds,
        "groups": _ordered(groups),
        "not_scored": [v["name"] for v in variants if v["name"] not in scored],
        "failed": _failed(scored),
        "lost": run.get("lost", {}),
        "unavailable": _unavailable(scored),
        "warnings": _warnings(scored),
        "speed": run.get("speed") or _speed(run_dir, _ordered(groups)),
        "settings": run.get("settings", {}),
        "versions": _versions(run, scored),
        "hardware": run.get("hardware", {}),
        "notes": run.get("notes", []),
    }


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
