"""The settings of Wan2.1: valid, the paper's, and checked before anything is done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from sla2_eval.cli.main import main
from sla2_eval.grid.estimate import estimate
from sla2_eval.grid.settings import TrainSettings
from sla2_eval.runs.settings import load_settings, validate

ROOT = Path(__file__).parents[2] / "experiments"


@pytest.mark.parametrize(
    ("name", "heads", "batch", "shift", "size"),
    [
        ("wan2.1_1.3b", 12, 64, 3.0, (81, 480, 832)),
        ("wan2.1_14b", 40, 15, 5.0, (81, 720, 1280)),
    ],
)
def test_settings_are_valid_and_the_papers(name, heads, batch, shift, size):
    settings = load_settings(ROOT / name / "train.yaml", TrainSettings)
    config, stage2 = settings.attention.config(head_dim=128, num_heads=heads), settings.stage2
    assert (config.block_q, config.block_k, config.tau, config.topk) == (128, 64, 0.1, 0.03)
    assert config.precision == "int8"
    assert (stage2.steps, stage2.batch_size) == (500, batch)
    assert stage2.batch_size % stage2.accumulate == 0
    assert settings.is_given("stage2.shift")
    assert stage2.shift == shift
    assert settings.stage1.topk == (0.05, 0.04, 0.03)
    assert settings.stage1.steps == 500
    assert settings.capture.samples == 64
    assert settings.video is not None
    assert tuple(settings.video.model_dump().values()) == size


@pytest.mark.parametrize("path", sorted(ROOT.glob("wan2.*/*.yaml")), ids=lambda p: p.parent.name)
def test_every_settings_file_of_wan_is_valid(path):
    settings = load_settings(path, TrainSettings)
    assert settings.stage2.batch_size % settings.stage2.accumulate == 0
    assert settings.stage2.learning_rate == (1e-4 if settings.stage2.lora_rank else 1e-5)
    assert settings.expert == (path.stem if path.stem in ("high", "low") else None)
    assert f"{settings.video.height} x {settings.video.width}" in path.read_text().splitlines()[0]


@pytest.mark.parametrize(
    ("file", "gpus", "changes"),
    [
        ("wan2.1_1.3b/train.yaml", 1, {}),
        ("wan2.1_1.3b/train.yaml", 8, {"accumulate": 8}),
        ("wan2.1_14b/train_480p.yaml", 1, {}),
        ("wan2.1_14b/train_480p.yaml", 8, {"accumulate": 8}),
        ("wan2.1_14b/train_480p.yaml", 8, {"accumulate": 8, "lora_rank": None}),
        ("wan2.1_14b/train.yaml", 1, {}),
        ("wan2.1_14b/train.yaml", 5, {"accumulate": 3, "lora_rank": None}),
        ("wan2.2_a14b/high.yaml", 1, {}),
        ("wan2.2_a14b/high.yaml", 8, {"accumulate": 2}),
    ],
    ids=str,
)
def test_the_recipes_table_of_memory_and_time_is_what_the_dry_run_says(
    file, gpus, changes, tmp_path
):
    """Of a folder with the model's configuration alone, its sizes as published."""
    content = yaml.safe_load((ROOT / file).read_text())
    heads, ffn, layers = (12, 8960, 30) if "1.3b" in file else (40, 13824, 40)
    config = {
        "_class_name": "WanTransformer3DModel",
        "num_attention_heads": heads,
        "ffn_dim": ffn,
        "num_layers": layers,
        "in_channels": 36 if "a14b" in file else 16,
    }
    for part in ("transformer", "transformer_2"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(config))
    (tmp_path / "model_index.json").write_text("{}")
    content |= {"model": str(tmp_path), "stage2": content["stage2"] | changes}
    found = estimate(validate(content, TrainSettings, file), gpus=gpus)
    memory, hours = f"{found.memory_bytes / 1e9:.3g} GB", f"{found.stage2_hours:.3g} h"
    table = (ROOT.parent / "docs" / "training.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("|") and " GB |" in line]
    assert any(f"| {gpus} |" in row and f"| {memory} | {hours}" in row for row in rows)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("1.0e-5", "ten", "stage2.learning_rate: input should be a valid number"),
        ("1.0e-5", "-1.0", "stage2.learning_rate: expected a number >= 0, got -1.0"),
        ("tau", "taus", "attention.taus: unknown key; known keys here: variant, topk,"),
        ("samples: 64", "samples: 0", "capture.samples: expected an integer >= 1, got 0"),
        ("video:", "videos:", "videos: unknown key; known keys here: imports, model, video,"),
        ("num_frames: 81, ", "", "video.num_frames: expected a value, got none"),
        ("[0.05", "[5", "stage1.topk: expected fractions in (0, 1]"),
        ("model:", "{", "expected YAML, got"),
    ],
)
def test_settings_are_checked_before_anything_is_done(tmp_path, capsys, old, new, message):
    text = (ROOT / "wan2.1_1.3b" / "train.yaml").read_text()
    config, out = tmp_path / "train.yaml", tmp_path / "out"
    config.write_text(text.replace(old, new))
    arguments = ["train", "finetune", "--config", str(config), "--videos", "v", "--out", str(out)]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"sla2: error: {config}")
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_a_number_that_yaml_takes_for_text_is_read(tmp_path):
    text = (ROOT / "wan2.1_1.3b" / "train.yaml").read_text()
    (tmp_path / "train.yaml").write_text(text.replace("1.0e-5", "1e-5"))
    settings = load_settings(tmp_path / "train.yaml", TrainSettings)
    assert settings.stage2.learning_rate == 1e-5


def test_a_settings_file_that_is_a_folder_is_one_line(tmp_path, capsys):
    assert main(["train", "router", "--config", str(tmp_path), "--out", "o"]) == 2
    error = capsys.readouterr().err
    assert f"error: {tmp_path}: expected a YAML file, got" in error
    assert error.count("\n") == 1
