"""To the original VBench and back: the folder and info file it expects, its results, and the table
of its 16 dimensions.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sla2_eval.runs.folders import INPUTS
from sla2_eval.runs.store import file_digest, write_atomic
from sla2_eval.scoring import metrics
from sla2_eval.scoring.metrics import MetricSpec
from sla2_eval.scoring.summary import Elsewhere, counts_for, document
from sla2_eval.scoring.vbench_dimensions import DIMENSIONS, VERSION, check_names, scores
from sla2_eval.scoring.vbench_environment import evaluate, ready_for
from sla2_eval.videos.manifest import Entry, read_manifest

INFO, NAMES, VIDEOS = "VBench_full_info.json", "names.json", "videos"
SOURCE = "source.json"  # the folder that was exported
WRITTEN = "results.json"  # of write_results
RESULTS = "_eval_results.json"  # how the names of VBench's results end
MOST = 5  # videos of a prompt that VBench looks at


def without_info() -> list[str]:
    """The dimensions that VBench scores without its full-info JSON."""
    return [name for name, about in DIMENSIONS.items() if not about.info]


def _by_dimension() -> dict[str, MetricSpec]:
    return {spec.vbench: spec for spec in metrics.specs().values() if spec.vbench}


def _scale(dimension: str) -> float:
    """VBench's values of single videos over its total."""
    spec = _by_dimension().get(dimension)
    return spec.vbench_scale if spec else 1.0


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


def export(
    videos: str | Path,
    out: str | Path,
    chosen: Sequence[str] | None = None,
    info: str | Path | None = None,
) -> Path:
    """Write `out`/videos in VBench's naming, indices from 0 for each prompt, and
    `out`/VBench_full_info.json. Results of other videos that lie in `out` are deleted.

    Files are linked where the file system can, else copied.

    Args:
        chosen: dimensions; all that VBench can score with what is known if None. Where the manifest
            or `info` has a prompt's dimensions, of these its own.
        info: VBench's full-info JSON, which says what objects, colours and styles to look for.

    Raises:
        ValueError: an unknown dimension, one that needs `info` without it, an info file of another
            form or without a prompt, a prompt that cannot be part of a file name, a video that is
            no mp4 or not there.
    """
    out, known = Path(out), _read_info(Path(info)) if info is not None else None
    chosen = (without_info() if known is None else list(DIMENSIONS)) if chosen is None else chosen
    check_names(chosen)
    for dimension in chosen:
        if DIMENSIONS[dimension].info and known is None:
            raise ValueError(
                f"info: expected VBench_full_info.json of VBench for {dimension}, got none"
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
    names: dict[str, dict[str, str]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for entry in entries:
        row = rows.setdefault(entry.prompt, _prompt_row(entry, chosen, known, info))
        name = _vbench_name(entry, len(row["video_list"]))
        names[name] = {"file_name": entry.file_name, "sha256": file_digest(entry.path)}
        row["video_list"].append(str((out / VIDEOS / name).resolve()))
    (out / VIDEOS).mkdir(parents=True, exist_ok=True)
    before = _exported(out)
    for name in before.keys() - names.keys():  # VBench would score them too
        (out / VIDEOS / name).unlink(missing_ok=True)
    for entry, name in zip(entries, names, strict=True):
        _link(entry.path, out / VIDEOS / name)
    old, new = _rows_by_dimension(_info_rows(out)), _rows_by_dimension(list(rows.values()))
    for path in out.glob(f"*{RESULTS}"):
        of = json.loads(path.read_text(encoding="utf-8"))
        if before != names or any(old.get(name) != new.get(name) for name in of):
            path.unlink()
    _forget_written(out)
    write_atomic(out / NAMES, json.dumps(names, indent=1, ensure_ascii=False) + "\n")
    write_atomic(out / SOURCE, json.dumps({"videos": str(Path(videos).resolve())}) + "\n")
    written = json.dumps(list(rows.values()), indent=1, ensure_ascii=False)
    write_atomic(out / INFO, written + "\n")
    return out / INFO


def _forget_written(out: Path) -> None:
    """Delete what write_results wrote into an export: it is of results that no longer hold."""
    for name in (WRITTEN, INPUTS) if (out / SOURCE).is_file() else ():
        (out / name).unlink(missing_ok=True)


def _info_rows(out: Path) -> list[dict[str, Any]]:
    """The rows of an export's info file, none before the first export."""
    path = out / INFO
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def _rows_by_dimension(rows: Sequence[Mapping[str, Any]]) -> dict[str, list]:
    """What VBench is given for each dimension: the prompts, what it knows of them, their videos."""
    found: dict[str, list] = {}
    for row in rows:
        for name in row["dimension"]:
            about = row.get("auxiliary_info")
            found.setdefault(name, []).append([row["prompt_en"], about, row["video_list"]])
    return found


def _vbench_name(entry: Entry, index: int) -> str:
    """Its file name there; raises ValueError if it cannot have one."""
    if not entry.path.is_file():
        raise ValueError(f"{entry.path}: expected a video file, got nothing there")
    if entry.path.suffix.lower() != ".mp4":
        raise ValueError(f"{entry.path}: expected an mp4 file for VBench, got {entry.path.suffix}")
    name = f"{entry.prompt}-{index}.mp4"
    if "/" in name or "\0" in name or len(name.encode()) > 255:
        raise ValueError(
            f"{entry.file_name}: expected a prompt that VBench can use as a file name, got"
            f" {entry.prompt!r}"
        )
    return name


def _prompt_row(
    entry: Entry, chosen: Sequence[str], known: Mapping[str, dict] | None, info: object
) -> dict[str, Any]:
    """The row of a prompt in the info file, without its videos."""
    row: dict[str, Any] = {"prompt_en": entry.prompt, "dimension": [], "video_list": []}
    if known is None:
        row["dimension"] = [name for name in chosen if counts_for(entry.dimensions, name)]
        return row
    if entry.prompt not in known:
        raise ValueError(
            f"info: expected every prompt in {info}, got none like {entry.prompt[:80]!r}"
        )
    about = known[entry.prompt]
    row["dimension"] = [name for name in chosen if name in about["dimension"]]
    return row | {"auxiliary_info": about["auxiliary_info"]}


def _read_info(path: Path) -> dict[str, dict]:
    """{prompt: {"dimension", "auxiliary_info"}} of a full-info JSON, all rows of a prompt
    together.
    """
    found: dict[str, dict] = {}
    try:
        for row in json.loads(path.read_text(encoding="utf-8")):
            about = found.setdefault(row["prompt_en"], {"dimension": [], "auxiliary_info": {}})
            about["dimension"] += row["dimension"]
            about["auxiliary_info"] |= row.get("auxiliary_info", {})
    except (OSError, ValueError, TypeError, KeyError) as error:
        form = '[{"prompt_en", "dimension", "auxiliary_info"}]'
        raise ValueError(f"{path}: expected {form} of VBench, got {error}") from None
    return found


def _exported(out: Path) -> dict[str, dict[str, str]]:
    """What an export wrote into `out`/videos: the videos' own names and digests by the names that
    it gave them.
    """
    return json.loads((out / NAMES).read_text(encoding="utf-8")) if (out / NAMES).is_file() else {}


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def run(
    out: str | Path, chosen: Sequence[str], *, python: str | Path | None = None
) -> dict[str, dict]:
    """Run VBench's own code, a dimension after the other, on an exported folder, and return what
    `read` finds. What it printed is in `out`/runs.

    `python`: of another environment with VBench than `sla2 vbench --setup` makes. Raises
    RuntimeError if there is none or VBench fails or scores other videos than the exported ones,
    ValueError for a folder that VBench would not score whole.
    """
    out = Path(out).resolve()
    check_names(chosen)
    # Absolute, since VBench runs in a folder of its own; links stay, which lead to an environment.
    interpreter = Path(python).absolute() if python is not None else ready_for(chosen)
    if not interpreter.is_file():
        raise ValueError(
            f"python: expected the Python of an environment with VBench, got none at {interpreter}"
        )
    expected = {dimension: _expected(out, dimension) for dimension in chosen}
    for dimension in chosen:
        path = out / f"{dimension}{RESULTS}"
        path.unlink(missing_ok=True)
        _forget_written(out)
        folder = out / "runs" / f"{dimension}-{uuid.uuid4().hex[:8]}"
        found = evaluate(interpreter, dimension, out / VIDEOS, out / INFO, folder)
        _, values = _parsed(found, dimension, folder)
        wanted = expected[dimension]
        whole = bool(values) if DIMENSIONS[dimension].partial else values.keys() == wanted
        if not whole or not values.keys() <= wanted:
            raise RuntimeError(
                f"vbench --dimension {dimension}: expected results of {len(wanted)} videos, got"
                f" {len(values.keys() & wanted)} of them ({folder})"
            )
        write_atomic(path, json.dumps({dimension: found[dimension]}, indent=1) + "\n")
    return read(out)


def exported_dimensions(out: str | Path) -> list[str]:
    """The dimensions of an export, in VBench's order. Raises ValueError if there is none."""
    path = Path(out) / INFO
    if not path.is_file():
        raise ValueError(f"{path}: expected an export (sla2 vbench --videos), got none")
    found = _rows_by_dimension(_info_rows(Path(out)))
    return [name for name in DIMENSIONS if name in found]


def exported_from(out: str | Path) -> Path | None:
    """The folder of videos that the last export was made of; None without one."""
    path = Path(out) / SOURCE
    return Path(json.loads(path.read_text(encoding="utf-8"))["videos"]) if path.is_file() else None


def has_results(out: str | Path) -> bool:
    """Whether VBench left results in a folder."""
    return any(Path(out).glob(f"*{RESULTS}"))


def _expected(out: Path, dimension: str) -> set[str]:
    """The names of the exported videos that VBench scores in a dimension."""
    exported = _exported(out)
    if other := sorted(p.name for p in (out / VIDEOS).iterdir() if p.name not in exported):
        raise ValueError(f"{out / VIDEOS}: expected the exported videos alone, got {other[0]}")
    found = set[str]()
    for row in _info_rows(out):
        if dimension not in row["dimension"]:
            continue
        if len(row["video_list"]) > MOST:
            raise ValueError(
                f"{out}: expected at most {MOST} videos a prompt, as VBench looks at no more, got"
                f" {len(row['video_list'])} of {row['prompt_en'][:80]!r}"
            )
        found |= {Path(path).name for path in row["video_list"]}
    if not found:
        raise ValueError(f"{out}: expected videos of {dimension}, got none")
    return found


def _parsed(
    found: Mapping[str, Any], dimension: str, where: Path
) -> tuple[float, dict[str, float]]:
    """Mean and values by file name, on one scale. Raises ValueError naming `where` for another
    form.
    """
    try:
        mean, rows = found[dimension]
        values = {
            Path(row["video_path"]).name: float(row["video_results"]) / _scale(dimension)
            for row in rows
        }
        if not math.isfinite(float(mean)) or not all(map(math.isfinite, values.values())):
            raise ValueError("a number that is not finite")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        form = "{dimension: [mean, [{video_path, video_results}]]}"
        raise ValueError(f"{where}: expected {form}, got something else ({error})") from error
    return float(mean), values


def read(out: str | Path) -> dict[str, dict]:
    """The results of VBench in a folder: {dimension: {"mean", "normalised", "videos": {file name:
    value}}}.

    File names are those of the exported videos before their renaming. Raises ValueError naming the
    file for one of another form, of other videos than the exported ones, and of a dimension that
    another file has too; and if there is none.
    """
    out = Path(out)
    paths = sorted(out.glob(f"*{RESULTS}"))
    if not paths:
        raise ValueError(f"{out}: expected *{RESULTS} of VBench, got none")
    exported, found = _exported(out), dict[str, dict]()
    of: dict[str, Path] = {}
    for path in paths:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            check_names(content)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: expected results of VBench, got {error}") from error
        for dimension in content:
            if before := of.get(dimension):
                raise ValueError(
                    f"{path}: expected {dimension} in one file, got it in {before} too"
                )
            of[dimension] = path
            mean, values = _parsed(content, dimension, path)
            if exported and (other := next((n for n in values if n not in exported), None)):
                raise ValueError(
                    f"{path}: expected results of the videos in {out / VIDEOS}, got one of {other}"
                )
            found[dimension] = {
                "mean": mean,
                "normalised": DIMENSIONS[dimension].normalised(mean),
                "videos": {
                    exported[name]["file_name"] if exported else name: value
                    for name, value in values.items()
                },
            }
    return found


def _spec(dimension: str) -> MetricSpec:
    """A dimension by VBench's own code, as a metric."""
    return MetricSpec(
        name=f"vbench_{dimension}",
        kind="unpaired",
        title=f"{dimension.replace('_', ' ')} (VBench)",
        definition=f"VBench's own code of {dimension}, in an environment of its own",
        source=f"arXiv 2311.17982; VBench {VERSION}",
        value_range=(None, None),
        higher_is_better=True,
        binary=DIMENSIONS[dimension].binary,
        vbench=dimension,
    )


def write_results(out: str | Path, videos: str | Path, found: Mapping[str, dict]) -> Path:
    """Write what `read` found as `out`/results.json in the form of `sla2 score`, metrics called
    vbench_DIMENSION, so that a report takes the folder.
    """
    out, entries = Path(out), read_manifest(videos)
    digests = {about["file_name"]: about["sha256"] for about in _exported(out).values()}
    known = {e.path: digests[e.file_name] for e in entries if e.file_name in digests}
    specs = {spec.name: spec for spec in map(_spec, found)}
    values: dict[tuple[str, str, str], dict] = {
        ("video", file_name, f"vbench_{dimension}"): {"value": value}
        for dimension, about in found.items()
        for file_name, value in about["videos"].items()
    }
    given = _rows_by_dimension(_info_rows(out))
    names = {name: about["file_name"] for name, about in _exported(out).items()}
    for dimension in found:
        for _, _, paths in given.get(dimension, []) if DIMENSIONS[dimension].partial else []:
            for file_name in (names[Path(path).name] for path in paths):
                left_out = {"left_out": "VBench found no such object in it"}
                values.setdefault(("video", file_name, f"vbench_{dimension}"), left_out)
    run = Elsewhere(specs=specs, results=values, digests=known)
    results = document(run, entries, None, list(specs))
    for dimension, about in found.items():
        entry = results["metrics"][f"vbench_{dimension}"]
        entry |= {"vbench_mean": about["mean"], "normalised": about["normalised"]}
    write_atomic(out / INPUTS, json.dumps({"videos": str(Path(videos).resolve())}) + "\n")
    path = out / WRITTEN
    written = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomic(path, written + "\n")
    return path


def with_scores(found: Mapping[str, dict], out: str | Path, folder: str | Path) -> dict[str, dict]:
    """`found`, as `read` returns it for `out`, and the dimensions that `sla2 score` left in
    `folder` beside them, in VBench's order. VBench's own come first.

    Raises ValueError naming the folder if it has no results or is of other videos.
    """
    path = Path(folder) / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        theirs = {row["file_name"]: row["sha256"] for row in results["videos"]}
        dimensions = {
            about["vbench"]: {"mean": about["vbench_mean"], "normalised": about["normalised"]}
            for about in results["metrics"].values()
            if about.get("vbench") and about.get("vbench_mean") is not None
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: expected results of sla2 score, got {error}") from error
    ours = {about["file_name"]: about["sha256"] for about in _exported(Path(out)).values()}
    if ours and ours != theirs:
        differing = sorted(n for n in ours.keys() | theirs if ours.get(n) != theirs.get(n))
        raise ValueError(
            f"{path}: expected scores of the videos exported to {out}, got others ({differing[0]})"
        )
    both = {**dimensions, **found}
    return {name: both[name] for name in DIMENSIONS if name in both}


def table(found: Mapping[str, dict]) -> list[dict[str, Any]]:
    """Rows of the dimensions of `read` or `with_scores`, and of the three scores: "dimension",
    "mean", "normalised", and a "note" that says what a score lacks.
    """
    rows = [
        {"dimension": name, "mean": about["mean"], "normalised": about["normalised"]}
        for name, about in found.items()
    ]
    known = scores({name: about["mean"] for name, about in found.items()})
    for title, value in known.by_title().items():
        note = f"needs {', '.join(known.missing)} too" if value is None else ""
        rows.append({"dimension": title, "mean": None, "normalised": value, "note": note})
    return rows
