"""sla2 import turbodiffusion: the folder it writes goes through sla2 generate, and what it
refuses.
"""

import json
import sys

import numpy as np
import torch
from helpers import pipelines
from helpers import turbodiffusion as turbo
from sla2_eval.cli.main import main
from sla2_eval.videos.video import read_video

SIZES = turbo.SMALL | {"channels": 16, "out": 16}


def test_an_imported_checkpoint_generates_with_sla_and_rcm(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(turbo.checkpoint(SIZES), "turbo.pth")
    pipelines.wan().save_pretrained("base")
    (tmp_path / "p.txt").write_text("a red circle\n")
    given = ["--topk", "0.34", "--block-q", "4", "--block-k", "3", "--dtype", "float32"]
    command = ["import", "turbodiffusion", "turbo.pth", "--base", "base", *given]
    assert main([*command, "--out", "turbo"]) == 0
    assert capsys.readouterr().out == "turbo\n"
    assert main([*command, "--out", "again", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"folder": "again"}]
    assert json.loads((tmp_path / "turbo/transformer/sla2_config.json").read_text())["layers"]
    size = ["--num-frames", "5", "--height", "32", "--width", "48", "--dtype", "float32"]
    videos = {}
    monkeypatch.delitem(sys.modules, "sla2_core.integrations.rcm")  # as in a process of its own
    for name, adapter in (("sla", ["--adapter", "turbo"]), ("full", [])):
        sampling = ["--prompts", "p.txt", "--out", name]
        assert main(["generate", "--model", "turbo", *adapter, *sampling, *size]) == 0
        used = json.loads((tmp_path / name / "generation.json").read_text())["sampling"]
        assert (used["steps"], used["guidance"]) == (4, 1.0)  # as its scheduler says
        videos[name] = read_video(tmp_path / name / "a red circle-0.mp4").frames
    assert not np.array_equal(videos["sla"], videos["full"])
    capsys.readouterr()
    sampling = ["--steps", "20", "--prompts", "p.txt", "--out", "x"]
    assert main(["generate", "--model", "turbo", *sampling, *size]) == 2
    assert "num_inference_steps: expected 1 to 4 for rCM, got 20" in capsys.readouterr().err


def test_an_import_without_its_base_is_told_from_a_pipeline(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(turbo.checkpoint(SIZES), "turbo.pth")
    assert main(["import", "turbodiffusion", "turbo.pth", "--out", "turbo"]) == 0
    (tmp_path / "p.txt").write_text("a red circle\n")
    video = {"num_frames": 5, "height": 32, "width": 48}
    settings = {"model": "turbo", "video": video, "attention": {"topk": 0.5}}
    (tmp_path / "train.yaml").write_text(json.dumps(settings))
    for command in (
        ["generate", "--model", "turbo", "--adapter", "turbo", "--prompts", "p.txt"],
        ["train", "finetune", "--config", "train.yaml"],
    ):
        capsys.readouterr()
        assert main([*command, "--out", "out"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(
            "sla2: error: model: expected a pipeline in turbo, got a transformer and its sampler;"
            " give sla2 import turbodiffusion the --base"
        )
        assert error.count("\n") == 1


def test_a_bad_file_is_refused_in_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "turbo.pth").write_bytes(b"not a checkpoint")
    assert main(["import", "turbodiffusion", "turbo.pth", "--out", "turbo"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sla2: error: turbo.pth: expected a checkpoint of torch.save or ")
    assert error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["turbo.pth"]
