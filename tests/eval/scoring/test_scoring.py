"""Scoring from end to end on small mp4 files, in one child process."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import toy_metric
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from sla2_eval.parallel.processes import ProcessPool
from sla2_eval.parallel.ray_pool import RayPool
from sla2_eval.scoring import metrics
from sla2_eval.scoring.score import ScoringError, score
from sla2_eval.scoring.summary import document
from sla2_eval.scoring.worker import Worker, score_video
from sla2_eval.videos.manifest import Entry
from sla2_eval.videos.video import read_video, write_video

PIXELS = ["psnr", "ssim", "temporal_flickering"]
CHEAP = [
    "temporal_flickering",
    "motion_smoothness_linear",
]  # need no torch, which takes seconds to import


def test_psnr_and_ssim_are_scikit_images(make_folder, tmp_path):
    videos, reference = make_folder("a", 2, noise=9.0), make_folder("b", 2)
    results = score(videos, reference, PIXELS, tmp_path / "out")
    for row in results["videos"]:
        ours, theirs = (
            read_video(folder / row["file_name"]).frames / 255.0 for folder in (videos, reference)
        )
        psnr = [peak_signal_noise_ratio(t, o, data_range=1.0) for o, t in zip(ours, theirs)]
        ssim = [
            structural_similarity(
                t,
                o,
                data_range=1.0,
                channel_axis=-1,
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
            )
            for o, t in zip(ours, theirs)
        ]
        assert row["scores"]["psnr"] == pytest.approx(np.mean(psnr), rel=1e-3)
        assert row["scores"]["ssim"] == pytest.approx(np.mean(ssim), rel=1e-3)
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["metrics"]["psnr"]["mean"] == pytest.approx(
        np.mean([r["scores"]["psnr"] for r in results["videos"]])
    )


def test_difference_to_the_reference_is_paired(make_folder, tmp_path):
    videos, reference = make_folder("a", 6, noise=9.0), make_folder("b", 6)
    flicker = score(videos, reference, ["temporal_flickering"], tmp_path / "out")["metrics"][
        "temporal_flickering"
    ]
    alone = score(reference, None, ["temporal_flickering"], tmp_path / "ref")["metrics"][
        "temporal_flickering"
    ]
    assert flicker["reference_mean"] == alone["mean"]
    assert flicker["difference"]["mean"] == pytest.approx(flicker["mean"] - alone["mean"])
    assert flicker["difference"]["mean"] < 0
    assert flicker["difference"]["p"] == 2 / 2**6
    assert not flicker["difference"]["within_noise"]
    assert flicker["normalised"] == pytest.approx((flicker["mean"] - 0.6293) / (1 - 0.6293))


def test_videos_of_one_prompt_without_numbers_all_count(make_folder, tmp_path):
    """A manifest may name one prompt for several files and give none an index."""
    videos, reference = make_folder("a", 4, noise=9.0), make_folder("b", 4)
    names = [f"pattern {i:03d}-0.mp4" for i in range(4)]
    rows = [
        {"file_name": name, "prompt": "one" if i < 3 else "other"} for i, name in enumerate(names)
    ]
    (videos / "manifest.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    results = score(videos, reference, ["temporal_flickering"], tmp_path / "out")
    values = [row["scores"]["temporal_flickering"] for row in results["videos"]]
    theirs = [
        row["scores"]["temporal_flickering"]
        for row in score(reference, None, ["temporal_flickering"], tmp_path / "b out")["videos"]
    ]
    found = results["metrics"]["temporal_flickering"]
    assert (found["num_videos"], found["num_prompts"]) == (4, 2)
    assert found["mean"] == pytest.approx((np.mean(values[:3]) + values[3]) / 2)
    # The references' manifest has other prompts: files pair by name, and the prompts are the
    # videos'.
    assert found["difference"]["n"] == 2
    assert found["difference"]["mean"] == pytest.approx(
        found["mean"] - (np.mean(theirs[:3]) + theirs[3]) / 2
    )
    assert found["reference_mean"] == pytest.approx((np.mean(theirs[:3]) + theirs[3]) / 2)


def test_a_reference_is_scored_and_kept_with_the_prompt_of_its_video(
    make_folder, tmp_path, monkeypatch
):
    load = "def load(name, settings, device):\n    return lambda sample: len(sample.prompt)\n"
    toy_metric.register(tmp_path / "hook", load, monkeypatch)
    videos, reference = make_folder("a", 1, noise=5.0), make_folder("b", 1)
    (videos / "manifest.jsonl").write_text(
        '{"file_name": "pattern 000-0.mp4", "prompt": "long, long prompt"}\n'
    )
    store = tmp_path / "store"
    both = score(videos, reference, [toy_metric.NAME], tmp_path / "out", store=store)["metrics"][
        "toy"
    ]
    assert both["mean"] == both["reference_mean"] == len("long, long prompt")
    alone = score(reference, None, [toy_metric.NAME], tmp_path / "alone", store=store)
    assert alone["metrics"]["toy"]["mean"] == len("pattern 000")


def test_references_of_no_video_do_not_count_for_the_difference():
    """A shared store may hold their scores, which are read where a set metric takes in every
    reference.
    """
    spec = metrics.specs()["temporal_flickering"]
    videos, references = (
        [Entry(f"{name}-0.mp4", Path(f"{name}-0.mp4"), name) for name in names]
        for names in ("ab", "bc")
    )
    run = SimpleNamespace(
        specs={spec.name: spec},
        results={
            ("video", "a-0.mp4", spec.name): {"value": 0.5},
            ("video", "b-0.mp4", spec.name): {"value": 0.75},
            ("reference", "b-0.mp4", spec.name): {"value": 0.25},
            ("reference", "c-0.mp4", spec.name): {"value": 1.0},
        },
        failures={},
        unavailable={},
        digests={},
        used_settings=lambda spec: {},
    )
    found = document(run, videos, references, [spec.name])["metrics"][spec.name]
    assert (found["mean"], found["reference_mean"], found["difference"]["mean"]) == (
        0.625,
        0.25,
        0.5,
    )


def test_a_metric_that_cannot_be_loaded_is_tried_once(make_folder, tmp_path, monkeypatch):
    hook = tmp_path / "hook"
    load = (
        "def load(name, settings, device):\n"
        "    with open(__file__ + '.log', 'a') as log:\n        log.write('x')\n"
        "    raise MetricUnavailable('unavailable: its weights are of another model')\n"
    )
    toy_metric.register(hook, load, monkeypatch)
    videos, calls = make_folder("a", 4), []
    results = score(
        videos, None, [toy_metric.NAME], tmp_path / "out", progress=lambda *call: calls.append(call)
    )
    assert results["unavailable"] == {"toy": "unavailable: its weights are of another model"}
    assert (hook / "toy_metrics.py.log").read_text() == "x"
    assert calls[-1] == ("toy", 4, 4)


@pytest.mark.parametrize(
    "workers", [1, pytest.param(2, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])]
)
def test_the_current_folder_shadows_no_library(make_folder, tmp_path, monkeypatch, workers):
    videos = make_folder("a", 1)
    for name in ("av", "random", "dataclasses", "socket"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not the library')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert score(videos, None, ["temporal_flickering"], tmp_path / "out", workers)["failed"] == []


def test_a_gpu_that_is_not_there_is_refused_before_anything_is_done(
    make_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("sla2_eval.parallel.processes.local_gpus", lambda: 0)
    videos = make_folder("a", 1)
    with pytest.raises(
        ValueError, match="device: expected a GPU that torch can use for 'cuda', got none"
    ):
        score(videos, None, ["temporal_flickering"], tmp_path / "out", device="cuda")


def test_rerun_uses_the_store_and_changed_videos_score_again(make_folder, tmp_path, monkeypatch):
    videos, reference = make_folder("a", 2, noise=5.0), make_folder("b", 2)
    first = score(videos, reference, CHEAP, tmp_path / "out")
    before = (tmp_path / "out" / "results.json").read_bytes()

    monkeypatch.setattr(
        "sla2_eval.scoring.score._open_pool", lambda *_: pytest.fail("a worker was started")
    )
    assert score(videos, reference, CHEAP, tmp_path / "out") == first
    assert (tmp_path / "out" / "results.json").read_bytes() == before
    monkeypatch.undo()

    name = first["videos"][0]["file_name"]
    write_video(videos / name, read_video(reference / name).frames // 2, 8)
    again = score(videos, reference, CHEAP, tmp_path / "out")
    assert again["videos"][0]["scores"] != first["videos"][0]["scores"]
    assert again["videos"][0]["sha256"] != first["videos"][0]["sha256"]
    assert again["videos"][1] == first["videos"][1]
    assert json.loads((tmp_path / "out" / "timing.json").read_text())["tasks"] == 1


def test_changed_settings_score_again(make_folder, tmp_path):
    videos, reference = make_folder("a", 1, noise=5.0), make_folder("b", 1)
    free = score(videos, reference, ["psnr"], tmp_path / "out")
    cut = score(videos, reference, ["psnr"], tmp_path / "out", settings={"psnr": {"limit": 10.0}})
    assert free["metrics"]["psnr"]["mean"] > 10.0 == cut["metrics"]["psnr"]["mean"]


def test_a_module_that_was_edited_scores_again(make_folder, tmp_path, monkeypatch):
    videos, out = make_folder("a", 1), tmp_path / "out"

    def mean(name: str, value: float) -> float:
        """Of the metric as its module now is."""
        load = f"\n\ndef load(name, settings, device):\n    return lambda sample: {value}\n"
        toy_metric.register(tmp_path / name, load, monkeypatch)
        return score(videos, None, [toy_metric.NAME], out)["metrics"]["toy"]["mean"]

    assert mean("before", 0.25) == 0.25
    assert mean("after", 0.5) == 0.5


def test_failures_are_listed_with_their_reasons(make_folder, tmp_path):
    videos, reference = make_folder("a", 4), make_folder("b", 4)
    names = [f"pattern {i:03d}-0.mp4" for i in range(4)]
    (videos / names[0]).write_bytes(b"")
    (reference / names[1]).unlink()
    write_video(videos / names[2], read_video(reference / names[2]).frames[:-1], 8)
    with pytest.raises(ScoringError, match="3 of 4 videos failed") as caught:
        score(videos, reference, PIXELS, tmp_path / "out")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert caught.value.results == results
    assert len(results["failed"]) == 3
    reasons = {row["file_name"]: row["error"] for row in results["failed"]}
    assert sorted(reasons) == names[:3]
    assert "got an empty file" in reasons[names[0]]
    assert "got nothing there" in reasons[names[1]]
    assert (
        "expected its reference's 5 frames of 48 x 64 at 8 a second, got 4 frames"
        in reasons[names[2]]
    )
    scored = {row["file_name"]: sorted(row["scores"]) for row in results["videos"]}
    assert scored[names[2]] == ["temporal_flickering"]
    assert scored[names[3]] == sorted(PIXELS)
    assert score(videos, reference, PIXELS, tmp_path / "out", allow_failures=True) == results


def test_what_is_no_file_is_listed_and_waited_for_by_none(make_folder, tmp_path):
    videos = make_folder("a", 1)
    (videos / "manifest.jsonl").unlink()
    os.mkfifo(videos / "pipe-0.mp4")
    (videos / "loop-0.mp4").symlink_to("loop-0.mp4")
    (videos / "gone-0.mp4").symlink_to("nowhere.mp4")
    results = score(videos, None, ["temporal_flickering"], tmp_path / "out", allow_failures=True)
    reasons = {row["file_name"]: row["error"].rpartition("got ")[2] for row in results["failed"]}
    assert reasons == {
        "pipe-0.mp4": "a pipe",
        "loop-0.mp4": "Too many levels of symbolic links",
        "gone-0.mp4": "nothing there",
    }
    assert results["metrics"]["temporal_flickering"]["num_videos"] == 1


def test_a_worker_keeps_its_metrics_for_the_next_video(make_folder, tmp_path, monkeypatch):
    folder = make_folder("a", 2)
    task = {
        "reference": None,
        "pair": None,
        "prompt": "",
        "metrics": CHEAP[:1],
        "reference_metrics": [],
    }
    loaded = []
    original = metrics.load
    monkeypatch.setattr(
        metrics, "load", lambda name, *rest: loaded.append(rest) or original(name, *rest)
    )
    for limit in (1, 1, 2):  # a run with other settings has a Worker of its own
        settings = {CHEAP[0]: {"files": {"none": tmp_path / str(limit)}}}
        for name in ("pattern 000-0.mp4", "pattern 001-0.mp4"):
            outcome = score_video(
                {**task, "video": str(folder / name)},
                settings=settings,
                device="cpu",
                decoder="pyav",
            )
            assert list(outcome["results"]) == CHEAP[:1]
    assert loaded == [({"files": {"none": tmp_path / str(limit)}}, "cpu") for limit in (1, 2)]


def test_metrics_without_their_weights_are_listed_and_not_zero(make_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("SLA2_WEIGHTS", str(tmp_path / "none"))
    videos = make_folder("a", 1)
    results = score(videos, videos, ["temporal_flickering", "lpips", "fvd"], tmp_path / "out")
    assert results["unavailable"] == {
        "fvd": "unavailable: run sla2 weights fetch i3d",
        "lpips": "unavailable: run sla2 weights fetch alexnet",
    }
    assert list(results["metrics"]) == ["temporal_flickering"]


def test_a_video_is_decoded_once_for_all_its_metrics(make_folder, monkeypatch):
    from sla2_eval.videos import video

    folders, decoded = [make_folder("a", 1, noise=5.0), make_folder("b", 1)], []

    def counting(path, decoder):
        decoded.append((path, decoder))
        return read_video(path, decoder)

    monkeypatch.setattr(video, "read_video", counting)
    paths = [str(folder / "pattern 000-0.mp4") for folder in folders]
    task = {
        "video": paths[0],
        "reference": paths[1],
        "pair": paths,
        "prompt": "x",
        "metrics": CHEAP,
        "reference_metrics": CHEAP,
    }
    outcome = Worker({}, "cpu", "pyav").run(task)
    assert decoded == [(path, "pyav") for path in paths]
    assert outcome["results"].keys() == outcome["reference_results"].keys() == set(CHEAP)
    assert outcome["errors"] == outcome["reference_errors"] == outcome["unavailable"] == {}


def test_progress_counts_every_metric_to_the_end(make_folder, tmp_path):
    videos = make_folder("a", 3)
    calls = []
    score(videos, videos, CHEAP, tmp_path / "out", progress=lambda *call: calls.append(call))
    for name in CHEAP:
        done = [call[1:] for call in calls if call[0] == name]
        assert done == [(0, 3), (1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metrics": ["sharpness"]}, "metrics: expected names among psnr"),
        ({"metrics": []}, "metrics: expected at least one name"),
        ({"metrics": ["psnr", "psnr"]}, "each name once"),
        (
            {"metrics": ["psnr"], "reference": None},
            "reference: expected a folder for psnr, got none",
        ),
        ({"num_workers": 0}, "num_workers: expected a whole number of at least 1, got 0"),
        ({"device": "tpu"}, "device: expected"),
        ({"ray_address": "nowhere"}, "ray_address: expected 'auto', host:port"),
        ({"ray_address": "127.0.0.1:1"}, "ray_address: expected a Ray cluster at 127"),
        ({"settings": {"lpips": {}}}, "settings: expected names among psnr"),
        (
            {"settings": {"psnr": {"limt": 3}}},
            "settings: expected data_range, limit, files or digests for psnr, got 'limt'",
        ),
    ],
)
def test_bad_arguments_are_named_and_leave_nothing(make_folder, tmp_path, arguments, message):
    videos = make_folder("a", 1)
    with pytest.raises(ValueError, match=message):
        score(
            **{"videos": videos, "reference": videos, "metrics": PIXELS, "out": tmp_path / "out"}
            | arguments
        )
    assert not (tmp_path / "out").exists()


def test_modules_of_metrics_are_registered_once_and_bad_ones_are_named(tmp_path, monkeypatch):
    load = "def load(name, settings, device):\n    return lambda sample: 1.0\n"
    toy_metric.register(tmp_path / "hook", load, monkeypatch)
    assert list(metrics.select(["psnr", toy_metric.NAME])) == ["psnr", "toy"]
    assert list(metrics.select(["toy"])) == ["toy"]  # known from now on
    metrics.register("toy_metrics")
    assert metrics.registered() == ("toy_metrics",)
    with pytest.raises(ValueError, match="metrics: expected a module with SPECS, got 'nowhere'"):
        metrics.register("nowhere")
    with pytest.raises(ValueError, match="metrics: expected a module with SPECS, got 'json'"):
        metrics.select(["json:psnr"])
    (tmp_path / "hook" / "again.py").write_text(toy_metric.SPECS)
    with pytest.raises(ValueError, match="metrics: expected new names in again, got 'toy'"):
        metrics.register("again")


def test_two_files_are_a_pair_whatever_they_are_called(make_folder, tmp_path):
    videos, reference = make_folder("a", 2, noise=9.0), make_folder("b", 2)
    whole = score(videos, reference, CHEAP[:1], tmp_path / "whole")
    one = score(
        videos / "pattern 001-0.mp4",
        (reference / "pattern 001-0.mp4").rename(tmp_path / "another.mp4"),
        CHEAP[:1],
        tmp_path / "one",
    )
    assert one["videos"][0]["scores"] == whole["videos"][1]["scores"]
    assert one["metrics"][CHEAP[0]]["difference"]["n"] == 1


@pytest.mark.parametrize(
    ("arguments", "gpus", "expected"),
    [
        (("auto", None, None), 0, (ProcessPool, {})),
        (("auto", None, None), 1, (ProcessPool, {})),
        (("auto", None, None), 3, (RayPool, {"workers": None, "gpus": 3})),
        (("cpu", None, None), 3, (ProcessPool, {})),
        (("auto", 2, None), 3, (RayPool, {"workers": 2, "gpus": None})),
        (("auto", 1, None), 3, (ProcessPool, {})),
        (("auto", None, "auto"), 0, (RayPool, {"workers": None, "gpus": None})),
        (("cpu", None, "auto"), 0, (RayPool, {"workers": None, "gpus": 0})),
    ],
)
def test_all_gpus_of_a_machine_or_cluster_score_by_default(monkeypatch, arguments, gpus, expected):
    from sla2_eval.scoring import score as scoring

    monkeypatch.setattr(scoring, "local_gpus", lambda: gpus)
    found = scoring._open_pool(*arguments)
    kind, asked = expected
    assert type(found) is kind
    if kind is RayPool:
        assert {"workers": found._asked, "gpus": found._asked_gpus} == asked
