"""To the original VBench and back: the folder and info file it expects, its own command, and its
results.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from pathlib import Path

from sla2_eval.runs.store import write_atomic
from sla2_eval.scoring import metrics
from sla2_eval.scoring.metrics import MetricSpec
from sla2_eval.scoring.summary import counts_for
from sla2_eval.videos.manifest import read_manifest

INFO, NAMES, VIDEOS = "VBench_full_info.json", "names.json", "videos"


def dimensions() -> list[str]:
    """The dimensions of VBench that this package knows as metrics."""
    return list(_by_dimension())


def _by_dimension() -> dict[str, MetricSpec]:
    return {spec.vbench: spec for spec in metrics.specs().values() if spec.vbench}


def as_vbench(results: dict) -> dict[str, list]:
    """The VBench dimensions of a results.json in VBench's form, {dimension: [mean, [{video_path,
    video_results}]]}; where temporal flickering was scored both ways, of the static videos alone.
    """
    found, specs = {}, _by_dimension()
    for name, about in results["metrics"].items():
        scored = [
            row
            for row in results["videos"]
            if name in row["scores"] and counts_for(row.get("dimensions"), about.get("vbench"))
        ]
        if not about.get("vbench") or not scored:
            continue
        scale = specs[about["vbench"]].vbench_scale
        rows = [
            {"video_path": row["file_name"], "video_results": row["scores"][name] * scale}
            for row in scored
        ]
        mean = math.fsum(row["scores"][name] for row in scored) / len(scored)
        found[about["vbench"]] = [about.get("vbench_mean", mean), rows]
    return found


def export(videos: str | Path, out: str | Path, chosen: list[str] | None = None) -> Path:
    """Write `out`/videos in VBench's naming, indices from 0 for each prompt, and
    `out`/VBench_full_info.json.

    Files are linked where the file system can, else copied. `chosen`: dimensions, all known ones if
    None; where the manifest has a prompt's dimensions, of these its own. Raises ValueError for an
    unknown dimension, a prompt that cannot be part of a file name, or a video that is not there.
    """
    known, out = dimensions(), Path(out)
    chosen = known if chosen is None else chosen
    for dimension in chosen:
        if dimension not in known:
            raise ValueError(
                f"dimensions: expected names among {', '.join(known)}, got {dimension!r}"
            )
    entries = sorted(
        read_manifest(videos), key=lambda entry: (entry.prompt, entry.index, entry.file_name)
    )
    if inside := next(
        (e.path for e in entries if e.path.resolve().is_relative_to((out / VIDEOS).resolve())), None
    ):
        raise ValueError(
            f"{out}: expected a folder for copies, got one whose {VIDEOS}/ holds {inside} itself"
        )
    names: dict[str, str] = {}
    lists: dict[str, list[str]] = {}
    of_prompt: dict[str, list[str]] = {}
    for entry in entries:
        if not entry.path.is_file():
            raise ValueError(f"{entry.path}: expected a video file, got nothing there")
        index = len(lists.setdefault(entry.prompt, []))
        name = f"{entry.prompt}-{index}.mp4"
        if "/" in name or "\0" in name or len(name.encode()) > 255:
            raise ValueError(
                f"{entry.file_name}: expected a prompt that VBench can use as a file name, got"
                f" {entry.prompt!r}"
            )
        names[name] = entry.file_name
        of_prompt[entry.prompt] = [d for d in chosen if counts_for(entry.dimensions, d)]
        lists[entry.prompt].append(str((out / VIDEOS / name).resolve()))
    (out / VIDEOS).mkdir(parents=True, exist_ok=True)
    for name in _exported(out).keys() - names.keys():  # VBench would score them too
        (out / VIDEOS / name).unlink(missing_ok=True)
    for entry, name in zip(entries, names, strict=True):
        _link(entry.path, out / VIDEOS / name)
    info = [
        {"prompt_en": prompt, "dimension": of_prompt[prompt], "video_list": paths}
        for prompt, paths in lists.items()
    ]
    write_atomic(out / NAMES, json.dumps(names, indent=1, ensure_ascii=False) + "\n")
    write_atomic(out / INFO, json.dumps(info, indent=1, ensure_ascii=False) + "\n")
    return out / INFO


def _exported(out: Path) -> dict[str, str]:
    """What an earlier export wrote into `out`/videos: the videos' own names by those it
    gave them.
    """
    return json.loads((out / NAMES).read_text(encoding="utf-8")) if (out / NAMES).is_file() else {}


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def run(out: str | Path, chosen: list[str]) -> dict[str, dict]:
    """Call `vbench evaluate` once a dimension on an exported folder and return what `read` finds.

    Raises RuntimeError if the command is not installed or fails.
    """
    out = Path(out)
    command = shutil.which("vbench")
    if command is None:
        raise RuntimeError(
            "vbench: expected the vbench command (pip install vbench, a GPU), got none on the path"
        )
    for dimension in chosen:
        arguments = [
            "--videos_path",
            str(out / VIDEOS),
            "--full_json_dir",
            str(out / INFO),
            "--output_path",
            str(out),
        ]
        done = subprocess.run(
            [command, "evaluate", *arguments, "--dimension", dimension],
            capture_output=True,
            text=True,
            errors="replace",
        )
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
            raise RuntimeError(
                f"vbench evaluate --dimension {dimension}: exit code {done.returncode}: {last}"
            )
    return read(out)


def read(out: str | Path) -> dict[str, dict]:
    """The results that VBench left in a folder: {dimension: {"mean", "normalised", "videos": {file
    name: value}}}.

    File names are those of the exported videos before their renaming. Raises ValueError naming the
    file for one of another form, and if there is none.
    """
    out = Path(out)
    paths = sorted(out.glob("*_eval_results.json"))
    if not paths:
        raise ValueError(f"{out}: expected *_eval_results.json of VBench, got none")
    names = _exported(out)
    specs, found = _by_dimension(), {}
    for path in paths:
        try:
            for dimension, (mean, rows) in json.loads(path.read_text(encoding="utf-8")).items():
                scale = specs[dimension].vbench_scale if dimension in specs else 1.0
                values = {
                    Path(row["video_path"]).name: float(row["video_results"]) / scale
                    for row in rows
                }
                found[dimension] = {
                    "mean": float(mean),
                    "normalised": (
                        specs[dimension].normalised(float(mean)) if dimension in specs else None
                    ),
                    "videos": {names.get(name, name): value for name, value in values.items()},
                }
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            form = "{dimension: [mean, [{video_path, video_results}]]}"
            raise ValueError(f"{path}: expected {form}, got something else ({error})") from error
    return found
