"""The VBench adapter: what the original expects, its command, and its results back."""

import dataclasses
import json
import os
import sys
import types

import pytest
from sla2_eval.cli.main import main
from sla2_eval.scoring import metrics, vbench
from sla2_eval.scoring.score import score
from sla2_eval.scoring.summary import document
from sla2_eval.scoring.vbench import as_vbench, export, read, run
from sla2_eval.videos.manifest import read_manifest

EVALUATE = """#!{python}
import json, sys
from pathlib import Path
options = dict(zip(sys.argv[2::2], sys.argv[3::2]))
assert sys.argv[1] == "evaluate"
if options["--dimension"] == "imaging_quality":
    sys.exit("no GPU")
info = json.loads(Path(options["--full_json_dir"]).read_text())
rows = []
for entry in info:
    assert options["--dimension"] in entry["dimension"]
    for i, path in enumerate(entry["video_list"]):
        assert Path(path).parent == Path(options["--videos_path"]).resolve()
        assert Path(path).name == f"{{entry['prompt_en']}}-{{i}}.mp4"
        assert Path(path).stat().st_size
        rows.append({{"video_path": path, "video_results": 0.5 + len(rows)}})
out = Path(options["--output_path"]) / (options["--dimension"] + "_eval_results.json")
mean = sum(r["video_results"] for r in rows) / len(rows)
out.write_text(json.dumps({{options["--dimension"]: [mean, rows]}}))
"""


@pytest.fixture
def folder(make_folder):
    """Two videos of one prompt, with seeds for indices, and one of another."""
    folder = make_folder("a", 3, height=32, width=32)
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    rows[0] |= {"prompt": "a fox", "index": 41}
    rows[1] |= {"prompt": "a fox", "index": 7}
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_export_run_and_read_back(folder, tmp_path, monkeypatch):
    out = tmp_path / "vbench"
    info = json.loads(export(folder, out, ["temporal_flickering", "imaging_quality"]).read_text())
    assert [entry["prompt_en"] for entry in info] == ["a fox", "pattern 002"]
    assert sorted(os.listdir(out / "videos")) == ["a fox-0.mp4", "a fox-1.mp4", "pattern 002-0.mp4"]
    assert (out / "videos" / "a fox-0.mp4").read_bytes() == (
        folder / "pattern 001-0.mp4"
    ).read_bytes()

    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "vbench"
    command.write_text(EVALUATE.format(python=sys.executable))
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    found = run(out, ["temporal_flickering"])
    assert found == {
        "temporal_flickering": {
            "mean": 1.5,
            "normalised": pytest.approx((1.5 - 0.6293) / (1 - 0.6293)),
            "videos": {
                "pattern 001-0.mp4": 0.5,
                "pattern 000-0.mp4": 1.5,
                "pattern 002-0.mp4": 2.5,
            },
        }
    }
    assert read(out) == found
    with pytest.raises(RuntimeError, match="--dimension imaging_quality: exit code 1: no GPU"):
        run(out, ["imaging_quality"])


def test_results_are_written_in_vbenchs_form(folder, tmp_path):
    results = score(
        folder, None, ["temporal_flickering", "motion_smoothness_linear"], tmp_path / "out"
    )
    written = json.loads((tmp_path / "out" / "vbench_eval_results.json").read_text())
    assert written == as_vbench(results)
    assert list(written) == ["temporal_flickering"]
    mean, rows = written["temporal_flickering"]
    assert mean == pytest.approx(sum(row["video_results"] for row in rows) / 3)
    assert rows[0]["video_path"] == "pattern 000-0.mp4"
    assert read(tmp_path / "out")["temporal_flickering"]["mean"] == mean
    score(folder, None, ["motion_smoothness_linear"], tmp_path / "out")
    assert not (tmp_path / "out" / "vbench_eval_results.json").exists()


def test_totals_weigh_videos_as_vbench_does(folder, tmp_path, monkeypatch):
    """Not by prompt; and the consistencies by pairs of frames, so that a long video counts more."""
    spec = metrics.specs()["temporal_flickering"]
    results = {
        ("video", name, metric): {"value": value, **weight}
        for metric, weights in (("a", [{}] * 3), ("b", [{"weight": w} for w in (4, 1, 1)]))
        for name, value, weight in zip(
            ("pattern 000-0.mp4", "pattern 001-0.mp4", "pattern 002-0.mp4"),
            (0.9, 0.6, 0.3),
            weights,
        )
    }
    specs = {name: dataclasses.replace(spec, name=name) for name in ("a", "b")}
    run = types.SimpleNamespace(
        specs=specs,
        results=results,
        failures={},
        unavailable={},
        digests={},
        used_settings=lambda spec: {},
    )
    found = document(run, read_manifest(folder), None, ["a", "b"])["metrics"]
    # The first two are of one prompt.
    assert [found[name]["mean"] for name in "ab"] == pytest.approx([(0.75 + 0.3) / 2] * 2)
    totals = [(0.9 + 0.6 + 0.3) / 3, (4 * 0.9 + 0.6 + 0.3) / 6]
    assert [found[name]["vbench_mean"] for name in "ab"] == pytest.approx(totals)
    assert found["b"]["normalised"] == pytest.approx((totals[1] - 0.6293) / (1 - 0.6293))
    listed = {"metrics": {"b": found["b"]}, "videos": [{"file_name": "x", "scores": {"b": 0.9}}]}
    assert as_vbench(listed)["temporal_flickering"][0] == found["b"]["vbench_mean"]


def test_a_dimension_counts_its_own_prompts(folder, tmp_path):
    """As the manifest of generated videos has them; metrics themselves are of all videos."""
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    for row, dimensions in zip(rows, (["scene"], ["scene"], ["temporal_flickering"])):
        row["dimensions"] = dimensions
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = ["temporal_flickering", "motion_smoothness_linear"]
    found = score(folder, None, names, tmp_path / "out")
    values = [row["scores"][names[0]] for row in found["videos"]]
    about = found["metrics"][names[0]]
    assert about["num_videos"] == 3
    assert about["vbench_mean"] == values[2] != about["mean"]
    mean, listed = json.loads((tmp_path / "out" / "vbench_eval_results.json").read_text())[names[0]]
    assert mean == about["vbench_mean"]
    assert [row["video_path"] for row in listed] == ["pattern 002-0.mp4"]
    info = json.loads(export(folder, tmp_path / "vbench", ["temporal_flickering"]).read_text())
    shown = {entry["prompt_en"]: entry["dimension"] for entry in info}
    assert shown == {"a fox": [], "pattern 002": ["temporal_flickering"]}


def test_vbenchs_imaging_quality_of_single_videos_is_in_percent(tmp_path):
    about = {"vbench": "imaging_quality", "vbench_mean": 0.625}
    rows = [{"file_name": n, "scores": {"iq": v}} for n, v in (("a.mp4", 0.5), ("b.mp4", 0.75))]
    theirs = as_vbench({"metrics": {"iq": about}, "videos": rows})
    mean, listed = theirs["imaging_quality"]
    assert (mean, [row["video_results"] for row in listed]) == (0.625, [50.0, 75.0])
    (tmp_path / "x_eval_results.json").write_text(json.dumps(theirs))
    found = read(tmp_path)["imaging_quality"]
    assert (found["mean"], found["videos"]) == (0.625, {"a.mp4": 0.5, "b.mp4": 0.75})


def test_what_vbench_cannot_take_is_refused(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="dimensions: expected names among subject_consistency"):
        export(folder, tmp_path / "out", ["sharpness"])
    (folder / "manifest.jsonl").write_text(
        '{"file_name": "pattern 000-0.mp4", "prompt": "either/or"}\n'
    )
    with pytest.raises(
        ValueError, match="expected a prompt that VBench can use as a file name, got 'either/or'"
    ):
        export(folder, tmp_path / "out")
    (folder / "manifest.jsonl").write_text('{"file_name": "absent.mp4", "prompt": "x"}\n')
    with pytest.raises(ValueError, match=r"absent\.mp4: expected a video file"):
        export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="expected the vbench command"):
        run(tmp_path, ["temporal_flickering"])
    with pytest.raises(ValueError, match="got none"):
        read(tmp_path)
    (tmp_path / "x_eval_results.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"x_eval_results\.json: expected"):
        read(tmp_path)


def test_an_export_holds_its_own_videos_alone(folder, tmp_path):
    out = tmp_path / "vbench"
    export(folder, out, ["temporal_flickering"])
    (out / "videos" / "mine.txt").touch()
    (folder / "manifest.jsonl").write_text(
        '{"file_name": "pattern 000-0.mp4", "prompt": "a fox"}\n'
    )
    export(folder, out, ["temporal_flickering"])
    assert sorted(os.listdir(out / "videos")) == ["a fox-0.mp4", "mine.txt"]


def test_an_export_never_touches_the_videos_themselves(make_folder, tmp_path):
    folder = make_folder("run/videos", 2, height=32, width=32)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(
        ValueError,
        match=r"run: expected a folder for copies, got one whose videos/ holds .*pattern 000",
    ):
        export(folder, tmp_path / "run")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_dimensions_are_vbenchs():
    assert len(vbench.dimensions()) == 8


def test_the_command_prints_json_whatever_it_does(folder, tmp_path, capsys):
    options = ["--dimensions", "temporal_flickering", "--out", str(tmp_path / "out"), "--json"]
    assert main(["vbench", "--videos", str(folder), *options]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {"info": str(tmp_path / "out" / "VBench_full_info.json")}
    ]
    rows = [{"video_path": "a fox-0.mp4", "video_results": 0.9}]
    results = json.dumps({"temporal_flickering": [0.9, rows]})
    (tmp_path / "out" / "x_eval_results.json").write_text(results)
    assert main(["vbench", *options]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["dimension"], row["mean"]) == ("temporal_flickering", 0.9)
