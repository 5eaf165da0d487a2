"""experiments/train_wan.py on a tiny random Wan: all parts run, and its settings files are valid."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import yaml
from sla2_core import SLA2Config
from sla2_core.integrations.loading import apply_adapter
from sla2_core.training.cache import encode_samples
from sla2_core.training.capture import CaptureConfig
from sla2_core.training.stage1 import Stage1Config
from sla2_core.training.stage2 import Stage2Config

ROOT = Path(__file__).parents[2] / "experiments"
_SPEC = importlib.util.spec_from_file_location("train_wan", ROOT / "train_wan.py")
train_wan = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(train_wan)


@pytest.mark.parametrize(("name", "batch"), [("wan2.1_1.3b", 64), ("wan2.1_14b", 15)])
def test_settings_are_valid_and_the_papers(name, batch):
    settings = yaml.safe_load((ROOT / name / "train.yaml").read_text())
    attention, stage2 = SLA2Config(**settings["attention"]), Stage2Config(**settings["stage2"])
    assert (attention.block_q, attention.block_k, attention.tau, attention.topk) == (128, 64, 0.1, 0.03)
    assert (stage2.steps, stage2.batch_size) == (500, batch)
    assert stage2.batch_size % stage2.accumulate == 0
    assert Stage1Config(**settings["stage1"] | {"topk": tuple(settings["stage1"]["topk"])}).topk == (0.05, 0.04, 0.03)
    CaptureConfig(**{k: v for k, v in settings["capture"].items() if k != "samples"})


def test_every_part_runs_on_a_tiny_wan(tmp_path, capsys, monkeypatch):
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    settings = dict(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8,
        freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    model = WanTransformer3DModel(**settings)
    model.save_pretrained(tmp_path / "model" / "transformer")
    encode_samples(
        ["a", "b"], lambda i: {"latents": torch.randn(4, 3, 6, 10), "encoder_hidden_states": torch.randn(5, 8)},
        tmp_path / "out" / "data", settings={},
    )  # fmt: skip
    config = {
        "model": str(tmp_path / "model"),
        "attention": {
            "head_dim": 12, "num_heads": 2, "topk": 0.3, "block_q": 8, "block_k": 5, "alpha_knots": 3, "precision": "int8",
        },
        "capture": {"samples": 2, "layers_per_sample": 2, "heads": 1, "dtype": "bfloat16"},
        "stage1": {"topk": [0.3, 0.5], "steps": 2},
        "stage2": {"steps": 2, "batch_size": 4, "accumulate": 2, "loss": "distill", "gradient_checkpointing": True},
    }  # fmt: skip
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
    handle = apply_adapter(WanTransformer3DModel(**settings), adapter)
    assert handle.config.precision == "int8"
    assert train_wan.main([*arguments[:2], "--out", str(tmp_path / "other")]) == 1
    assert "--videos: expected a folder of captioned mp4 files" in capsys.readouterr().err
