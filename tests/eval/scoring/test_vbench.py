"""The VBench adapter: what the original expects, its command, and its results back."""

import dataclasses
import json
import os
import sys
import types

import pytest
from sla2_eval.cli.main import main
from sla2_eval.report.data import gather
from sla2_eval.scoring import metrics, vbench
from sla2_eval.scoring.score import score
from sla2_eval.scoring.summary import document
from sla2_eval.scoring.vbench import as_vbench, export, read, run
from sla2_eval.videos.manifest import read_manifest

EVALUATE = """#!{python}
import json, sys
from pathlib import Path
assert sys.argv[1:3] == ["-m", "torch.distributed.run"]
given = sys.argv[sys.argv.index("vbench.launch.evaluate") + 1:]
options = dict(zip(given[::2], given[1::2]))
dimension, out = options["--dimension"], Path(options["--output_path"])
assert Path.cwd() == out
if dimension == "imaging_quality":
    print("[rank0]: RuntimeError: no GPU", file=sys.stderr)
    print("torch.distributed.elastic...ChildFailedError:", file=sys.stderr)
    sys.exit(1)
rows = []
for entry in json.loads(Path(options["--full_json_dir"]).read_text()):
    if dimension not in entry["dimension"]:
        continue
    for i, path in enumerate(entry["video_list"]):
        assert Path(path).parent == Path(options["--videos_path"])
        assert Path(path).name == f"{{entry['prompt_en']}}-{{i}}.mp4"
        assert Path(path).stat().st_size
        rows.append({{"video_path": path, "video_results": 0.5 + len(rows)}})
if dimension in ("scene", "color"):  # of color VBench leaves out what it does not find
    rows.pop()
mean = sum(r["video_results"] for r in rows) / len(rows)
if dimension != "human_action":
    (out / "results_1_eval_results.json").write_text(json.dumps({{dimension: [mean, rows]}}))
"""


@pytest.fixture
def python(tmp_path):
    """What an environment's Python does when VBench is run in it."""
    command = tmp_path / "python"
    command.write_text(EVALUATE.format(python=sys.executable))
    command.chmod(0o755)
    return command


@pytest.fixture
def folder(make_folder):
    """Two videos of one prompt, with seeds for indices, and one of another."""
    folder = make_folder("a", 3, height=32, width=32)
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    rows[0] |= {"prompt": "a fox", "index": 41}
    rows[1] |= {"prompt": "a fox", "index": 7}
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_export_run_and_read_back(folder, python, tmp_path):
    out = tmp_path / "vbench"
    info = json.loads(export(folder, out, ["temporal_flickering", "imaging_quality"]).read_text())
    assert [entry["prompt_en"] for entry in info] == ["a fox", "pattern 002"]
    assert sorted(os.listdir(out / "videos")) == ["a fox-0.mp4", "a fox-1.mp4", "pattern 002-0.mp4"]
    assert (out / "videos" / "a fox-0.mp4").read_bytes() == (
        folder / "pattern 001-0.mp4"
    ).read_bytes()

    found = run(out, ["temporal_flickering"], python=python)
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
    failure = "--dimension imaging_quality: exit code 1: RuntimeError: no GPU"
    with pytest.raises(RuntimeError, match=failure):
        run(out, ["imaging_quality"], python=python)
    # The folder is one of a report's: VBench's own mean, and each video's value.
    assert main(["vbench", "--videos", str(folder), "--out", str(out)]) == 0
    data = gather(out)
    assert data["metrics"]["vbench_temporal_flickering"]["title"] == "temporal flickering (VBench)"
    (group,) = data["groups"]
    assert group["metrics"]["vbench_temporal_flickering"]["num_videos"] == 3


def test_old_results_are_never_read_as_new(folder, python, tmp_path):
    out = tmp_path / "vbench"
    chosen = ["temporal_flickering", "human_action"]
    export(folder, out, chosen)
    old = [0.9, [{"video_path": "a fox-0.mp4", "video_results": 0.9}]]
    (out / "human_action_eval_results.json").write_text(json.dumps({"human_action": old}))
    with pytest.raises(RuntimeError, match="human_action: expected one result, got 0"):
        run(out, ["human_action"], python=python)
    assert not (out / "human_action_eval_results.json").exists()
    run(out, ["temporal_flickering"], python=python)
    export(folder, out, chosen)  # the same videos
    assert vbench.has_results(out)
    (out / "x_eval_results.json").write_text(json.dumps({"temporal_flickering": old}))
    with pytest.raises(ValueError, match="expected temporal_flickering in one file, got it in "):
        read(out)
    (out / "x_eval_results.json").unlink()
    (folder / "pattern 002-0.mp4").write_bytes((folder / "pattern 000-0.mp4").read_bytes())
    export(folder, out, chosen)
    assert not vbench.has_results(out)
    (out / "videos" / "mine.txt").touch()
    with pytest.raises(ValueError, match=r"expected the exported videos alone, got mine\.txt"):
        run(out, chosen, python=python)


def test_prompts_have_what_the_full_info_says(folder, python, tmp_path):
    rows = [
        {"prompt_en": "a fox", "dimension": ["scene"], "auxiliary_info": {"scene": {"scene": "x"}}},
        {"prompt_en": "a fox", "dimension": ["human_action", "color"]},
        {"prompt_en": "pattern 002", "dimension": ["color"], "auxiliary_info": {"color": {}}},
    ]
    info, out = tmp_path / "info.json", tmp_path / "vbench"
    info.write_text(json.dumps(rows))
    found = json.loads(export(folder, out, info=info).read_text())
    assert found[0]["dimension"] == ["human_action", "color", "scene"]
    assert found[0]["auxiliary_info"] == {"scene": {"scene": "x"}}
    assert vbench.exported_dimensions(out) == ["human_action", "color", "scene"]
    with pytest.raises(RuntimeError, match="scene: expected results of 2 videos, got 1 of them"):
        run(out, ["scene"], python=python)
    assert not vbench.has_results(out)
    assert list(run(out, ["color"], python=python)["color"]["videos"].values()) == [0.5, 1.5]
    assert main(["vbench", "--out", str(out)]) == 0
    written = json.loads((out / "results.json").read_text())
    color = written["metrics"]["vbench_color"]
    assert (color["num_videos"], color["num_left_out"]) == (2, 1)
    rows[1]["dimension"].remove("human_action")
    info.write_text(json.dumps(rows))
    export(folder, out, info=info)  # color is asked of the same videos as before
    assert vbench.has_results(out)
    assert not (out / "results.json").exists()
    rows[1]["dimension"].remove("color")
    info.write_text(json.dumps(rows))
    export(folder, out, info=info)
    assert not vbench.has_results(out)
    with pytest.raises(ValueError, match="python: expected the Python of an environment"):
        run(out, ["scene"], python="none/python")
    with pytest.raises(ValueError, match=r"info: expected VBench_full_info\.json .* for scene"):
        export(folder, out, ["scene"])
    info.write_text(json.dumps(rows[:1]))
    with pytest.raises(ValueError, match=r"info: expected every prompt .* like 'pattern 002'"):
        export(folder, out, info=info)


def test_the_table_takes_scores_of_the_same_videos(folder, python, tmp_path, capsys):
    out, scored = tmp_path / "vbench", tmp_path / "scores"
    score(folder, None, ["temporal_flickering"], scored)
    options = ["--out", str(out), "--scores", str(scored), "--json"]
    command = ["vbench", "--videos", str(folder), "--dimensions", "aesthetic_quality", *options]
    assert main([*command, "--run", "--python", str(python)]) == 0
    rows = {row["dimension"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows)[:2] == ["temporal_flickering", "aesthetic_quality"]  # in VBench's order
    assert rows["aesthetic_quality"]["mean"] == 1.5
    assert rows["Quality score"]["normalised"] is None
    assert "needs subject_consistency" in rows["Quality score"]["note"]
    (folder / "pattern 002-0.mp4").write_bytes((folder / "pattern 000-0.mp4").read_bytes())
    export(folder, out, ["aesthetic_quality"])
    assert main(["vbench", *options]) == 2
    assert "expected scores of the videos exported to" in capsys.readouterr().err


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
    assert [found[name]["vbench_weight"] for name in "ab"] == [3, 6]
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
    monkeypatch.setenv("SLA2_CACHE", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"expected its environment in .* --setup\), got none"):
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
    row, *scores = json.loads(capsys.readouterr().out)
    assert (row["dimension"], row["mean"]) == ("temporal_flickering", 0.9)
    assert [one["normalised"] for one in scores] == [None] * 3
