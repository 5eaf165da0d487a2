"""sla2 generate on a pipeline folder as diffusers saves it: variants from the same noise, resuming,
several processes, Ray.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import pipelines
from sla2_core import SLA2Config
from sla2_eval.cli.main import main
from sla2_eval.parallel import pool
from sla2_eval.videos.video import read_video

SLA2 = SLA2Config(
    head_dim=12, num_heads=2, topk=0.3, block_q=4, block_k=2, alpha_knots=3, precision="int8"
)
PROMPTS = ("a red circle moving horizontally", "a blue square moving vertically", "a red square")
SIZE = [
    "--num-frames",
    "5",
    "--height",
    "32",
    "--width",
    "48",
    "--steps",
    "2",
    "--guidance",
    "2",
    "--videos-per-prompt",
    "2",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with model/, adapter/ (k% of 30, int8) and prompts.txt."""
    from sla2_core.integrations.diffusers import apply_sla2

    folder = tmp_path_factory.mktemp("files")
    pipe = pipelines.wan()
    pipe.save_pretrained(folder / "model")
    apply_sla2(pipe.transformer, SLA2).save(folder / "adapter")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return folder


def generate(files, out, *options) -> int:
    given = [
        "generate",
        "--model",
        str(files / "model"),
        "--prompts",
        str(files / "prompts.txt"),
        "--out",
        str(out),
    ]
    return main([*given, *SIZE, *options])


def videos(folder) -> dict[str, np.ndarray]:
    return {path.name: read_video(path).frames.astype(int) for path in sorted(folder.glob("*.mp4"))}


def test_variants_begin_from_the_same_noise_and_go_on(files, tmp_path, capsys):
    both = ["--variant", "full=full", "--variant", f"sla2={files / 'adapter'}"]
    assert generate(files, tmp_path, *both) == 0
    printed = capsys.readouterr()
    assert (
        "it/s" not in printed.err
    )  # no bars of diffusers or transformers where there is no terminal
    shown = printed.out.splitlines()
    assert shown == [str(tmp_path / name / "manifest.jsonl") for name in ("full", "sla2")]
    full, sla2 = videos(tmp_path / "full"), videos(tmp_path / "sla2")
    assert (
        set(full)
        == set(sla2)
        == {f"{prompt}-{index}.mp4" for prompt in PROMPTS for index in (0, 1)}
    )
    first, second = f"{PROMPTS[0]}-0.mp4", f"{PROMPTS[0]}-1.mp4"
    assert full[first].shape == (5, 32, 48, 3)
    apart = np.abs(full[first] - full[second]).mean()
    assert (
        0 < np.abs(full[first] - sla2[first]).mean() < 0.5 * apart
    )  # the variant matters less than the noise

    kept = (tmp_path / "sla2" / second).read_bytes()
    before = (tmp_path / "sla2" / second).stat().st_mtime_ns
    (tmp_path / "sla2" / first).unlink()
    assert generate(files, tmp_path, *both) == 0
    assert (tmp_path / "sla2" / second).stat().st_mtime_ns == before
    assert (tmp_path / "sla2" / second).read_bytes() == kept
    assert np.array_equal(videos(tmp_path / "sla2")[first], sla2[first])


def test_one_adapter_goes_into_the_folder_itself(files, tmp_path):
    assert (
        generate(files, tmp_path / "a", "--adapter", str(files / "adapter"), "--batch-size", "2")
        == 0
    )
    settings = json.loads((tmp_path / "a" / "generation.json").read_text())
    assert settings["sampling"]["num_frames"] == 5
    assert len(list((tmp_path / "a").glob("*.mp4"))) == 6


def test_an_adapter_of_a_member_from_outside_wants_its_module(files, tmp_path, capsys):
    """In a process of its own, where nothing else has imported the member."""
    adapter = tmp_path / "adapter"
    shutil.copytree(files / "adapter", adapter)
    path = adapter / "sla2_config.json"
    path.write_text(path.read_text().replace('"learned"', '"cosine"'))
    module = tmp_path / "cosine.py"
    module.write_text(
        "from sla2_core.registry import ROUTERS\n"
        "from sla2_core.routing.learned import LearnedRouter\n"
        "ROUTERS.register('cosine')(type('Cosine', (LearnedRouter,), {}))\n"
    )
    assert generate(files, tmp_path / "none", "--adapter", str(adapter)) == 2
    assert "router: expected one of" in capsys.readouterr().err
    given = ["generate", "--model", str(files / "model"), "--adapter", str(adapter), *SIZE]
    given += ["--prompts", str(files / "prompts.txt"), "--out", str(tmp_path / "out")]
    made = subprocess.run(
        [sys.executable, "-m", "sla2_eval.cli.main", *given, "--imports", "cosine"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 6
    assert generate(files, tmp_path / "none", "--imports", "no_such_module") == 2
    assert "imports: expected modules that can be imported" in capsys.readouterr().err


def test_both_transformers_of_wan22_have_their_adapter(files, tmp_path, capsys):
    """A model with one of its two transformers dense in silence would look better than it is."""
    from sla2_core.integrations.diffusers import apply_sla2
    from sla2_eval.generation.sampling import load_generator

    pipe = pipelines.wan(two=True)
    pipe.save_pretrained(tmp_path / "model")
    two = ["--model", str(tmp_path / "model"), "--variant"]
    assert generate(files, tmp_path / "out", *two, f"sla2={files / 'adapter'}") != 0
    assert (
        "adapter: expected an adapter for each of the model's two transformers, got none in"
        in capsys.readouterr().err
    )
    for name in ("transformer", "transformer_2"):
        apply_sla2(getattr(pipe, name), SLA2).save(tmp_path / "adapter" / name)
    assert (
        generate(
            files, tmp_path / "both", *two, "full=full", *two[2:], f"sla2={tmp_path / 'adapter'}"
        )
        == 0
    )
    assert len(videos(tmp_path / "both" / "sla2")) == 6
    loaded = load_generator(tmp_path / "model", tmp_path / "adapter").pipe
    for transformer in (loaded.transformer, loaded.transformer_2):
        assert hasattr(transformer.blocks[0].attn1.processor, "attention")


def test_vbenchs_files_through_generate_score_and_report(files, tmp_path, capsys):
    """A file with a repeated prompt, its longer version and the full-info JSON: files are named and
    scored by the original, each dimension by its own prompts.
    """
    short = ["a red circle", "a blue square", "a red circle"]
    (tmp_path / "short.txt").write_text("\n".join(short))
    (tmp_path / "longer.txt").write_text("a red red circle moving\na blue blue square\na circle\n")
    dimensions = ["temporal_flickering"], ["scene", "color"], ["scene"]
    info = [{"prompt_en": p, "dimension": names} for p, names in zip(short, dimensions)]
    (tmp_path / "info.json").write_text(json.dumps(info))
    options = ["--model", str(files / "model"), *SIZE, "--out", str(tmp_path / "out")]
    options += ["--prompts", str(tmp_path / "longer.txt"), "--names", str(tmp_path / "short.txt")]
    assert main(["generate", *options, "--info", str(tmp_path / "info.json")]) == 0
    rows = [json.loads(r) for r in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert [(row["file_name"], row["text"]) for row in rows] == [
        ("a red circle-0.mp4", "a red red circle moving"),
        ("a red circle-1.mp4", "a red red circle moving"),
        ("a blue square-0.mp4", "a blue blue square"),
        ("a blue square-1.mp4", "a blue blue square"),
    ]
    score = ["score", "--videos", str(tmp_path / "out"), "--metrics", "temporal_flickering"]
    assert main([*score, "--out", str(tmp_path / "scores")]) == 0
    results = json.loads((tmp_path / "scores" / "results.json").read_text())
    values = [row["scores"]["temporal_flickering"] for row in results["videos"]]
    about = results["metrics"]["temporal_flickering"]
    assert about["mean"] == pytest.approx(np.mean(values))
    assert about["vbench_mean"] == pytest.approx(np.mean(values[2:]))  # of the red circle
    capsys.readouterr()
    assert main(["report", str(tmp_path / "scores"), "--out", str(tmp_path / "report")]) == 0
    assert (tmp_path / "report" / "index.html").is_file()


def test_image_models_write_pictures_that_are_scored(files, tmp_path, capsys):
    pipelines.flux().save_pretrained(tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "--prompts", str(files / "prompts.txt")]
    options += ["--steps", "1", "--height", "32", "--width", "48", "--out"]
    for seed in "01":
        assert main(["generate", *options, str(tmp_path / seed), "--seed", seed]) == 0
    written = {path.name for path in (tmp_path / "0").rglob("*.*") if path.suffix != ".json"}
    assert written - {"manifest.jsonl", "speed.jsonl"} == {f"{text}-0.png" for text in PROMPTS}
    capsys.readouterr()
    scored = ["score", "--metrics", "psnr", "--json", "--out", str(tmp_path / "scores")]
    scored += ["--reference", str(tmp_path / "1")]
    assert main([*scored, "--videos", str(tmp_path / "0")]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    (tmp_path / "0" / "manifest.jsonl").unlink()  # a folder of pictures by itself
    assert main([*scored, "--videos", str(tmp_path / "0")]) == 0
    assert json.loads(capsys.readouterr().out) == [row]
    pixels = [
        read_video(tmp_path / seed / f"{PROMPTS[0]}-0.png").frames.astype(float) for seed in "01"
    ]
    assert pixels[0].shape == (1, 32, 48, 3)
    results = json.loads((tmp_path / "scores" / "results.json").read_text())
    found = {v["file_name"]: v["scores"]["psnr"] for v in results["videos"]}
    error = ((pixels[0] - pixels[1]) ** 2).mean() / 255**2
    assert found[f"{PROMPTS[0]}-0.png"] == pytest.approx(-10 * np.log10(error), abs=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--variant", "a=full", "--variant", "a=full"],
            "--variant: expected each name once, got 'a' again",
        ),
        (["--variant", "full"], "--variant: expected NAME=ADAPTER or NAME=full, got 'full'"),
        (
            ["--variant", "../a=full"],
            "--variant: expected NAME=ADAPTER or NAME=full, got '../a=full'",
        ),
        (
            ["--variant", "a=full", "--adapter", "b"],
            "--adapter: expected none beside --variant, got one",
        ),
        (
            ["--variant", "a=nowhere"],
            "adapter: expected a folder with sla2_config.json, got nowhere",
        ),
        (
            ["--ray-address", "here"],
            "ray_address: expected 'auto', host:port or ray://host:port, got 'here'",
        ),
    ],
)
def test_refusals(files, tmp_path, capsys, options, message):
    assert generate(files, tmp_path, *options) != 0
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.mp4"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_gpus_share_the_videos_with_ray(files, tmp_path, monkeypatch):
    """Two pretended GPUs: Ray gives each task one of them, and the videos are those of
    one process.
    """
    monkeypatch.setattr(pool, "local_gpus", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = ("--batch-size", "1", "--adapter", str(files / "adapter"))
    assert generate(files, tmp_path / "ray", *options) == 0
    monkeypatch.undo()
    assert generate(files, tmp_path / "one", *options) == 0
    spread, alone = videos(tmp_path / "ray"), videos(tmp_path / "one")
    assert set(spread) == set(alone)
    worst = {name: int(np.abs(spread[name] - alone[name]).max()) for name in alone}
    assert max(worst.values()) <= 2, worst
    assert (tmp_path / "ray" / "manifest.jsonl").read_text() == (
        tmp_path / "one" / "manifest.jsonl"
    ).read_text()
