"""Sampling as the pipeline says unless it is told otherwise."""

import inspect
import json
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from helpers import tiny_model
from sla2_eval.generation.defaults import defaults_of, shifted
from sla2_eval.generation.prompts import Request
from sla2_eval.generation.sampling import (
    PipelineGenerator,
    SamplingConfig,
    load_generator,
    resolved,
)


def folder(path, name: str, scheduler: dict, transformer: dict = {}, **index):  # noqa: B006
    for part, values in (("scheduler", scheduler), ("transformer", transformer)):
        (path / part).mkdir(parents=True, exist_ok=True)
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        (path / part / file).write_text(json.dumps(values))
    (path / "model_index.json").write_text(json.dumps({"_class_name": name, **index}))
    return path


UNIPC = {"_class_name": "UniPCMultistepScheduler", "flow_shift": 3.0}
EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 7.0}


@pytest.mark.parametrize(
    ("about", "expected"),
    [
        (("WanPipeline", UNIPC), (50, 5.0, 3.0, 16.0)),
        (("WanPipeline", UNIPC, {}, {"expand_timesteps": True}), (50, 5.0, 3.0, 24.0)),
        (("HunyuanVideoPipeline", EULER), (50, 6.0, 7.0, 24.0)),
        (("HunyuanVideo15Pipeline", EULER), (50, None, 7.0, 24.0)),  # its guider says
        (("CogVideoXPipeline", {}), (50, 6, None, 8.0)),
        (("CogVideoXPipeline", {}, {"patch_size_t": 2}), (50, 6, None, 16.0)),
        (("LTXPipeline", {"shift": 1.0, "use_dynamic_shifting": True}), (50, 3, None, 25.0)),
    ],
)
def test_video_pipelines_say_how_they_are_sampled(tmp_path, about, expected):
    name, scheduler, *rest = about
    transformer, index = [*rest, {}, {}][:2]
    model = folder(tmp_path, name, scheduler, transformer, **index)
    found = resolved(model, SamplingConfig())
    assert (found.steps, found.guidance, found.flow_shift, found.fps) == expected
    assert not defaults_of(model).images
    own = SamplingConfig(steps=4, guidance=1.0, fps=12.5)
    kept = resolved(model, own)
    assert (kept.steps, kept.guidance, kept.fps) == (4, 1.0, 12.5)


def test_what_a_model_does_not_take_is_refused(tmp_path):
    with pytest.raises(ValueError, match="negative_prompt: expected none for the tiny model"):
        resolved("tiny", SamplingConfig(negative_prompt="blurred"))
    cog = folder(tmp_path / "a", "CogVideoXPipeline", {})
    with pytest.raises(ValueError, match="flow_shift: expected none for CogVideoXPipeline"):
        resolved(cog, SamplingConfig(flow_shift=3.0))
    other = folder(tmp_path / "b", "SomebodysPipeline", UNIPC)
    with pytest.raises(ValueError, match="fps: expected a number for SomebodysPipeline, which"):
        resolved(other, SamplingConfig())
    assert resolved(other, SamplingConfig(fps=8.0)).steps is None
    (other / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"model: expected a pipeline, .* got .*/b$"):
        resolved(other, SamplingConfig())
    with pytest.raises(ValueError, match="flow_shift: expected a number > 0, got 0"):
        SamplingConfig(flow_shift=0)


class Pipe:
    """A pipeline that notes its calls."""

    transformer, device = None, torch.device("cpu")
    set_progress_bar_config = staticmethod(lambda **_: None)

    def __init__(self):
        self.calls, self.scheduler = [], diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)

    def __call__(self, **given):
        self.calls.append(given)
        return SimpleNamespace(frames=np.zeros((len(given["prompt"]), 1, 4, 4, 3)))


def test_only_what_is_set_is_given_to_the_pipeline():
    pipe, requests = Pipe(), [Request("a", 0, 0), Request("b", 0, 0, text="b, at length")]
    PipelineGenerator(pipe).sample(requests, SamplingConfig())
    assert set(pipe.calls[0]) == {"prompt", "generator", "output_type"}
    assert pipe.calls[0]["prompt"] == ["a", "b, at length"]
    assert pipe.scheduler.config.shift == 3.0
    config = SamplingConfig(steps=7, guidance=2.5, negative_prompt="blur", flow_shift=5.0, height=8)
    PipelineGenerator(pipe).sample(requests, config)
    given = {k: v for k, v in pipe.calls[1].items() if k not in pipe.calls[0]}
    assert given == {
        "num_inference_steps": 7,
        "guidance_scale": 2.5,
        "negative_prompt": ["blur", "blur"],
        "height": 8,
    }
    assert pipe.scheduler.config.shift == 5.0
    assert shifted(pipe.scheduler, 5.0) is pipe.scheduler


def test_the_tiny_model_has_its_own_and_takes_another_shift(tmp_path):
    tiny_model.save(tmp_path)
    found = resolved(tmp_path, SamplingConfig())
    assert (found.steps, found.guidance, found.fps) == (20, 2.0, 8)
    generator, one = load_generator(tmp_path), [Request("a red circle moving horizontally", 0, 0)]
    plain = SamplingConfig(steps=2, dtype="float32")
    frames = [
        generator.sample(one, config)
        for config in (plain, SamplingConfig(steps=2, dtype="float32", flow_shift=9.0))
    ]
    assert (frames[0] != frames[1]).any()


@pytest.mark.parametrize(
    ("name", "argument"), [("SanaVideoPipeline", "frames"), ("LattePipeline", "video_length")]
)
def test_a_video_pipeline_may_call_its_frames_otherwise(tmp_path, name, argument):
    assert not defaults_of(folder(tmp_path, name, EULER)).images
    theirs = getattr(diffusers, name)

    class Noting(Pipe):
        __call__ = None

    def call(self, **given):
        return Pipe.__call__(self, **given)

    call.__signature__ = inspect.signature(theirs.__call__)
    Noting.__call__ = call
    pipe = Noting()
    PipelineGenerator(pipe).sample([Request("a", 0, 0)], SamplingConfig(num_frames=9, height=8))
    assert (pipe.calls[0][argument], pipe.calls[0]["height"]) == (9, 8)
    assert "num_frames" not in pipe.calls[0]


def test_a_model_of_images_takes_no_number_of_frames(tmp_path):
    with pytest.raises(ValueError, match="num_frames: expected none for FluxPipeline, which makes"):
        resolved(folder(tmp_path, "FluxPipeline", {}), SamplingConfig(num_frames=9))
