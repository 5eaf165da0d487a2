"""The grid of variants: what shares a training, what the run leaves behind, and a quickstart killed
half-way.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from helpers import tiny_model
from sla2_core.adapter import load_adapter
from sla2_eval.cli.main import main
from sla2_eval.generation.sampling import load_generator, open_folder
from sla2_eval.grid.ablation import cells, graph, run_grid, sampling, task_tune
from sla2_eval.grid.settings import AblationSettings, Attention
from sla2_eval.grid.steps import apply
from sla2_eval.parallel.processes import ThisProcess
from sla2_eval.parallel.tasks import WorkerDied
from sla2_eval.runs.settings import SettingsError, load_settings, validate
from sla2_eval.videos.manifest import video_name

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder of a tiny model with random weights."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model.save(folder)
    return folder


@pytest.fixture
def grid(model, small_grid):
    """grid(**changes) gives the settings of a small grid of the random model."""

    def make(**changes) -> AblationSettings:
        return validate(
            {**small_grid, "model": str(model), "workers": 0, **changes}, AblationSettings, "test"
        )

    return make


def variant(name: str, train_precision: str | None = None, **attention) -> dict:
    return {
        "name": name,
        "label": name,
        "family": name,
        "attention": attention,
        "train_precision": train_precision,
    }


def test_variants_share_what_they_train_alike(grid):
    found = {
        cell.name: cell
        for cell in cells(
            grid(
                seeds=[0, 1],
                variants=[
                    variant("full"[::-1], topk=0.1),
                    variant("qat", topk=0.1, precision="int8"),
                    variant("no-qat", "full", topk=0.1, precision="int8"),
                    variant("wide", topk=0.2),
                    variant("place", topk=0.1, alpha="position"),
                    variant("sla", topk=0.1, variant="sla"),
                ],
            )
        )
    }
    base = found["lluf-s0"]
    assert len(found) == 12
    assert [cell.seed for cell in found.values()] == [0] * 6 + [1] * 6
    assert found["no-qat-s0"].tuned == base.tuned  # trained in full precision, run in low bit
    assert found["no-qat-s0"].attention.config().precision == "int8"
    assert found["no-qat-s0"].trained.config().precision == "full"
    assert found["qat-s0"].tuned != base.tuned
    assert {found[f"{name}-s0"].router for name in ("qat", "no-qat", "wide")} == {base.router}
    assert found["place-s0"].router != base.router
    assert found["sla-s0"].router is None
    assert base.router.removesuffix("-s0") == found["lluf-s1"].router.removesuffix("-s1")
    assert base.router != found["lluf-s1"].router


def test_the_graph_has_each_training_once(grid, tmp_path):
    settings = grid(
        variants=[variant("a", topk=0.1), variant("b", "full", topk=0.1, precision="int8")]
    )
    tasks = graph(settings, tmp_path)
    assert sum(name.startswith("stage1") for name in tasks) == 1
    assert sum(name.startswith("stage2") for name in tasks) == 1
    assert list(tasks).index("scores a") < list(tasks).index("videos of b (1 of 2)")
    halves = ("(1 of 2)", "(2 of 2)")
    wanted = [f"videos of a {half}" for half in halves]
    wanted += [f"videos of full {half}, seed 0" for half in halves]
    assert sorted(tasks["scores a"].needs) == wanted
    assert all(need in tasks for task in tasks.values() for need in task.needs)


def test_a_seed_is_whole_before_the_next_one_begins(grid, tmp_path):
    shown = {**variant("b", topk=0.2), "finetune": False}
    tasks = graph(grid(seeds=[3, 1], variants=[variant("a", topk=0.1), shown]), tmp_path)
    names = list(tasks)
    assert names.index("scores b-s3") < names.index("videos of full (1 of 2), seed 1")
    assert names.index("scores a-s3") < names.index("videos of b-s3 (1 of 2)")
    assert not any("seed 1" in need for need in tasks["scores a-s3"].needs)
    assert sum("seed" in need for need in tasks["scores full"].needs) == 4


def test_a_variant_with_an_adapter_is_that_one_and_trains_nothing(grid, model, tmp_path):
    generator = load_generator(str(model))
    handle = apply(
        generator.transformer, Attention({"topk": 0.2, "block_q": 16, "block_k": 8, "alpha": "one"})
    )
    handle.save(tmp_path / "adapter", include_model=True)
    given = {**variant("shipped", precision="int8"), "adapter": str(tmp_path / "adapter")}
    settings = grid(variants=[given, variant("live", topk=0.1)])
    cell = next(cell for cell in cells(settings) if cell.name == "shipped")
    config = cell.attention.config()
    assert (config.topk, config.block_q, config.alpha, config.precision) == (0.2, 16, "one", "int8")
    assert cell.router is None
    assert cell.tuned is None
    assert graph(settings, tmp_path)["videos of shipped (1 of 2)"].needs == ()
    given["attention"] = {"block_q": 32}
    with pytest.raises(ValueError, match="block_q: expected a field that may change"):
        cells(grid(variants=[given]))


def test_a_variant_with_a_start_is_trained_on_from_it(grid, model, tmp_path):
    every = {"topk": 1.0, "block_q": 16, "block_k": 8, "alpha": "mass"}
    generator = load_generator(str(model))
    handle = apply(generator.transformer, Attention(every))
    with torch.no_grad():
        for weight in handle.model_tensors().values():
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    started = {name: weight.clone() for name, weight in handle.model_tensors().items()}
    handle.save(tmp_path / "start", include_model=True)
    still = {"steps": 1, "loss": "distill", "learning_rate": 0.0, "alpha_learning_rate": 1e-9}
    given = {**variant("on", **every), "start": str(tmp_path / "start"), "stage2": still}
    settings = grid(variants=[given, {**given, "name": "fresh", "start": None}], keep_targets=True)
    on, fresh = cells(settings)
    assert on.router is None
    assert on.tuned != fresh.tuned
    assert "stage1" not in str(graph(settings, tmp_path)[on.tuned].needs)

    found = task_tune(settings, on, tmp_path / "work")
    trained = load_adapter(tmp_path / "work" / on.tuned / "adapter").tensors
    for name, weight in started.items():
        assert torch.equal(trained[name], weight), name
    # With every block selected the student is full attention. Its loss is above zero because the
    # teacher is the model without the start's weights.
    assert found["loss"][0] > 1e-3


@pytest.mark.parametrize("other", [{"adapter": "there"}, {"finetune": False}])
def test_a_start_of_what_is_not_trained_is_refused(grid, other):
    with pytest.raises(SettingsError, match="start: expected a variant that is trained, got "):
        grid(variants=[{**variant("a", topk=0.1), "start": "there", **other}])


def test_a_repeated_variant_is_refused(grid):
    with pytest.raises(SettingsError, match=r"each name once .* got 'a'"):
        cells(grid(variants=[variant("a", topk=0.1), variant("a", topk=0.1)]))


@pytest.mark.parametrize("seeds", [[], [0, 0], [1, -1]])
def test_seeds_that_are_no_different_numbers_are_refused(grid, seeds):
    with pytest.raises(
        SettingsError, match=r"seeds: expected different integers >= 0, at least one, got \["
    ):
        cells(grid(seeds=seeds))


def test_videos_of_another_training_are_noticed_before_any_work(grid, tmp_path):
    cell = cells(grid())[0]
    folder = tmp_path / "videos" / cell.name
    before = {"attention": cell.attention.fields(), "trained": cell.tuned}
    open_folder(folder, sampling(grid()), before)
    (folder / video_name("a red circle", 0)).touch()
    with pytest.raises(ValueError, match=f"{cell.name}: expected a new folder .* but trained was"):
        run_grid(grid(stage2={"steps": 7}), tmp_path)
    assert not (tmp_path / "work").exists()


def test_the_experiments_settings_are_valid():
    found = load_settings(ROOT / "experiments" / "tiny_wan" / "ablation.yaml", AblationSettings)
    assert {variant.attention["topk"] for variant in found.variants} >= {0.15, 0.10, 0.05, 0.03}
    assert len(found.seeds) >= 3
    assert found.generate.prompts == ROOT / "experiments" / "tiny_wan" / "prompts.txt"


class Deadly(ThisProcess):
    """One process in which the worker of the first videos of b always dies."""

    def submit(self, name, task):
        super().submit(name, task)
        self.at = name

    def wait(self):
        if self.at == "videos of b (1 of 2)":
            self._submitted.clear()
            return self.at, WorkerDied("signal SIGKILL")
        return super().wait()


def test_a_variant_whose_worker_dies_is_listed_and_the_others_are_done(
    model, small_grid, tmp_path, monkeypatch, capsys
):
    untrained = {"topk": 0.1, "router": "heuristic", "alpha": "one"}
    variants = [
        {**row, "attention": untrained, "finetune": False} for row in small_grid["variants"]
    ]
    settings = {
        **small_grid,
        "model": str(model),
        "metrics": ["temporal_flickering"],
        "variants": variants,
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(settings))
    said = []
    monkeypatch.setattr(
        "sla2_eval.grid.ablation.open_pool", lambda *_, **__: Deadly(say=said.append)
    )
    out = tmp_path / "out"
    assert main(["ablate", "--config", str(tmp_path / "grid.yaml"), "--out", str(out)]) == 1
    errors = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("sla2: error: ")
    ]
    task = "videos of b (1 of 2)"
    assert errors == [
        f"sla2: error: {task}: its worker died 2 times (signal SIGKILL); run again to go on",
        f"sla2: error: scores b: needs {task}, whose worker died; run again to go on",
    ]
    assert said[0] == f"{task}: its worker died (signal SIGKILL); trying it once more"
    report = json.loads((out / "report" / "results.json").read_text())
    assert report["not_scored"] == ["b"]
    assert list(report["lost"]) == [task, "scores b"]
    groups = {group["label"]: group["metrics"] for group in report["groups"]}
    assert groups["A"]["temporal_flickering"]["n"] == 2
    assert groups["B"] == {}
    monkeypatch.undo()
    assert (
        main(
            ["ablate", "--config", str(tmp_path / "grid.yaml"), "--out", str(out), "--workers", "0"]
        )
        == 0
    )
    assert json.loads((out / "report" / "results.json").read_text())["lost"] == {}


def _ablate(folder: Path, out: Path) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "sla2_eval.cli.main",
        "ablate",
        "--config",
        "grid.yaml",
        "--out",
        str(out),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_killed_half_way_it_goes_on(model, small_grid, tmp_path):
    settings = {**small_grid, "model": str(model), "workers": 1}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(settings))
    out = tmp_path / "out"
    first = _ablate(tmp_path, out)
    deadline = time.monotonic() + 600
    while not list(out.glob("work/stage2/*/checkpoint*")) and time.monotonic() < deadline:
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    time.sleep(2)  # its workers end with it
    done = [
        p
        for p in out.rglob("*")
        if p.is_file() and p.suffix in (".mp4", ".safetensors") and "stage2" not in p.parts
    ]
    before = {path: path.stat().st_mtime_ns for path in done}
    assert any(path.parent.name == "full" for path in before)
    assert not (out / "report").exists()
    second = _ablate(tmp_path, out)
    stdout, stderr = second.communicate(timeout=800)
    assert second.returncode == 0, stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "psnr" in stdout.splitlines()[0]
    assert (out / "report" / "index.html").is_file()
    results = json.loads((out / "scores" / "a" / "results.json").read_text())
    assert results["metrics"]["psnr"]["num_videos"] == 2
    maps = json.loads((out / "block_maps" / "a.json").read_text())
    assert maps["grid"] == [16, 8, 8]
    assert len(maps["layers"]) == 16
    assert {len(row) for row in maps["layers"][0]["map"]} == {6}  # round(0.1 * 64)
    assert (out / "videos" / "a" / maps["frame_of"]).is_file()
    assert not [
        path for path in out.rglob("*") if "partial" in path.name and "stage" not in str(path)
    ]
    third = _ablate(tmp_path, out)
    _, stderr = third.communicate(timeout=800)
    assert third.returncode == 0
    said = [f"scores of {name}: 1 of 1" for name in ("full", "a", "b")]
    assert sorted(stderr.splitlines()) == sorted(said)  # nothing was trained or generated
