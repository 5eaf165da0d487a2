"""sla2 train: both stages on the tiny model and on a pipeline, run again, and refused with other
settings instead of ignoring them.
"""

import json
import os
import subprocess
import sys

import pytest
import yaml
from helpers import models
from sla2_core.integrations.loading import apply_adapter
from sla2_eval.cli.main import main
from sla2_eval.tiny.teacher import TeacherConfig, train_teacher

SETTINGS = {
    "model": "tiny",
    "attention": {"topk": 0.03, "block_q": 32, "block_k": 16, "precision": "int8"},
    "data": {"num_videos": 3, "seed": 1},
    "capture": {"samples": 1},
    "stage1": {"steps": 1, "topk": [0.03]},
    "stage2": {"steps": 1, "batch_size": 1},
}


def train(part, out, **changes) -> int:
    config = out.parent / "train.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                k: {**v, **changes.get(k, {})} if isinstance(v, dict) else v
                for k, v in SETTINGS.items()
            }
        )
    )
    return main(["train", part, "--config", str(config), "--out", str(out)])


def adapter_of(out) -> dict:
    return json.loads((out / "stage1" / "adapter" / "sla2_config.json").read_text())["sla2"]


def test_a_finished_folder_is_kept_and_takes_no_other_settings(tmp_path, capsys):
    out = tmp_path / "run"
    assert train("finetune", out) == 0
    assert adapter_of(out)["precision"] == "int8"
    weights = out / "stage2" / "adapter" / "sla2_adapter.safetensors"
    written = weights.stat().st_mtime_ns
    assert train("finetune", out) == 0
    assert weights.stat().st_mtime_ns == written
    capsys.readouterr()
    for part, changes, message in (
        ("finetune", {"data": {"num_videos": 4}}, "but data.num_videos was"),
        ("router", {"data": {"seed": 2}}, "but data.seed was"),
        ("router", {"capture": {"samples": 2}}, "but capture.samples was"),
        ("finetune", {"stage2": {"steps": 2}}, "but stage2.steps was"),
        ("finetune", {"attention": {"precision": "full"}}, "but attention.precision was"),
    ):
        assert train(part, out, **changes) == 2, changes
        error = capsys.readouterr().err
        assert f"{out}" in error.splitlines()[-1]
        assert message in error.splitlines()[-1]
    assert (
        train("router", out, attention={"topk": 0.06}) == 0
    )  # what stage 1 learns does not depend on it
    assert adapter_of(out)["topk"] == 0.06


def test_data_that_could_not_be_read_leaves_the_folder_free(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert train("router", tmp_path / "run", data={"videos": "empty"}) == 2
    assert "expected mp4 files with captions, got none" in capsys.readouterr().err
    assert train("router", tmp_path / "run", data={"videos": "missing"}) == 2
    assert (
        "missing: expected a folder of mp4 files with captions, got nothing there"
        in capsys.readouterr().err
    )


def test_a_teacher_goes_on_with_its_own_settings_only(tmp_path):
    values = {
        "num_videos": 2,
        "steps": 2,
        "cooldown": 2,
        "warmup": 1,
        "batch_size": 1,
        "dtype": "float32",
    }
    train_teacher(TeacherConfig(**values), tmp_path)
    captions = (tmp_path / "data" / "metadata.jsonl").read_text()
    for changes in ({"seed": 4}, {"steps": 3}, {"num_videos": 3}):
        name, value = next(iter(changes.items()))
        with pytest.raises(ValueError, match=rf"but {name} was \d+ and is {value}"):
            train_teacher(TeacherConfig(**values | changes), tmp_path)
    assert (tmp_path / "data" / "metadata.jsonl").read_text() == captions
    train_teacher(TeacherConfig(**values, checkpoint_every=1), tmp_path)


@pytest.fixture
def wan(wan_training, tmp_path):
    """wan(part, *arguments, out="run", **changes) runs sla2 train on a random Wan pipeline."""

    def run(part: str, *arguments: str, out: str = "run", **changes: dict) -> int:
        values = {k: {**wan_training[k], **v} for k, v in changes.items()}
        config = tmp_path / "train.yaml"
        config.write_text(yaml.safe_dump({**wan_training, "data": {}, **values}))
        return main(
            ["train", part, "--config", str(config), "--out", str(tmp_path / out), *arguments]
        )

    return run


def test_every_part_runs_on_a_pipeline(wan, wan_folder, tmp_path, capsys, monkeypatch):
    videos = ("--videos", str(wan_folder / "videos"))
    distill = {"stage2": {"loss": "distill"}}
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert wan("finetune", *videos, **distill) == 2
    error = capsys.readouterr().err
    assert "--out: expected a finished stage 1 in" in error
    assert error.count("\n") == 1
    monkeypatch.delenv("WORLD_SIZE")
    assert wan("router", "--json", *videos, **distill) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["layer"], row["topk"]) for row in rows] == [(0, 0.5), (1, 0.5)]
    out = tmp_path / "run"
    assert adapter_of(out)["precision"] == "int8"
    assert not (out / "stage2").exists()
    written = (out / "stage1" / "stage1.safetensors").stat().st_mtime_ns
    assert wan("finetune", *videos, **distill) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{out}/stage2/adapter"
    assert (out / "stage1" / "stage1.safetensors").stat().st_mtime_ns == written
    assert apply_adapter(models.wan(in_channels=16, out_channels=16), out / "stage2" / "adapter")
    for changes, message in (
        ({"video": {"height": 64}}, "but video.height was"),
        ({"capture": {"samples": 3}}, "but capture.samples was"),
        ({"stage1": {"steps": 3}}, "stage1/stage1.json: expected steps=3 as given, got 2"),
        ({"stage2": {"loss": "diffusion"}}, "but stage2.loss was"),
        ({"stage2": {"loss": "distill", "shift": 5.0}}, "but shift was"),
    ):
        assert wan("finetune", *videos, **{**distill, **changes}) == 2
        error = capsys.readouterr().err
        assert message in error.splitlines()[-1]
    assert wan("finetune", out="other", **distill) == 2
    error = capsys.readouterr().err
    assert "data.videos: expected a folder of captioned mp4 files" in error
    assert "--videos DIR" in error


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_processes_finish_what_one_began(wan, wan_folder, tmp_path):
    videos = ("--videos", str(wan_folder / "videos"))
    assert wan("router", *videos) == 0
    out = tmp_path / "run"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command += ["--main_process_port", "0", "--mixed_precision", "no", "-m", "sla2_eval.cli.main"]
    command += ["train", "finetune", "--config", str(tmp_path / "train.yaml"), "--out", str(out)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *videos], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{out}/stage2/adapter"]
    assert (out / "stage2" / "adapter" / "sla2_config.json").is_file()
