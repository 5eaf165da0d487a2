"""sla2 train: both stages on the tiny model, run again, and refused with other settings instead of
ignoring them.
"""

import json

import pytest
import yaml
from sla2_eval.cli.main import main
from sla2_eval.tiny.teacher import TeacherConfig, train_teacher

SETTINGS = {
    "model": "tiny",
    "attention": {"topk": 0.03, "precision": "int8"},
    "data": {"num_videos": 3, "seed": 1},
    "capture": {"samples": 1},
    "stage1": {"steps": 1, "topk": [0.03]},
    "stage2": {"steps": 1, "batch_size": 1, "dtype": "float32"},
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
        ("finetune", {"data": {"num_videos": 4}}, "but data was"),
        ("router", {"data": {"seed": 2}}, "but data was"),
        ("router", {"capture": {"samples": 2}}, "but capture was"),
        ("finetune", {"stage2": {"steps": 2}}, "but stage2 was"),
        ("finetune", {"attention": {"precision": "full"}}, "but attention was"),
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
