"""experiments/train_wan.py on a tiny random Wan: all parts run, and its settings files
are valid.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import yaml
from helpers import tiny_wan
from sla2_core.integrations.loading import apply_adapter
from sla2_core.training.cache import encode_samples

ROOT = Path(__file__).parents[2] / "experiments"
_SPEC = importlib.util.spec_from_file_location("train_wan", ROOT / "train_wan.py")
train_wan = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(train_wan)


@pytest.mark.parametrize(("name", "batch"), [("wan2.1_1.3b", 64), ("wan2.1_14b", 15)])
def test_settings_are_valid_and_the_papers(name, batch):
    settings = train_wan.read_settings(ROOT / name / "train.yaml")
    attention, stage2 = settings.attention, settings.stage2
    assert (attention.block_q, attention.block_k, attention.tau, attention.topk) == (
        128,
        64,
        0.1,
        0.03,
    )
    assert (stage2.steps, stage2.batch_size) == (500, batch)
    assert stage2.batch_size % stage2.accumulate == 0
    assert settings.stage1.topk == [0.05, 0.04, 0.03]


def test_every_part_runs_on_a_tiny_wan(tmp_path, capsys, monkeypatch):
    model = tiny_wan.model()
    model.save_pretrained(tmp_path / "model" / "transformer")
    encode_samples(
        ["a", "b"],
        lambda i: {"latents": torch.randn(4, 3, 6, 10), "encoder_hidden_states": torch.randn(5, 8)},
        tmp_path / "out" / "data",
        settings={"model": str(tmp_path / "model"), "num_frames": 9, "height": 48, "width": 80},
    )
    config = {
        "model": str(tmp_path / "model"),
        "video": {"num_frames": 9, "height": 48, "width": 80},
        "attention": {
            "head_dim": 12,
            "num_heads": 2,
            "topk": 0.3,
            "block_q": 8,
            "block_k": 5,
            "alpha_knots": 3,
            "precision": "int8",
        },
        "capture": {"samples": 2, "layers_per_sample": 2, "heads": 1, "dtype": "bfloat16"},
        "stage1": {"topk": [0.3, 0.5], "steps": 2},
        "stage2": {
            "steps": 2,
            "batch_size": 4,
            "accumulate": 2,
            "loss": "distill",
            "gradient_checkpointing": True,
        },
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(config))
    arguments = ["--config", str(tmp_path / "train.yaml"), "--out", str(tmp_path / "out")]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train_wan.main(arguments) == 1
    assert "expected a finished stage 1 in" in capsys.readouterr().err
    monkeypatch.delenv("WORLD_SIZE")
    assert train_wan.main([*arguments, "--until", "stage1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "out" / "stage1" / "adapter")
    assert not (tmp_path / "out" / "stage2").exists()
    assert train_wan.main(arguments) == 0
    adapter = capsys.readouterr().out.splitlines()[-1]
    handle = apply_adapter(tiny_wan.model(seed=1), adapter)
    assert handle.config.precision == "int8"
    assert train_wan.main([*arguments[:2], "--out", str(tmp_path / "other")]) == 1
    assert "--videos: expected a folder of captioned mp4 files" in capsys.readouterr().err
    for section, changes, message in (
        ("video", {"height": 64}, "data/cache.json: expected height=64 as given, got 48"),
        ("stage1", {"steps": 3}, "stage1/stage1.json: expected steps=3 as given, got 2"),
        ("stage2", {"steps": 3}, "stage2/stage2.json: expected steps=3 as given, got 2"),
    ):
        (tmp_path / "train.yaml").write_text(
            yaml.safe_dump(config | {section: config[section] | changes})
        )
        assert train_wan.main(arguments) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("1.0e-5", "1e-5", "stage2: learning_rate: expected a number >= 0, got '1e-5'"),
        (
            "tau",
            "taus",
            "attention: SLA2Config.__init__() got an unexpected keyword argument 'taus'",
        ),
        ("samples: 64, ", "", "capture: "),
        ("samples: 64", "samples: 0", "capture: samples: expected an integer >= 1, got 0"),
        ("video:", "videos:", "expected the sections model, video, attention"),
        ("[0.05", "[5", "stage1: topk: expected fractions in (0, 1]"),
        ("model:", "{", "expected a YAML file, got"),
    ],
)
def test_settings_are_checked_before_anything_is_done(tmp_path, capsys, old, new, message):
    text = (ROOT / "wan2.1_1.3b" / "train.yaml").read_text()
    (tmp_path / "train.yaml").write_text(text.replace(old, new))
    out = tmp_path / "out"
    assert (
        train_wan.main(
            ["--config", str(tmp_path / "train.yaml"), "--videos", "v", "--out", str(out)]
        )
        == 1
    )
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'train.yaml'}: ")
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_a_settings_file_that_is_a_folder_is_one_line(tmp_path, capsys):
    assert train_wan.main(["--config", str(tmp_path), "--out", "o"]) == 1
    error = capsys.readouterr().err
    assert f"error: {tmp_path}: expected a YAML file, got" in error
    assert error.count("\n") == 1
