"""The tiny model's data: scenes, captions, the exact detector through mp4 files, latents, and the
teacher's resume.
"""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sla2_eval.tiny import model as tiny
from sla2_eval.tiny import teacher
from sla2_eval.tiny.detector import detect
from sla2_eval.tiny.shapes import (
    COLOURS,
    FPS,
    MOTIONS,
    SHAPES,
    Scene,
    parse_caption,
    render,
    sample,
)
from sla2_eval.tiny.teacher import TeacherConfig, _cut, cached_attention, train_teacher
from sla2_eval.videos.dataset import read_folder, write_folder


def as_uint8(pairs):
    return ((np.uint8((video * 255).round()), caption) for video, caption in pairs)


def test_captions_round_trip_and_foreign_ones_are_refused():
    for index in range(50):
        _, caption = sample(3, index)
        assert parse_caption(caption).caption == caption
    for bad in (
        "a red circle",
        "a red circle moving up",
        "a red circle moving vertically behind a blue",
        "",
    ):
        with pytest.raises(ValueError, match="caption: expected 'a COLOUR SHAPE"):
            parse_caption(bad)


def test_a_sample_follows_from_seed_and_index():
    assert np.array_equal(sample(1, 5)[0], sample(1, 5)[0])
    assert not np.array_equal(sample(1, 5)[0], sample(1, 6)[0])


def test_detector_reads_true_scenes_back_from_mp4_files(tmp_path):
    write_folder(tmp_path, as_uint8(sample(0, i) for i in range(120)), fps=FPS, upscale=4)
    data = read_folder(tmp_path, num_frames=16, height=32, width=32)
    found = [
        detect(video / np.float32(255), caption)
        for video, caption in zip(data.videos, data.captions)
    ]
    assert all(d.correct and d.other for d in found)


def test_detector_refuses_every_wrong_attribute():
    scene = Scene(colour="red", shape="circle", motion="horizontally")
    video = render(scene, np.random.default_rng(0))
    assert detect(video, scene.caption).correct
    for change in (
        *({"colour": c} for c in COLOURS if c != "red"),
        *({"shape": s} for s in SHAPES if s != "circle"),
        *({"motion": m} for m in MOTIONS if m != "horizontally"),
    ):
        assert not detect(video, dataclasses.replace(scene, **change).caption).correct
    assert detect(video[::-1], scene.caption).correct  # the caption does not say which way
    assert not detect(np.repeat(video[:1], 16, 0), scene.caption).motion
    shuffled = video[np.random.default_rng(1).permutation(16)]
    assert not detect(shuffled, scene.caption).motion
    assert not detect(np.zeros_like(video), scene.caption).visible
    assert not detect(
        np.random.default_rng(2).random(video.shape, dtype=np.float32), scene.caption
    ).correct


def test_detector_wants_the_second_shape_and_the_bounce():
    rng = np.random.default_rng(0)
    bounce = Scene(
        colour="red",
        shape="circle",
        motion="horizontally",
        relation="colliding with",
        other_colour="blue",
        other_shape="square",
    )
    video = render(bounce, rng)
    assert detect(video, bounce.caption).correct
    assert not detect(video, dataclasses.replace(bounce, other_colour="cyan").caption).other
    passing = dataclasses.replace(bounce, relation="in front of")
    assert not detect(video, passing.caption).motion


def test_latents_round_trip_and_captions_encode_words_and_places():
    video = np.random.default_rng(0).integers(0, 256, (2, 16, 32, 32, 3), dtype=np.uint8)
    assert np.array_equal(tiny.to_frames(tiny.to_latents(video)), video)
    text = tiny.encode_captions(["a red circle moving vertically", ""])
    assert text.shape == (2, tiny.CAPTION_LENGTH, tiny.TEXT_DIM)
    assert text[0].sum() == 10
    assert text[1].sum() == 0
    with pytest.raises(ValueError, match=r"caption: expected words among .*, got 'purple'"):
        tiny.encode_captions(["a purple circle"])


def test_cached_attention_is_full_attention(monkeypatch):
    q, k, v = (torch.randn(2, 40, 3, 8) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v))
    )
    monkeypatch.setattr(teacher, "CACHED_SCORES", 3 * 40 + 39)  # 3 rows at a time
    torch.testing.assert_close(cached_attention(q, k, v), expected.transpose(1, 2))


def test_a_model_of_larger_patches_is_a_start_for_smaller_ones(tmp_path):
    """On a video of constant colour a patch's size does not show: the first layer and the last give
    the same.
    """
    large, small = tiny.build_transformer("tiny-1k"), tiny.build_transformer("tiny-4k")
    small.load_state_dict(tiny.with_smaller_patches(large.state_dict(), "tiny-4k"))
    x = torch.full((1, 3, 2, 8, 8), 0.7)
    tokens = [m.patch_embedding(x).flatten(2)[0, :, 0] for m in (large, small)]
    torch.testing.assert_close(*tokens)
    hidden = torch.randn(1, 5, 128)
    pixels = [m.proj_out(hidden).unflatten(-1, (-1, 3)).mean(2) for m in (large, small)]
    torch.testing.assert_close(*pixels)


def test_rotary_positions_count_pixels_whatever_the_patch():
    """Every second small patch begins where a large one does, so its angles are the same."""
    x = torch.zeros(1, 3, 4, 16, 8)
    large, small = (tiny.build_transformer(name).rope(x) for name in ("tiny-1k", "tiny-4k"))
    for few, many in zip(large, small):
        every_second = many.view(4, 8, 4, -1)[:, ::2, ::2]
        torch.testing.assert_close(few.view(4, 4, 2, -1), every_second)
    assert not torch.equal(small[0].view(4, 8, 4, -1)[:, 1], small[0].view(4, 8, 4, -1)[:, 0])


def test_small_patches_start_near_the_trained_model_since_positions_count_pixels():
    path = tiny.weights_of("tiny-1k") / "transformer" / "diffusion_pytorch_model.safetensors"
    model = tiny.build_transformer("tiny-4k")
    model.load_state_dict(tiny.with_smaller_patches(load_file(path), "tiny-4k"))
    video, caption = sample(0, 3)
    clean = tiny.to_latents((video * 255).round().astype(np.uint8)[None])
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    given = (torch.lerp(clean, noise, 0.5), torch.tensor([500.0]), tiny.encode_captions([caption]))

    def loss():
        with torch.no_grad():
            velocity = model(*given, return_dict=False)[0]
        return torch.nn.functional.mse_loss(velocity, noise - clean).item()

    in_pixels = loss()
    model.rope = type(model.rope)(32, (1, 2, 2), 64)  # as diffusers makes it: positions in patches
    assert 2 * in_pixels < loss()


def test_a_loaded_model_turns_by_the_angles_of_the_built_one(tmp_path):
    built = tiny.build_transformer("tiny-4k")
    built.save_pretrained(tmp_path / "transformer")
    loaded = tiny.load_transformer(tmp_path / "transformer")
    assert torch.equal(loaded.rope.freqs_cos, built.rope.freqs_cos)
    assert torch.equal(loaded.rope.freqs_sin, built.rope.freqs_sin)


def test_a_teacher_starts_from_another_model(tmp_path):
    config = TeacherConfig(
        model="tiny-4k", start="tiny-1k", num_videos=1, steps=1, batch_size=1, learning_rate=1e-9
    )
    train_teacher(config, tmp_path)
    found = load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    start = load_file(
        tiny.weights_of("tiny-1k") / "transformer" / "diffusion_pytorch_model.safetensors"
    )
    name = "blocks.2.ffn.net.0.proj.weight"
    torch.testing.assert_close(found[name], start[name])
    assert found["patch_embedding.weight"].shape == (128, 3, 1, 2, 2)
    with pytest.raises(ValueError, match="start: expected a tiny model's weights at none/"):
        train_teacher(dataclasses.replace(config, start="none"), tmp_path / "b")
    with pytest.raises(ValueError, match="model: expected one of tiny-1k, tiny-4k, got 'huge'"):
        TeacherConfig(model="huge")


def test_teacher_training_resumes_to_the_bit(tmp_path, monkeypatch):
    config = TeacherConfig(
        num_videos=3,
        steps=4,
        cooldown=2,
        warmup=1,
        batch_size=1,
        checkpoint_every=2,
        dtype="float32",
    )
    whole = train_teacher(config, tmp_path / "whole")
    part = tmp_path / "part"
    real = tiny.to_latents
    calls = []

    def stop_at_third(videos):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(videos)

    monkeypatch.setattr(tiny, "to_latents", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        train_teacher(config, part)
    monkeypatch.setattr(tiny, "to_latents", real)
    train_teacher(config, part)
    name = "transformer/diffusion_pytorch_model.safetensors"
    first, second = load_file(whole / name), load_file(part / name)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert json.loads((part / "training.json").read_text())["steps"] == 4


def test_a_resumed_teacher_s_log_has_each_step_once(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"step": step}) + "\n" for step in (50, 100, 150)))
    _cut(log, 100)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [50, 100]
    _cut(tmp_path / "none.jsonl", 0)
    assert not (tmp_path / "none.jsonl").exists()
