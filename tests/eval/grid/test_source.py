"""Any model through training and a grid: a random Wan pipeline as diffusers saves it, and members
with options that a module of `imports` registers.
"""

import json
import shutil
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
import yaml
from helpers import pipelines
from sla2_core.integrations.loading import apply_adapter
from sla2_core.integrations.rcm import RCMScheduler
from sla2_core.training.cache import CachedData
from sla2_core.training.capture import Captures
from sla2_eval.cli.main import main
from sla2_eval.generation.sampling import load_generator
from sla2_eval.grid import steps
from sla2_eval.grid.settings import AblationSettings, TrainSettings
from sla2_eval.grid.source import PipelineSource, TinySource, open_source, source_of, with_shift
from sla2_eval.runs.settings import SettingsError, validate


def write(path, settings: dict) -> str:
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def test_a_pipeline_is_trained_and_compared(wan_folder, wan_training, tmp_path, capsys):
    config, out = write(tmp_path / "train.yaml", wan_training), tmp_path / "run"
    assert main(["train", "finetune", "--config", config, "--out", str(out)]) == 0
    adapter = capsys.readouterr().out.splitlines()[-1]
    data = CachedData(out / "data")
    assert data[0]["latents"].shape == (16, 2, 4, 6)
    assert data.unconditional["encoder_hidden_states"].shape == (512, 8)
    assert Captures(out / "captures").calls[0]["shape"] == [1, 1, 12, 12]
    generator = load_generator(wan_training["model"])
    before = generator.transformer.blocks[0].attn1.to_q.weight.clone()
    handle = apply_adapter(generator.transformer, adapter)
    assert handle.config.precision == "int8"
    assert handle.base_model == wan_training["model"]
    assert not torch.equal(before, generator.transformer.blocks[0].attn1.to_q.weight)

    settings = {
        **wan_training,
        "generate": {"prompts": str(wan_folder / "prompts.txt"), "num_prompts": 2, "steps": 1},
        "metrics": ["psnr", "temporal_flickering"],
        "workers": 0,
        "variants": [
            {"name": "sla2", "label": "SLA2", "family": "SLA2"},
            {"name": "sla", "label": "SLA", "family": "SLA", "attention": {"variant": "sla"}},
        ],
    }
    grid = tmp_path / "grid"
    config = write(tmp_path / "grid.yaml", settings)
    assert main(["ablate", "--config", config, "--out", str(grid)]) == 0
    report = json.loads((grid / "report" / "results.json").read_text())
    groups = {group["label"]: group for group in report["groups"]}
    assert set(groups) == {"full attention", "SLA2", "SLA"}
    assert np.isfinite(groups["SLA"]["metrics"]["psnr"]["mean"])
    assert groups["SLA"]["metrics"]["psnr"]["n"] == 2
    maps = json.loads((grid / "block_maps" / "sla2.json").read_text())
    assert maps["grid"] == [2, 2, 3]
    assert maps["sparsity"] == groups["SLA2"]["sparsity"] == 0.5
    assert {len(row) for layer in maps["layers"] for row in layer["map"]} == {3}
    assert len(list((grid / "work" / "stage1").iterdir())) == 1  # SLA has nothing to learn there
    assert main(["report", str(grid)]) == 0
    assert (grid / "report" / "index.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["cogvideox", "hunyuan_video"])
def test_other_families_are_rows_too(family, wan_folder, wan_training, tmp_path):
    getattr(pipelines, family)().save_pretrained(tmp_path / "model")
    settings = {
        **wan_training,
        "model": str(tmp_path / "model"),
        "generate": {"prompts": str(wan_folder / "prompts.txt"), "num_prompts": 1, "steps": 1},
        "metrics": ["psnr"],
        "workers": 0,
        "variants": [{"name": "a", "label": "A", "family": "F"}],
    }
    config = write(tmp_path / "grid.yaml", settings)
    assert main(["ablate", "--config", config, "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "report" / "results.json").read_text())
    assert np.isfinite(report["groups"][1]["metrics"]["psnr"]["mean"])
    maps = json.loads((tmp_path / "out" / "block_maps" / "a.json").read_text())
    assert maps["grid"] == [2, 2, 3]
    page = (tmp_path / "out" / "report" / "index.html").read_text()
    assert 'id="maps"' in page


def settings_of(values: dict, **changes) -> TrainSettings:
    return validate({**values, **changes}, TrainSettings, "test")


@pytest.mark.parametrize(
    ("scheduler", "shift"),
    [
        (diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=5.0), 5.0),
        (diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0), 7.0),
        (diffusers.DDIMScheduler(), 1.0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_shift_is_the_schedulers_unless_it_is_given(
    wan_folder, wan_training, tmp_path, scheduler, shift
):
    shutil.copy(wan_folder / "model" / "model_index.json", tmp_path)
    scheduler.save_pretrained(tmp_path / "scheduler")
    settings = settings_of(wan_training, model=str(tmp_path))
    source = open_source(settings)
    assert source.shift == shift
    assert with_shift(settings, source).stage2 == replace(settings.stage2, shift=shift)
    given = settings_of(wan_training, model=str(tmp_path), stage2={"shift": 4.0})
    assert with_shift(given, source).stage2.shift == 4.0


@pytest.mark.parametrize(
    ("scheduler", "reason"),
    [
        (
            diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            "whose scheduler has another shift for each length",
        ),
        (RCMScheduler(), "whose scheduler, rCM's, has no shift"),
    ],
    ids=["of the length", "rCM"],
)
def test_a_shift_that_no_scheduler_says_must_be_given(
    wan_folder, wan_training, tmp_path, scheduler, reason
):
    shutil.copy(wan_folder / "model" / "model_index.json", tmp_path)
    scheduler.save_pretrained(tmp_path / "scheduler")
    settings = settings_of(wan_training, model=str(tmp_path))
    message = rf"stage2\.shift: expected a number for \S+, {reason}, got none$"
    with pytest.raises(SettingsError, match=message):
        with_shift(settings, open_source(settings))
    given = settings_of(wan_training, model=str(tmp_path), stage2={"shift": 4.0})
    assert with_shift(given, open_source(given)).stage2.shift == 4.0


def test_what_cannot_be_trained_is_refused_in_one_line(wan_training, tmp_path):
    pipelines.wan(two=True).save_pretrained(tmp_path / "two")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "model_index.json").write_text("{}")
    for changes, message in (
        (
            {"model": str(tmp_path / "two")},
            "expert: expected high or low for WanPipeline with two transformers .* got no expert",
        ),
        (
            {"expert": "low"},
            "expert: expected none for WanPipeline with one transformer .* got low",
        ),
        ({"model": str(tmp_path / "none")}, "a transformer and a VAE, .* without transformer in"),
        ({"video": None}, "video: expected num_frames, height and width to train .* got none"),
        ({"model": "tiny"}, "video: expected none with the tiny model, got a size"),
    ):
        with pytest.raises(SettingsError, match=message) as error:
            open_source(settings_of(wan_training, **changes))
        assert "\n" not in str(error.value)
    grid = {**wan_training, "expert": "low"}
    grid["variants"] = [{"name": "sla2", "label": "SLA2", "family": "SLA2"}]
    with pytest.raises(SettingsError, match=r"expert: expected none in a grid, .* got low"):
        validate(grid, AblationSettings, "test")


def test_each_expert_of_two_is_trained_on_its_own_noise_levels(wan_training, tmp_path):
    pipelines.wan(two=True).save_pretrained(tmp_path / "two")
    pipe = diffusers.WanPipeline.from_pretrained(tmp_path / "two")
    for expert, part, levels in (
        ("high", pipe.transformer, (0.9, 1.0)),
        ("low", pipe.transformer_2, (0.0, 0.9)),
    ):
        given = {**wan_training, "model": str(tmp_path / "two"), "expert": expert}
        settings = settings_of(given)
        source = open_source(settings)
        weight = source.transformer.blocks[1].attn1.to_q.weight
        assert torch.equal(weight, part.blocks[1].attn1.to_q.weight)
        assert with_shift(settings, source).stage2.sigma_range == levels
        config, out = write(tmp_path / "train.yaml", given), tmp_path / expert
        assert main(["train", "finetune", "--config", config, "--out", str(out)]) == 0
        times = {call["timestep"] for call in Captures(out / "captures").calls}
        assert all(1000 * levels[0] <= t <= 1000 * levels[1] for t in times)
        shutil.copytree(out / "stage2" / "adapter", tmp_path / "adapters" / source._place)
    generator = load_generator(str(tmp_path / "two"), tmp_path / "adapters")
    moved = generator.pipe.transformer_2.blocks[1].attn1.to_q.weight
    assert not torch.equal(moved, pipe.transformer_2.blocks[1].attn1.to_q.weight)


def test_a_grid_of_a_pipeline_needs_prompts(wan_training, tmp_path):
    from sla2_eval.grid.ablation import metrics_of, run_grid

    variants = [{"name": "a", "label": "A", "family": "F"}]
    settings = validate({**wan_training, "variants": variants}, AblationSettings, "test")
    with pytest.raises(SettingsError, match=r"generate\.prompts: expected a text file"):
        run_grid(settings, tmp_path)
    assert not list(tmp_path.iterdir())
    assert "caption_accuracy" not in metrics_of(settings, open_source(settings))
    assert "caption_accuracy" in metrics_of(settings, TinySource("tiny"))


def test_data_encoded_at_another_size_is_not_taken(wan_training, tmp_path):
    settings = settings_of(wan_training)
    source = open_source(settings)
    assert len(source.encode(settings.data, tmp_path / "data")) == 2
    other = open_source(settings_of(wan_training, video={**wan_training["video"], "height": 64}))
    with pytest.raises(ValueError, match=r"cache\.json: expected height=64 as given, got 32"):
        other.encode(settings.data, tmp_path / "data")
    nowhere = settings_of(wan_training, data={})
    with pytest.raises(SettingsError, match=r"data\.videos: expected a folder .* --videos DIR"):
        open_source(nowhere).encode(nowhere.data, tmp_path / "other")


def test_a_model_without_a_known_grid_of_tokens_gets_no_block_maps(wan_folder, wan_training):
    settings = settings_of(wan_training)
    generator = load_generator(settings.model)
    source = source_of(generator, settings)
    assert isinstance(source, PipelineSource)
    raster = settings.attention.changed({"token_order": "raster"})
    handle = steps.apply(generator.transformer, raster)
    video = next((wan_folder / "videos").glob("*.mp4"))
    known = steps.block_maps(source, handle, video, "a red circle")
    handle.remove()
    ordered = settings.attention.changed({"options": {"tile": [1, 2, 2]}})
    handle = steps.apply(generator.transformer, ordered)
    tiles = steps.block_maps(source, handle, video, "a red circle")
    handle.family = replace(handle.family, grid=None)
    unknown = steps.block_maps(source, handle, video, "a red circle")
    assert known["order"] is None
    assert tiles["order"] == [0, 1, 4, 3, 2, 5, 11, 8, 10, 9, 6, 7]
    assert known["layers"]
    assert tiles["layers"]
    assert unknown["layers"] == []
    assert unknown["grid"] is None
    assert unknown["sparsity"] == known["sparsity"] == 0.5
    assert unknown["flops"] == known["flops"] > 0.5
