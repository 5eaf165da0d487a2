"""Generation: noise that depends on prompt, index and seed alone, files that are not done twice,
folders held to one setting.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import tiny_model
from sla2_eval.generation.prompts import Prompt, Request
from sla2_eval.generation.sampling import (
    PipelineGenerator,
    SamplingConfig,
    TinyGenerator,
    generate,
    load_generator,
    model_fingerprint,
    noise_seed,
)
from sla2_eval.videos.manifest import read_manifest
from sla2_eval.videos.video import read_video

PROMPTS = [
    "a red circle moving horizontally",
    "a blue square moving vertically",
    "a cyan triangle moving horizontally behind a red square",
]


class Recorder:
    """A generator that paints each request's noise seed and notes what it was asked for."""

    transformer, fps, upscale, handles = None, 8, 2, ()

    def __init__(self):
        self.asked = []

    def sample(self, requests, config):
        self.asked += list(requests)
        seeds = [noise_seed(r.prompt, r.index, r.seed) % 200 for r in requests]
        return np.stack([np.full((3, 8, 8, 3), seed, dtype=np.uint8) for seed in seeds])


def test_noise_seeds_differ_by_prompt_index_and_seed():
    seeds = {noise_seed(p, i, s) for p in ("a", "b", "a|1") for i in range(3) for s in range(3)}
    assert len(seeds) == 27
    assert noise_seed("a red circle moving horizontally", 1, 2) == noise_seed(
        "a red circle moving horizontally", 1, 2
    )
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_files_manifest_and_resuming(tmp_path):
    config, out = SamplingConfig(batch_size=2, seed=7), tmp_path / "out"
    first = Recorder()
    generate(first, PROMPTS, out, config=config, indices=(0, 1))
    assert len(first.asked) == 6
    entries = read_manifest(out)
    assert {(e.prompt, e.index, e.seed) for e in entries} == {
        (p, i, 7) for p in PROMPTS for i in (0, 1)
    }
    assert read_video(entries[0].path).frames.shape == (3, 16, 16, 3)
    entries[3].path.unlink()
    kept = {
        entry.file_name: entry.path.stat().st_mtime_ns
        for entry in entries
        if entry is not entries[3]
    }
    second, seen = Recorder(), []
    generate(
        second,
        PROMPTS,
        out,
        config=config,
        indices=(0, 1),
        report=lambda *event: seen.append(event),
    )
    place = [request.file_name for request in first.asked].index(entries[3].file_name) // 2 * 2
    assert second.asked == first.asked[place : place + 2]  # the batch it was in
    assert seen == [("generate", 5, 6), ("generate", 6, 6)]
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    assert entries[3].path.exists()


def test_a_folder_takes_one_setting(tmp_path):
    generate(
        Recorder(),
        PROMPTS,
        tmp_path / "out",
        config=SamplingConfig(steps=4),
        fingerprint={"model": "a"},
    )
    with pytest.raises(ValueError, match=r"but sampling\.steps was 4 and is 5"):
        generate(
            Recorder(),
            PROMPTS,
            tmp_path / "out",
            config=SamplingConfig(steps=5),
            fingerprint={"model": "a"},
        )
    with pytest.raises(ValueError, match='model was "a" and is "b"'):
        generate(
            Recorder(),
            PROMPTS,
            tmp_path / "out",
            config=SamplingConfig(steps=4),
            fingerprint={"model": "b"},
        )


def test_a_folder_without_videos_takes_other_settings(tmp_path):
    class Failing(Recorder):
        def sample(self, requests, config):
            raise ValueError("num_frames: expected none")

    with pytest.raises(ValueError, match="num_frames"):
        generate(Failing(), PROMPTS, tmp_path, config=SamplingConfig(num_frames=3))
    generate(Recorder(), PROMPTS, tmp_path, config=SamplingConfig(steps=5))
    with pytest.raises(ValueError, match=r"sampling\.steps was 5 and is null"):
        generate(Recorder(), PROMPTS, tmp_path)
    (tmp_path / "generation.json").write_text("{")
    with pytest.raises(
        ValueError, match=r"generation\.json: expected a JSON object of settings, got"
    ):
        generate(Recorder(), PROMPTS, tmp_path)


def test_foreign_videos_are_not_mixed_with(tmp_path):
    (tmp_path / "holiday.mp4").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"without generation\.json"):
        generate(Recorder(), PROMPTS, tmp_path)
    assert (tmp_path / "holiday.mp4").read_bytes() == b"mine"


def test_the_model_gets_the_longer_text_and_the_file_the_prompts_name(tmp_path):
    prompts = [
        Prompt("a/b", "a long story of b", ("scene",)),
        Prompt("a b"),
        Prompt("c", samples=2),
    ]
    given = []

    class Noting(Recorder):
        def sample(self, requests, config):
            given.extend(request.given for request in requests)
            return super().sample(requests, config)

    recorder = Noting()
    generate(recorder, prompts, tmp_path, config=SamplingConfig())
    assert given == ["a long story of b", "a b", "c"]
    rows = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row.get("text"), row.get("dimensions")) for row in rows] == [
        ("a/b", "a long story of b", ["scene"]),
        ("a b", None, None),
        ("c", None, None),
    ]
    first, second, _ = sorted(read_manifest(tmp_path), key=lambda e: e.prompt != "a/b")
    assert (first.file_name, first.dimensions) == ("a b-0.mp4", ("scene",))
    assert second.file_name.startswith("a b ")
    # The noise is that of the prompt, so that a longer text is compared from the same start.
    painted = read_video(first.path).frames
    assert abs(int(painted[0, 0, 0, 0]) - noise_seed("a/b", 0, 0) % 200) < 8


def test_tiny_noise_does_not_depend_on_the_batch(tmp_path):
    tiny_model.save(tmp_path)
    generator = load_generator(tmp_path)
    assert isinstance(generator, TinyGenerator)
    config = SamplingConfig(steps=2, dtype="float32")
    requests = [Request(prompt, 0, 3) for prompt in PROMPTS]
    together = generator.sample(requests, config).astype(int)
    alone = generator.sample(requests[1:2], config).astype(int)
    assert together.shape == (3, 16, 32, 32, 3)
    assert np.abs(together[1] - alone[0]).max() <= 1
    assert np.abs(together[0] - together[1]).mean() > 10
    other_seed = generator.sample([Request(PROMPTS[1], 0, 4)], config).astype(int)
    assert np.abs(other_seed[0] - alone[0]).mean() > 10


def test_guidance_moves_away_from_the_empty_caption(tmp_path):
    tiny_model.save(tmp_path)
    generator, request = load_generator(tmp_path), [Request(PROMPTS[0], 0, 0)]
    videos = [
        generator.sample(request, SamplingConfig(steps=1, guidance=g, dtype="float32")).astype(
            float
        )
        for g in (1, 2, 3)
    ]
    assert np.abs(videos[1] - videos[0]).max() > 1
    assert (
        np.abs((videos[2] - videos[1]) - (videos[1] - videos[0])).mean() < 0.5
    )  # linear in the guidance scale


def test_pixels_that_are_not_finite_are_no_black_video(tmp_path):
    import torch

    tiny_model.save(tmp_path)
    generator, request = load_generator(tmp_path), [Request(PROMPTS[0], 0, 0)]
    with torch.no_grad():
        generator.transformer.proj_out.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="expected finite pixels, got NaN"):
        generator.sample(request, SamplingConfig(steps=1, dtype="float32"))

    class Pipeline:
        transformer, device = None, torch.device("cpu")
        set_progress_bar_config = staticmethod(lambda **_: None)

        def __call__(self, **_):
            return SimpleNamespace(frames=np.full((1, 2, 4, 4, 3), np.nan))

    with pytest.raises(FloatingPointError, match=f"beside '{PROMPTS[0]}'"):
        PipelineGenerator(Pipeline()).sample(request, SamplingConfig())


def test_the_fingerprint_follows_the_weights(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "a.safetensors").write_bytes(b"1")
    before = model_fingerprint(tmp_path)
    assert model_fingerprint(tmp_path) == before
    (tmp_path / "adapters" / "sla2-97").mkdir(parents=True)
    (tmp_path / "adapters" / "sla2-97" / "a.safetensors").write_bytes(b"3")
    assert model_fingerprint(tmp_path) == before
    (tmp_path / "a.safetensors").write_bytes(b"2")
    assert model_fingerprint(tmp_path) != before
    assert model_fingerprint("owner/name") == {"id": "owner/name"}
    assert json.dumps(before)
