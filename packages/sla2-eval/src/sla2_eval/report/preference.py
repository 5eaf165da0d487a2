"""A blind page on which people choose between the videos of two variants, and their votes as the
metric `preference`.
"""

from __future__ import annotations

import json
import random
import secrets
import shutil
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from sla2_eval.report.groups import Group, grouped
from sla2_eval.report.sources import read_json, read_source
from sla2_eval.runs.extras import needed_for
from sla2_eval.runs.folders import INPUTS
from sla2_eval.runs.store import file_digest, write_atomic
from sla2_eval.scoring.metrics import MetricSpec
from sla2_eval.scoring.summary import Elsewhere, document
from sla2_eval.videos.image import SUFFIXES
from sla2_eval.videos.manifest import Entry

KEY, PAGE, RESULTS = "key.json", "page", "results.json"
CHOICES = ("left", "right", "same")
SPEC = MetricSpec(
    name="preference",
    kind="paired",
    title="Preference",
    definition="share of the pairs of which most raters preferred the variant's video to the"
    " reference's, of those with a majority; the raters did not know which was which",
    source="the votes of a page of sla2 preference",
    value_range=(0.0, 1.0),
    higher_is_better=True,
    binary=True,
)


def export(
    folders: Sequence[str | Path],
    variant: str,
    out: str | Path,
    *,
    reference: str | Path | None = None,
) -> Path:
    """Write `out`/page with index.html and the videos for raters, and `out`/key.json, which says
    what they are and stays here.

    Pairs come in a random order, and each variant is on the left in half of them. Files have names
    that do not tell.

    Args:
        folders: as of a report. variant: the label of its row. reference: a folder or a label; that
            of the folders if None.

    Returns:
        The page.

    Raises:
        ValueError: no such variant or no reference, no video that both have, or an `out` that holds
            a key already.
    """
    with needed_for("a page of preferences"):
        from jinja2 import Environment, PackageLoader, StrictUndefined

    out = Path(out)
    if (out / KEY).exists():
        raise ValueError(f"{out}: expected a new folder, got one with {KEY}, whose votes count")
    sides = _sides(folders, variant, reference)
    names = sorted(sides["variant"][1].keys() & sides["reference"][1].keys())
    if not names:
        raise ValueError(f"--variant: expected videos that both sides have, got none of {variant}")
    draw = random.SystemRandom()
    draw.shuffle(names)
    on_left = [("variant", "reference")[number % 2] for number in range(len(names))]
    draw.shuffle(on_left)
    pairs, shown = {}, []
    for number, (name, left) in enumerate(zip(names, on_left, strict=True), 1):
        right = "reference" if left == "variant" else "variant"
        chosen = {side: sides[of][1][name] for side, of in (("left", left), ("right", right))}
        media = {}
        for side, entry in chosen.items():
            media[side] = f"videos/{number:03d}-{side}{entry.path.suffix}"
            (out / PAGE / "videos").mkdir(parents=True, exist_ok=True)
            shutil.copyfile(entry.path, out / PAGE / media[side])
        mine = sides["variant"][1][name]
        about = {"file_name": name, "prompt": mine.prompt, "index": mine.index, "seed": mine.seed}
        digests = {of: file_digest(sides[of][1][name].path) for of in ("variant", "reference")}
        pairs[f"{number:03d}"] = {**about, "left": left, "sha256": digests}
        image = mine.path.suffix.lower() in SUFFIXES
        shown.append({"id": f"{number:03d}", "prompt": mine.prompt, "image": image, **media})
    page = secrets.token_hex(8)
    key = {"page": page, "pairs": pairs}
    for of, (group, entries, seed) in sides.items():
        root = _root(next(iter(entries.values())))
        key[of] = {"label": group.label, "seed": seed, "videos": str(root.resolve())}
    environment = Environment(
        loader=PackageLoader("sla2_eval.report"), autoescape=True, undefined=StrictUndefined
    )
    templates = files("sla2_eval.report") / "templates"
    text = environment.get_template("preference.html").render(
        data={"page": page, "pairs": shown},
        style=(templates / "report.css").read_text(),
        script=(templates / "preference.js").read_text(),
    )
    write_atomic(out / KEY, json.dumps(key, indent=1, ensure_ascii=False) + "\n")
    write_atomic(out / PAGE / "index.html", text)
    return out / PAGE / "index.html"


def _sides(
    folders: Sequence[str | Path], variant: str, reference: str | Path | None
) -> dict[str, tuple[Group, dict[str, Entry], int | None]]:
    """The row, the videos by file name and the seed of the variant and of its reference."""
    groups = grouped([read_source(folder) for folder in folders], reference)
    chosen = next((group for group in groups if group.label == variant), None)
    base = next((group for group in groups if group.reference), None)
    others = [group.label for group in groups if group is not base]
    if chosen is None or chosen is base:
        raise ValueError(f"--variant: expected one of {', '.join(others)}, got {variant!r}")
    if base is None:
        raise ValueError("--reference: expected a folder or a label, got none")
    return {"variant": _videos(chosen), "reference": _videos(base)}


def _videos(group: Group) -> tuple[Group, dict[str, Entry], int | None]:
    """Those of the first seed that has any, of one folder."""
    for seed in group.seeds():
        for member in group.of_seed(seed):
            entries = {k: entry for k, entry in member.entries().items() if entry.path.is_file()}
            if entries:
                return group, entries, seed
    raise ValueError(f"{group.label}: expected a folder with its videos, got none")


def _root(entry: Entry) -> Path:
    """The folder that the file names of a folder's entries are relative to."""
    return entry.path.parents[len(Path(entry.file_name).parts) - 1]


def count(out: str | Path, votes: Iterable[str | Path]) -> dict[str, Any]:
    """Write the votes as `out`/results.json in the form of `sla2 score`, which a report takes, and
    return its entry of the metric, with "num_raters", how many "votes" each side has, and
    "num_not_shown", the votes that were not taken as a browser could not show the pair.

    A pair counts by the majority of its raters, and is left out where there is none. Raises
    ValueError naming the file for votes of another page or form, and for two files of one rater.
    """
    out = Path(out)
    key = read_json(out / KEY, "the key of a page of preferences")
    ballots: dict[str, dict[str, str]] = {}
    not_shown = 0
    for path in map(Path, votes):
        rater, ballot, unshown = _ballot(path, key)
        not_shown += unshown
        if rater in ballots:
            raise ValueError(f"{path}: expected one file of each rater, got another of {rater!r}")
        ballots[rater] = ballot
    if not any(ballots.values()):
        raise ValueError("votes: expected at least one, got none")
    totals = dict.fromkeys(("variant", "reference", "same"), 0)
    entries, results, digests = [], {}, {}
    root = Path(key["variant"]["videos"])
    for number, pair in key["pairs"].items():
        name = pair["file_name"]
        entry = Entry(name, root / name, pair["prompt"], pair["index"], pair["seed"])
        entries.append(entry)
        digests[entry.path] = pair["sha256"]["variant"]
        found = [
            _side(ballot[number], pair["left"]) for ballot in ballots.values() if number in ballot
        ]
        for side in found:
            totals[side] += 1
        most = next((s for s in ("variant", "reference") if 2 * found.count(s) > len(found)), None)
        value: dict[str, Any] = {"left_out": "no majority"}
        if most is not None:
            value = {"value": float(most == "variant")}
        if found:
            results["video", name, SPEC.name] = value
    entries.sort(key=lambda entry: entry.file_name)
    run = Elsewhere(specs={SPEC.name: SPEC}, results=results, digests=digests)
    written = document(run, entries, None, [SPEC.name])
    about = written["metrics"][SPEC.name]
    about |= {"num_raters": len(ballots), "votes": totals, "num_not_shown": not_shown}
    inputs = {key_: key["variant"][key_] for key_ in ("videos", "label", "seed")}
    write_atomic(out / INPUTS, json.dumps(inputs, ensure_ascii=False) + "\n")
    write_atomic(out / RESULTS, json.dumps(written, indent=1, ensure_ascii=False) + "\n")
    return about


def _ballot(path: Path, key: dict[str, Any]) -> tuple[str, dict[str, str], int]:
    """Who voted, the choice of each pair, and how many pairs the browser could not show."""
    found = read_json(path, "votes that a page of preferences saved")
    if found.get("page") != key["page"]:
        raise ValueError(f"{path}: expected votes of the page of this folder, got those of another")
    rater, ballot = found.get("rater"), found.get("votes")
    if not isinstance(rater, str) or not rater.strip() or not isinstance(ballot, dict):
        raise ValueError(f"{path}: expected a rater and votes, got another form")
    for number, choice in ballot.items():
        if number not in key["pairs"] or choice not in CHOICES:
            raise ValueError(
                f"{path}: expected {', '.join(CHOICES)} for pairs of the page, got {choice!r} for"
                f" {number!r}"
            )
    return rater.strip(), ballot, len(found.get("unshown", {}))


def _side(choice: str, left: str) -> str:
    """What was chosen: "variant", "reference" or "same"."""
    if choice == "same":
        return choice
    right = "reference" if left == "variant" else "variant"
    return left if choice == "left" else right
