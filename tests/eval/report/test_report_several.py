"""One report over several folders: of grids, of scores, of generated videos, of other reports."""

import json
from pathlib import Path

import pytest
from sla2_eval.cli.main import main
from sla2_eval.report.data import gather
from sla2_eval.report.page import write_report
from sla2_eval.report.sources import read_source

ROOT = Path(__file__).parents[3]
BASE = [0.9, 0.8, 0.87, 0.83, 0.88, 0.81, 0.86]


def write(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


ABOUT = {
    "kind": "unpaired",
    "title": "Temporal flickering",
    "higher_is_better": True,
    "definition": "of it",
    "source": "somewhere",
    "mean": 0.0,
}


def scored(values, index=0, sha="", reference=None) -> dict:
    """What scoring leaves of seven videos with this number."""
    rows = []
    for number, value in enumerate(values):
        row = {"file_name": f"p{number}-{index}.mp4", "prompt": f"p{number}", "index": index}
        row |= {"sha256": f"{sha}{number}" if sha else None}
        row |= {"scores": {"temporal_flickering": value}}
        if reference is not None:
            theirs = {"temporal_flickering": reference[number]}
            row["reference"] = {"sha256": f"full{number}", "scores": theirs}
        rows.append(row)
    found = {"format": 1, "metrics": {"temporal_flickering": dict(ABOUT)}, "videos": rows}
    return {**found, "failed": [], "unavailable": {}, "versions": {"torch": "9.9"}}


def grid(folder: Path, seed: int, change: float, **settings) -> Path:
    """A run of full attention and one variant at one seed; both machines name the variant alike."""
    variants = [
        {"name": "full", "label": "full attention", "sparsity": 0.0},
        {"name": "v", "label": "SLA2 97 %", "family": "SLA2", "sparsity": 0.97, "seed": seed},
    ]
    run = {"title": folder.name, "variants": variants, "settings": settings}
    write(folder / "run.json", {**run, "hardware": {"processor": f"of {folder.name}"}})
    write(folder / "scores" / "full" / "results.json", scored(BASE, seed, f"f{seed}-"))
    low = [value + change for value in BASE]
    write(folder / "scores" / "v" / "results.json", scored(low, seed, f"{folder.name}-"))
    return folder


def test_seeds_of_two_machines_share_a_row(tmp_path):
    runs = [grid(tmp_path / name, seed, -0.1 - seed / 50) for seed, name in enumerate("ab")]
    data = gather(runs)
    assert [(g["label"], g["num_seeds"]) for g in data["groups"]] == [
        ("full attention", 0),
        ("SLA2 97 %", 2),
    ]
    assert [p["seed"] for p in data["groups"][1]["parts"]] == [0, 1]
    (pair,) = data["comparisons"]
    assert (pair["num_videos"], pair["num_seeds"], pair["n"]) == (14, 2, 7)
    assert pair["mean"] == pytest.approx(0.11)
    assert [run["hardware"]["processor"] for run in data["runs"]] == ["of a", "of b"]
    page = write_report(runs, out=tmp_path / "both").read_text()
    assert "of a" in page
    assert "of b" in page
    assert "<title>a · b</title>" in page


def test_other_trainings_of_one_name_are_other_rows(tmp_path):
    a = grid(tmp_path / "a", 0, -0.1, stage2={"steps": 100})
    b = grid(tmp_path / "b", 0, -0.2, stage2={"steps": 100})  # the same again, on another machine
    c = grid(tmp_path / "c", 1, -0.3, stage2={"steps": 200})
    data = gather([a, b, c], reference=b)
    labels = [group["label"] for group in data["groups"]]
    assert labels == ["full attention", "SLA2 97 %", "SLA2 97 % (b)", "SLA2 97 % (c)"]
    # Seed 1 has no video in common with seed 0, full attention has all.
    assert len(data["comparisons"]) == 4
    assert data["against"] == "full attention"


@pytest.fixture
def folders(tmp_path) -> dict[str, Path]:
    """Generated videos of full attention and of an adapter, and the scores of both metrics."""
    found = {}
    for name, adapter, seconds in (("dense", None, 4.0), ("sparse", "digest", 2.0)):
        found[name] = tmp_path / "videos" / name
        write(found[name] / "generation.json", {"adapter": adapter, "sampling": {"steps": 3}})
        line = json.dumps({"videos": 1, "seconds": seconds, "device": "H200"})
        (found[name] / "speed.jsonl").write_text(line + "\n")
    found["scores"] = tmp_path / "scores"
    inputs = {"videos": str(found["sparse"]), "reference": str(found["dense"])}
    write(found["scores"] / "inputs.json", inputs)
    low = [value - 0.1 - number / 100 for number, value in enumerate(BASE)]
    write(found["scores"] / "results.json", scored(low, reference=BASE))
    return found


def test_videos_and_scores_of_one_folder_share_a_row(folders, tmp_path, capsys):
    given = [str(folders[name]) for name in ("sparse", "dense", "scores")]
    out = tmp_path / "out"
    assert main(["report", *given, "--reference", given[1], "--out", str(out)]) == 0
    data = json.loads((out / "results.json").read_text())
    dense, sparse = data["groups"]
    assert [dense["label"], sparse["label"]] == ["dense", "sparse"]
    assert (dense["reference"], dense["sparsity"], sparse["sparsity"]) == (True, 0.0, None)
    assert dense["metrics"]["temporal_flickering"]["mean"] == pytest.approx(0.85)
    assert dense["metrics"]["temporal_flickering"]["low"] is not None
    difference = sparse["metrics"]["temporal_flickering"]["difference"]
    assert difference["mean"] == pytest.approx(-0.13)
    assert difference["p_holm"] == 2 / 2**7
    assert [(row["variant"], row["speedup"]) for row in data["speed"]] == [
        ("dense", 1.0),
        ("sparse", 2.0),
    ]
    markdown = (out / "results.md").read_text()
    assert "| sparse | unknown | " in markdown
    assert "Sparse is worse than dense’s 0.8500" in markdown
    assert gather(folders["dense"].parent)["groups"][1]["label"] == "sparse"
    assert main(["report", *given, "--reference", "none"]) == 2
    assert "--reference: expected one of " in capsys.readouterr().err


def test_the_cost_of_generated_videos_is_what_was_noted_of_their_batches(folders):
    batches = [(1, 0.9, 0.2), (3, 0.98, 0.1), (2, None, None)]
    lines = [
        {"videos": videos, "seconds": 1.0, "device": "H200"}
        | ({} if sparsity is None else {"sparsity": sparsity, "flops": flops})
        for videos, sparsity, flops in batches
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folders["sparse"] / "speed.jsonl").write_text(text)
    for given in ([folders["scores"]], [folders["dense"], folders["sparse"]], [*folders.values()]):
        dense, sparse = gather(given)["groups"]
        assert (dense["sparsity"], dense["flops"]) == (0.0, 1.0)
        assert (sparse["sparsity"], sparse["flops"]) == pytest.approx((0.96, 0.125))


def test_scores_against_other_videos_than_the_reference_s_are_said(folders):
    data = json.loads((folders["scores"] / "results.json").read_text())
    psnr = {**data["metrics"]["temporal_flickering"], "kind": "paired", "title": "PSNR"}
    data["metrics"]["psnr"] = psnr
    write(folders["scores"] / "results.json", data)
    other = folders["scores"].with_name("dense scores")
    write(other / "inputs.json", {"videos": str(folders["dense"])})
    write(other / "results.json", scored(BASE, sha="again"))
    note = "sparse: PSNR are against other videos than those of dense"
    assert not any(note in said for said in gather([folders["scores"]])["notes"])
    assert any(note in said for said in gather([folders["scores"], other], other)["notes"])


def test_scores_of_an_earlier_version_keep_their_difference(folders):
    path = folders["scores"] / "results.json"
    data = json.loads(path.read_text())
    for row in data["videos"]:
        del row["reference"]
    old = {"mean": -0.13, "low": -0.2, "high": -0.1, "n": 7, "within_noise": False}
    data["metrics"]["temporal_flickering"] |= {"reference_mean": 0.85, "difference": old}
    write(path, data)
    dense, sparse = gather(folders["scores"])["groups"]
    assert dense["metrics"]["temporal_flickering"]["mean"] == 0.85
    assert sparse["metrics"]["temporal_flickering"]["difference"] == old
    page = write_report(folders["scores"]).read_text()
    assert "Δ -0.1300" in page
    assert "interval unknown" in page


def test_a_report_is_made_again_from_its_results(run_dir, tmp_path):
    write_report(run_dir, out=tmp_path / "first")
    again = gather(tmp_path / "first" / "results.json")
    for key, value in gather(run_dir).items():
        if key not in ("groups", "runs"):
            assert again[key] == value, key
    write(tmp_path / "x.json", {"format": 3})
    with pytest.raises(ValueError, match=r"x\.json: expected the results\.json of a report"):
        gather(tmp_path / "x.json")


def test_the_results_in_the_repository_still_report(tmp_path):
    given = sorted((ROOT / "experiments" / "tiny_wan" / "results").glob("*.json"))
    for path in (path for path in given if path.stem in ("ablation", "long")):
        write_report(path, out=tmp_path / path.stem)
        old = json.loads(path.read_text())
        data = json.loads((tmp_path / path.stem / "results.json").read_text())
        means = [
            [{m: cell["mean"] for m, cell in g["metrics"].items()} for g in found["groups"]]
            for found in (old, data)
        ]
        assert means[0] == means[1]
        assert "of an earlier version" in (tmp_path / path.stem / "index.html").read_text()


@pytest.mark.parametrize("name", ["a dot-0.webm", "a dot-0.MKV", "a dot-0.png"])
def test_a_folder_of_videos_needs_neither_mp4_nor_manifest(tmp_path, name):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / name).write_bytes(b"")
    for folder in (tmp_path, tmp_path / "theirs"):
        (member,) = read_source(folder).members
        assert (member.label, list(member.entries())) == ("theirs", [name])


def test_what_is_no_folder_of_a_report_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    for path, what in ((tmp_path / "empty", "a folder without them"), (tmp_path / "no", "nothing")):
        with pytest.raises(
            ValueError, match=f"{path.name}: expected a folder of quickstart.*{what}"
        ):
            gather(path)
