"""The dry run: counts of a model that is there as a configuration alone, against counts by hand."""

from __future__ import annotations

import json

import pytest
import yaml
from sla2_eval.cli.main import main
from sla2_eval.grid.estimate import estimate, rows
from sla2_eval.grid.settings import TrainSettings
from sla2_eval.runs.settings import validate

WAN = {
    "_class_name": "WanTransformer3DModel",
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "ffn_dim": 8960,
    "num_layers": 30,
}
TOKENS, DIM, LAYERS = 32_760, 1536, 30


@pytest.fixture
def settings(tmp_path):
    """Settings of Wan2.1 1.3B at 480 x 832 x 81, whose folder holds no weights."""
    (tmp_path / "wan" / "transformer").mkdir(parents=True)
    (tmp_path / "wan" / "model_index.json").write_text("{}")
    (tmp_path / "wan" / "transformer" / "config.json").write_text(json.dumps(WAN))
    return {
        "model": str(tmp_path / "wan"),
        "video": {"num_frames": 81, "height": 480, "width": 832},
        "attention": {"topk": 0.03, "alpha": "position", "alpha_knots": 16},
        "capture": {
            "samples": 64,
            "layers_per_sample": 6,
            "heads": 4,
            "dtype": "bfloat16",
            "max_bytes": 1 << 36,
        },
        "stage2": {
            "steps": 500,
            "batch_size": 64,
            "accumulate": 64,
            "loss": "distill",
            "autocast": "bfloat16",
            "gradient_checkpointing": True,
        },
    }


def of(settings, gpus=1, **stage2):
    stage2 = settings["stage2"] | stage2
    return estimate(validate(settings | {"stage2": stage2}, TrainSettings, "test"), gpus=gpus)


def test_the_5b_model_s_vae_makes_latents_of_a_16th(settings, tmp_path):
    path = tmp_path / "wan" / "transformer" / "config.json"
    path.write_text(json.dumps({**WAN, "in_channels": 48}))
    assert of(settings).tokens == TOKENS // 4


def test_counts_of_wan_1_3b_are_those_by_hand(settings):
    found = of(settings)
    assert found.tokens == TOKENS
    assert found.parameters == pytest.approx(1.42e9, rel=0.01)
    own = LAYERS * 2 * 128 * 128
    assert found.stage1_parameters == own + LAYERS * 12 * 16
    assert found.stage2_parameters == found.parameters + LAYERS * 12 * 16
    attention = LAYERS * 4 * TOKENS**2 * DIM
    linear = 2 * TOKENS * LAYERS * (6 * DIM**2 + 2 * DIM * 8960)
    assert found.dense_flops == pytest.approx(attention + linear)
    assert found.forward_flops == pytest.approx(0.0345 * attention + linear, rel=0.01)
    assert found.stage2_flops == pytest.approx(
        32_000 * (4 * found.forward_flops + found.dense_flops)
    )
    assert found.capture_bytes == 64 * 6 * 3 * TOKENS * 4 * 128 * 2
    states = found.weights_bytes + found.gradients_bytes + found.optimizer_bytes
    assert states == pytest.approx(16 * found.parameters, rel=0.01)
    assert found.teacher_bytes == 4 * found.parameters
    assert found.memory_bytes > states + found.teacher_bytes + LAYERS * TOKENS * DIM * 2


def test_gpus_share_states_and_time_and_lora_trains_less(settings):
    one, eight = of(settings), of(settings, gpus=8, accumulate=8)
    assert eight.optimizer_bytes == one.optimizer_bytes / 8
    assert eight.stage2_hours == pytest.approx(one.stage2_hours / 8)
    assert eight.activations_bytes == one.activations_bytes
    lora = of(settings, lora_rank=64, loss="diffusion")
    pairs = LAYERS * 2 * 4 * 2 * DIM  # self- and cross-attention, four layers, in and out
    assert lora.stage2_parameters == 64 * pairs + LAYERS * 12 * 16
    assert lora.teacher_bytes == 0
    assert lora.stage2_flops < one.stage2_flops
    frozen = of(settings, gradient_checkpointing=False, learning_rate=0)
    assert frozen.stage2_parameters == LAYERS * 12 * 16
    assert frozen.activations_bytes > 5 * one.activations_bytes


def test_a_batch_that_the_gpus_cannot_share_is_told(settings):
    """The settings' accumulate is of one GPU; stage 2 would refuse it on eight."""
    found = of(settings, gpus=8)
    assert (found.accumulate, found.activations_bytes) == (8, of(settings).activations_bytes)
    values = {row["what"]: row["value"] for row in rows(found)}
    assert values["accumulate"] == "8 (set it: 64 x 8 GPUs do not divide the batch)"
    assert {row["what"]: row["value"] for row in rows(of(settings))}["accumulate"] == "64"
    with pytest.raises(
        ValueError, match=r"stage2.batch_size: expected a multiple of 8 GPUs, got 2"
    ):
        of(settings, gpus=8, batch_size=2, accumulate=1)


def test_the_command_prints_it_and_writes_nothing(settings, tmp_path, capsys):
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(settings))
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    command = ["train", "finetune", "--config", str(path), "--dry-run"]
    assert main([*command, "--gpus", "8"]) == 0
    out = capsys.readouterr().out
    assert "memory of a GPU" in out
    assert "time on 8 GPU" in out
    assert "not measured" in out
    assert main([*command, "--json"]) == 0
    (values,) = json.loads(capsys.readouterr().out)
    assert values["stage2_hours"] == pytest.approx(of(settings).stage2_hours)
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before
    assert main(command[:-1]) == 2
    assert "--out: expected a folder, got none" in capsys.readouterr().err
