"""Reads the folders that a report is made of: of ablate and quickstart, of score, of generate, and
the results.json of another report.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sla2_eval.runs.folders import INPUTS
from sla2_eval.runs.progress import read_batches
from sla2_eval.videos.manifest import Entry, holds_media, read_manifest

GENERATED = "generation.json"  # in a folder of `sla2 generate`
RESULTS = "results.json"
FORMAT = 2  # of the results.json that a report writes


@dataclass(kw_only=True)
class Member:
    """One variant as one folder has it, of one training seed: `seed` is None where it was not
    trained, or where that is not known.

    `results` is what scoring left. Where an older version kept no values of single videos, `cells`
    and `differences` hold what it kept, by metric.
    """

    name: str  # within its source
    label: str
    family: str
    sparsity: float | None = None
    flops: float | None = None  # of attention, as a share of full attention's
    seed: int | None = None
    reference: bool = False  # full attention, or what the others were scored against
    results: dict | None = None
    videos: Path | None = None
    maps: Path | None = None
    cells: dict[str, dict] = field(default_factory=dict)
    differences: dict[str, dict] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)  # that other seeds of it must share

    def entries(self) -> dict[str, Entry]:
        """Its videos by file name; none where there are none."""
        if self.videos is None:
            return {}
        try:
            return {entry.file_name: entry for entry in read_manifest(self.videos)}
        except ValueError:
            return {}


@dataclass(kw_only=True)
class Source:
    """A folder, or file, of the report and what it says of all its variants."""

    path: Path
    kind: str  # "grid", "scores", "videos" or "report"
    name: str
    members: list[Member]
    about: dict[str, Any] = field(default_factory=dict)  # as run.json
    against: str = "full attention"  # what its reference is called in a sentence

    @property
    def main(self) -> Member:
        """The member that the folder stands for where it is the reference of others."""
        if self.kind == "scores":
            return self.members[0]
        return next((member for member in self.members if member.reference), self.members[0])


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


def read_source(path: str | Path) -> Source:
    """What a folder holds. Raises ValueError naming it, or the file in it, if it is none of those
    that a report is made of.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".json":
        return _report(path)
    if (path / "run.json").is_file():
        return _grid(path)
    if (path / INPUTS).is_file():
        return _scores(path)
    if path.is_dir() and (found := _generated(path)):
        return found
    known = (
        "a folder of quickstart or ablate with run.json, of score with inputs.json, of generate,"
        " or the results.json of a report"
    )
    raise ValueError(f"{path}: expected {known}, got {_what(path)}")


def _what(path: Path) -> str:
    if path.is_dir():
        return "a folder without them"
    return "another file" if path.exists() else "nothing there"


def _grid(folder: Path) -> Source:
    run = read_json(folder / "run.json", "the description of a run")
    variants = run.get("variants")
    if (
        not isinstance(variants, list)
        or not variants
        or not all(isinstance(v, dict) and "name" in v for v in variants)
    ):
        raise ValueError(
            f'{folder / "run.json"}: expected "variants", a list of objects with a "name", got'
            " another form"
        )
    members, seen = [], list[str]()
    for variant in variants:
        name, label = variant["name"], variant.get("label", variant["name"])
        results = folder / "scores" / name / RESULTS
        maps = folder / "block_maps" / f"{name}.json"
        sparsity, flops = variant.get("sparsity"), variant.get("flops")
        members.append(
            Member(
                name=name,
                label=label,
                family=variant.get("family", label),
                sparsity=None if sparsity is None else float(sparsity),
                flops=None if flops is None else float(flops),
                # Several trainings of a variant may say no seeds.
                seed=variant.get("seed", seen.count(label) or None),
                reference=name == run.get("reference", "full"),
                results=_checked(results) if results.is_file() else None,
                videos=folder / "videos" / name,
                maps=maps if maps.is_file() else None,
                settings=_shared(run, name),
            )
        )
        seen.append(label)
    return Source(path=folder, kind="grid", name=folder.resolve().name, members=members, about=run)


def _shared(run: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The settings of a grid that two parts of one variant must have in common."""
    settings = run.get("settings", {})
    generate = {
        key: value
        for key, value in settings.get("generate", {}).items()
        if key not in ("prompts", "num_prompts", "batch_size")
    }
    common = {"model": settings.get("model"), "video": settings.get("video"), "generate": generate}
    if name == run.get("reference", "full"):
        return common
    trained = ("attention", "data", "capture", "stage1", "stage2")
    named = [v for v in settings.get("variants", ()) if name.startswith(v["name"])]
    own = {"variant": max(named, key=lambda v: len(v["name"])) if named else None}
    return common | {key: settings.get(key) for key in trained} | own


def _scores(folder: Path) -> Source:
    inputs, path = read_json(folder / INPUTS, "what was scored"), folder / RESULTS
    results = _checked(path)
    videos = Path(inputs["videos"])
    theirs = Path(inputs["reference"]) if "reference" in inputs else None
    label, other = inputs.get("label", videos.stem), theirs.stem if theirs else None
    if theirs and label == other:
        label, other = (f"{path.parent.name}/{path.stem}" for path in (videos, theirs))
    sparsity, flops = _cost(videos)
    scored = Member(
        name="videos",
        label=label,
        family=label,
        seed=inputs.get("seed"),
        results=results,
        videos=videos,
        sparsity=sparsity,
        flops=flops,
    )
    members = [scored]
    if theirs and other:
        rows = [
            {**row, **{"sha256": None, "scores": {}}, **row["reference"], "reference": None}
            for row in results["videos"]
            if row.get("reference")
        ]
        means = {
            name: about["reference_mean"]
            for name, about in results["metrics"].items()
            if about.get("reference_mean") is not None
        }
        described = {
            name: {**about, "vbench_mean": None}  # which is of the videos alone
            for name, about in results["metrics"].items()
            if name in means
        }
        sparsity, flops = _cost(theirs)
        reference = Member(
            name="reference",
            label=other,
            family=other,
            reference=True,
            results={**results, "metrics": described, "videos": rows}
            | {"failed": [], "unavailable": {}},
            videos=theirs,
            sparsity=sparsity,
            flops=flops,
        )
        if not rows:
            scored.differences = {
                name: about["difference"]
                for name, about in results["metrics"].items()
                if about.get("difference")
            }
            reference.cells = {name: _bare(mean) for name, mean in means.items()}
        members.append(reference)
    return Source(
        path=folder,
        kind="scores",
        name=folder.resolve().name,
        members=members,
        against="the reference",
    )


def _bare(mean: float) -> dict:
    """A cell of which nothing but the mean is known."""
    return {"mean": mean, "low": None, "high": None, "method": "unknown: values were not kept"}


def _generated(folder: Path) -> Source | None:
    """A folder of videos, or one of several such folders; None if it is neither."""
    folders = [folder] if _holds_videos(folder) else sorted(filter(_holds_videos, folder.iterdir()))
    members = []
    for found in folders:
        settings = _generation(found)
        name, (sparsity, flops) = found.resolve().name, _cost(found)
        members.append(
            Member(
                name=name,
                label=name,
                family=name,
                reference=_is_dense(settings),
                videos=found,
                settings=settings,
                sparsity=sparsity,
                flops=flops,
            )
        )
    if not members:
        return None
    about = {"settings": {m.name: m.settings for m in members if m.settings}}
    return Source(
        path=folder, kind="videos", name=folder.resolve().name, members=members, about=about
    )


def _generation(folder: Path) -> dict[str, Any]:
    """How the videos of a folder were generated, as far as it says so."""
    path = folder / GENERATED
    return read_json(path, "how videos were generated") if path.is_file() else {}


def _is_dense(settings: Mapping[str, Any]) -> bool:
    return "adapter" in settings and settings["adapter"] is None


def _cost(folder: Path) -> tuple[float | None, float | None]:
    """Sparsity and FLOPs of the attention that videos were generated with: full attention's, or
    the means over batches of what was noted beside their seconds. None where nothing was.
    """
    if _is_dense(_generation(folder)):
        return 0.0, 1.0
    batches = [batch for batch in read_batches(folder) if "sparsity" in batch]
    videos = sum(batch["videos"] for batch in batches)
    if not videos:
        return None, None
    sparsity, flops = (
        sum(batch["videos"] * batch[key] for batch in batches) / videos
        for key in ("sparsity", "flops")
    )
    return sparsity, flops


def _holds_videos(folder: Path) -> bool:
    return (folder / GENERATED).is_file() or holds_media(folder)


def _report(path: Path) -> Source:
    """The results.json of a report: of today's with the values of every video; of earlier ones
    with the means alone.
    """
    data = read_json(path, "the results of a report")
    if data.get("format") not in (1, FORMAT) or "groups" not in data:
        raise ValueError(
            f"{path}: expected the results.json of a report of format 1 or {FORMAT}, got format"
            f" {data.get('format')!r}"
        )
    members = []
    for group in data["groups"]:
        known = {
            "label": group["label"],
            "family": group["family"],
            "sparsity": group["sparsity"],
            "flops": group.get("flops"),
            "reference": group["reference"],
        }
        if data["format"] == 1:
            cells = {metric: _old_cell(cell) for metric, cell in group["metrics"].items()}
            differences = {
                metric: cell["difference"]
                for metric, cell in group["metrics"].items()
                if "difference" in cell
            }
            results = {"metrics": {m: data["metrics"][m] for m in cells}, "videos": []}
            results |= {"failed": [], "unavailable": data["unavailable"]}
            members.append(
                Member(
                    name=group["label"],
                    results=results,
                    cells=cells,
                    differences=differences,
                    **known,
                )
            )
            continue
        for part in group["parts"]:
            results = {"unavailable": data["unavailable"]}
            results |= {key: part[key] for key in ("metrics", "videos", "failed", "versions")}
            results["metrics"] = {
                metric: {**data["metrics"][metric], **entry}
                for metric, entry in part["metrics"].items()
            }
            found = None if part["bare"] else results
            members.append(Member(name=part["name"], seed=part["seed"], results=found, **known))
    return Source(
        path=path,
        kind="report",
        name=path.resolve().parent.name if path.name == RESULTS else path.stem,
        members=members,
        about=_about(data),
        against=data.get("against", "full attention"),
    )


def _about(data: dict) -> dict[str, Any]:
    """What a report says of its runs, as one run would."""
    about = {key: data[key] for key in ("title", "notes", "lost") if key in data}
    kept = ("settings", "versions", "hardware")
    if len(data.get("runs", ())) > 1:
        return about | {key: {run["name"]: run[key] for run in data["runs"]} for key in kept}
    if data["format"] == 1:
        untested = "Of an earlier version, which kept no values of single videos to be tested."
        about["notes"] = [*data.get("notes", ()), untested]
    run = data["runs"][0] if data.get("runs") else data  # in format 1 beside the groups
    return about | {key: run.get(key, {}) for key in kept}


def _old_cell(cell: dict) -> dict:
    """A cell of format 1, whose intervals were percentile bootstraps, or Student's t over seeds."""
    seeds, prompts = cell.get("seeds") or {}, cell.get("prompts") or {}
    known = seeds if seeds.get("low") is not None else prompts
    method = "unknown" if known.get("low") is None else "of an earlier version"
    counts = {"n": prompts.get("n"), "num_seeds": seeds.get("n", 1)}
    return {"mean": cell["mean"], "low": known.get("low"), "high": known.get("high")} | {
        "method": method,
        **counts,
    }


def _checked(path: Path) -> dict:
    results = read_json(path, "results of scoring")
    if results.get("format") != 1 or not all(
        key in results for key in ("metrics", "videos", "failed", "unavailable")
    ):
        raise ValueError(
            f"{path}: expected results of format 1, got format {results.get('format')!r}"
        )
    return results
