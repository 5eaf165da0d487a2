"""From the results of single videos to what results.json says: means, intervals, differences,
failures, versions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Protocol

from sla2_eval.scoring import metrics
from sla2_eval.scoring.comparisons import compare, differs
from sla2_eval.scoring.intervals import over_prompts
from sla2_eval.scoring.metrics import MetricSpec
from sla2_eval.scoring.worker import one_line, unpack
from sla2_eval.videos.manifest import Entry, compared, pair

_LIBRARIES = (
    "sla2-eval",
    "torch",
    "torchmetrics",
    "torchvision",
    "lpips",
    "open-clip-torch",
    "timm",
    "av",
    "numpy",
)


class Results(Protocol):
    """What scoring has gathered; keys are (side, file name, metric), side "video" or
    "reference".
    """

    specs: dict[str, MetricSpec]
    results: dict[tuple[str, str, str], dict]
    failures: dict[tuple[str, str, str], str]
    unavailable: dict[str, str]
    digests: dict

    def used_settings(self, spec: MetricSpec) -> dict: ...


@dataclass(kw_only=True)
class Elsewhere:
    """Results that were not computed here, for `document`."""

    specs: dict[str, MetricSpec]
    results: dict[tuple[str, str, str], dict]
    digests: dict
    failures: dict[tuple[str, str, str], str] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)

    def used_settings(self, spec: MetricSpec) -> dict:
        return {}


def _keyed(run: Results, side: str, videos: list[Entry], name: str) -> dict[tuple[str, str], float]:
    """The values of a metric by the prompt and file name of the videos; `side`: theirs, or their
    references'. Those without a value are left out.
    """
    found = {
        (entry.prompt, entry.file_name): run.results.get((side, entry.file_name, name), {})
        for entry in videos
    }
    return {key: result["value"] for key, result in found.items() if "value" in result}


def _by_prompt(values: dict[tuple[str, str], float]) -> dict[str, list[float]]:
    grouped: dict[str, list[float]] = {}
    for (prompt, _), value in values.items():
        grouped.setdefault(prompt, []).append(value)
    return grouped


def _summary(
    run: Results, spec: MetricSpec, videos: list[Entry], references: list[Entry] | None
) -> dict:
    """The entry of one metric in results.json."""
    entry: dict = {
        "kind": spec.kind,
        "title": spec.title,
        "definition": spec.definition,
        "source": spec.source,
    }
    entry |= {
        "higher_is_better": spec.higher_is_better,
        "binary": spec.binary,
        "settings": run.used_settings(spec),
        "vbench": spec.vbench,
    }
    if spec.kind == "set":
        return entry | _reduce(run, spec, videos, references)
    values = _keyed(run, "video", videos, spec.name)
    results = [run.results.get(("video", video.file_name, spec.name), {}) for video in videos]
    if left_out := sum("left_out" in result for result in results):
        entry["num_left_out"] = left_out
    if not values:
        return entry | {"mean": None, "interval": None, "num_videos": 0}
    interval = over_prompts(_by_prompt(values), binary=spec.binary)
    entry |= {
        "mean": interval.mean,
        "interval": [interval.low, interval.high],
        "interval_method": interval.method,
        "num_prompts": interval.n,
    }
    entry["num_videos"] = len(values)
    if spec.vbench:
        counted = [
            result
            for video, result in zip(videos, results, strict=True)
            if "value" in result and counts_for(video.dimensions, spec.vbench)
        ]
        if counted:
            entry["vbench_mean"] = _vbench_mean(counted)
            entry["vbench_weight"] = sum(result.get("weight", 1) for result in counted)
            entry["normalised"] = spec.normalised(entry["vbench_mean"])
    if spec.kind == "paired":
        pairs = [(video, other) for video, other in pair(videos, references or []) if other]
        lossless = [
            video
            for video, other in pairs
            if compared(video, other)[0] != video.path
            or {video.path.suffix.lower(), other.path.suffix.lower()} == {".png"}
        ]
        entry["num_lossless"] = sum((v.prompt, v.file_name) in values for v in lossless)
    if spec.kind == "unpaired" and references:
        base = {
            key: value
            for key, value in _keyed(run, "reference", videos, spec.name).items()
            if key in values
        }
        if difference := compare({None: values}, {None: base}, binary=spec.binary):
            entry["reference_mean"] = over_prompts(_by_prompt(base)).mean
            entry["difference"] = {
                **difference.to_dict(),
                "within_noise": not differs(difference.p),
            }
    return entry


def counts_for(dimensions: Sequence[str] | None, dimension: str) -> bool:
    """Whether a video with these dimensions of its prompt counts in VBench's total of one; where
    they are not known, every video does.
    """
    return dimensions is None or dimension in dimensions


def _vbench_mean(results: list[dict]) -> float:
    """VBench's total: every video counts by its weight, whatever its prompt."""
    weights = [result.get("weight", 1) for result in results]
    total = math.fsum(r["value"] * weight for r, weight in zip(results, weights, strict=True))
    return total / sum(weights)


def _reduce(
    run: Results, spec: MetricSpec, videos: list[Entry], references: list[Entry] | None
) -> dict:
    """A set metric from the features of both sides, in the order of file names."""
    import numpy as np

    sides = {}
    for side, entries in (("video", videos), ("reference", references or [])):
        found = [run.results.get((side, entry.file_name, spec.name)) for entry in entries]
        sides[side] = [unpack(result["features"]) for result in found if result]
    counts = {"num_videos": len(sides["video"]), "num_references": len(sides["reference"])}
    try:
        if not sides["reference"]:
            raise ValueError(f"{spec.name}: expected a reference set, got none")
        if not sides["video"]:
            raise ValueError(f"{spec.name}: expected at least one scored video, got none")
        features = [np.concatenate(sides[side]) for side in ("video", "reference")]
        reduced = metrics.module_of(spec.name).reduce(spec.name, *features, run.used_settings(spec))
    except ValueError as error:
        run.unavailable[spec.name] = f"unavailable: {one_line(error)}"
        return {"mean": None, **counts}
    return {"mean": reduced["value"], "warnings": reduced["warnings"], **counts}


def _reference(run: Results, entry: Entry) -> dict:
    """What is known of a video's reference, for the comparisons of a report."""
    unpaired = [name for name, spec in run.specs.items() if spec.kind == "unpaired"]
    found = {name: run.results.get(("reference", entry.file_name, name), {}) for name in unpaired}
    scores = {name: result["value"] for name, result in found.items() if "value" in result}
    return {"sha256": run.digests.get(entry.path), "scores": scores}


def document(
    run: Results, videos: list[Entry], references: list[Entry] | None, names: list[str]
) -> dict:
    """What results.json says. No times and nothing of the workers, so that equal results are equal
    bytes.
    """
    summaries = {name: _summary(run, spec, videos, references) for name, spec in run.specs.items()}
    theirs = {entry.file_name: entry for entry in references or ()}
    rows = []
    for entry in videos:
        found = {name: run.results.get(("video", entry.file_name, name), {}) for name in run.specs}
        scores = {name: result["value"] for name, result in found.items() if "value" in result}
        row = {
            "file_name": entry.file_name,
            "prompt": entry.prompt,
            "index": entry.index,
            "seed": entry.seed,
        }
        if entry.dimensions is not None:
            row["dimensions"] = list(entry.dimensions)
        row |= {"sha256": run.digests.get(entry.path), "scores": scores}
        if entry.file_name in theirs:
            row["reference"] = _reference(run, theirs[entry.file_name])
        rows.append(row)
    failed = [
        {
            "file_name": name,
            "side": side,
            "metric": None if metric in ("*", "reference") else metric,
            "error": error,
        }
        for (side, name, metric), error in sorted(
            run.failures.items(), key=lambda item: (item[0][1], item[0][0], item[0][2])
        )
    ]
    return {
        "format": 1,
        "requested": names,
        "metrics": summaries,
        "videos": rows,
        "failed": failed,
        "unavailable": dict(sorted(run.unavailable.items())),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """The versions of the libraries that scores depend on."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
