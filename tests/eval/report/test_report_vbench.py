"""VBench's dimensions and scores in a report."""

import json
from types import SimpleNamespace

import pytest
from sla2_eval.report.data import gather
from sla2_eval.report.page import write_report
from sla2_eval.report.vbench import part_means
from sla2_eval.scoring.vbench_dimensions import DIMENSIONS


def scored(folder, means, sha="x", prefix="vbench_", videos="v"):
    """What scoring or sla2 vbench leaves of one video in these dimensions."""
    kept = ("kind", "title", "definition", "source")
    about = {key: "unpaired" for key in kept} | {"higher_is_better": True, "binary": False}
    found = {
        f"{prefix}{name}": {**about, "vbench": name, "vbench_mean": mean, "num_videos": 1}
        for name, mean in means.items()
    }
    row = {"file_name": "a.mp4", "prompt": "a", "index": 0, "sha256": sha}
    row["scores"] = {f"{prefix}{name}": mean / 2 for name, mean in means.items()}
    results = {"format": 1, "metrics": found, "videos": [row], "failed": [], "unavailable": {}}
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "inputs.json").write_text(json.dumps({"videos": str(folder.parent / videos)}))
    return folder


def test_native_and_vbenchs_own_dimensions_make_the_scores(tmp_path):
    highs = {name: about.high for name, about in DIMENSIONS.items()}
    native = {name: highs[name] for name, about in DIMENSIONS.items() if about.quality}
    rest = {name: highs[name] for name in DIMENSIONS if name not in native}
    folders = [scored(tmp_path / "native", native | {"scene": 0.1}, prefix="")]
    folders += [scored(tmp_path / "theirs", rest)]
    (row,) = gather(folders)["vbench"]
    assert row["scores"] == pytest.approx(dict.fromkeys(row["scores"], 1.0))
    assert row["dimensions"]["scene"]["metric"] == "vbench_scene"  # before ours
    assert row["dimensions"]["scene"]["mean"] == 0.8222
    page = write_report(folders, out=tmp_path / "report").read_text()
    assert page.count("VBench’s own code") == 9
    assert "| **Total score** | 1.0000 |" in (tmp_path / "report" / "results.md").read_text()
    tex = (tmp_path / "report" / "results.tex").read_text()
    assert tex.count(r"\begin{tabular}{lr}") == 1
    assert "scene & 0.8222 \\\\\n" in tex
    assert "Total score & 1.0000 \\\\\n" in tex
    assert gather(tmp_path / "report" / "results.json")["vbench"] == [row]


def test_folders_of_parts_count_by_the_videos_of_the_dimension():
    """Of ten videos one was of the dimension in the first folder, three in the second."""
    about = {"vbench": "scene", "num_videos": 10}
    members = [
        SimpleNamespace(results={"metrics": {"vbench_scene": about | values}})
        for values in (
            {"vbench_mean": 1.0, "vbench_weight": 1},
            {"vbench_mean": 0.2, "vbench_weight": 3},
        )
    ]
    group = SimpleNamespace(of_seed=lambda seed: members)
    assert part_means(group, None)["vbench_scene"]["vbench_mean"] == pytest.approx(0.4)


def test_a_part_has_no_score_and_one_dimension_no_table(tmp_path):
    some = scored(tmp_path / "some", {"scene": 0.4, "color": 0.5})
    one = scored(tmp_path / "one", {"scene": 0.3}, sha="y", videos="w")
    first, second = gather([some, one])["vbench"]
    assert set(first["scores"].values()) == {None}
    assert list(first["dimensions"]) == ["color", "scene"]
    assert list(second["dimensions"]) == ["scene"]
    assert "unknown" in write_report([some, one], out=tmp_path / "report").read_text()
    assert gather(one)["vbench"] == []
