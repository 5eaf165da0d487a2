"""A folder of mp4 files through tiny random pipelines: cached latents and conditions, resuming,
broken videos, refusals.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import families, pipelines
from PIL import Image
from sla2_core.integrations.diffusers import apply_sla2
from sla2_core.training.stage2.train import Stage2Config, train_stage2
from sla2_eval.videos.dataset import captioned_files, read_frames, write_folder
from sla2_eval.videos.encoding import check_videos, encode_folder

CAPTIONS = ["a red circle", "a blue square moving"]
SIZE = dict(num_frames=5, height=32, width=48)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    videos = rng.integers(0, 255, (2, 9, 64, 64, 3), dtype=np.uint8)
    write_folder(tmp_path / "videos", zip(videos, CAPTIONS), fps=8)
    return tmp_path / "videos"


def mode(pipe, folder, size):
    """The mode of the VAE's posterior of the first video."""
    frames = read_frames(captioned_files(folder)[0][0], **size)
    pixels = torch.as_tensor(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        return pipe.vae.encode(
            pixels[:, :, 0] if type(pipe).__name__ == "FluxPipeline" else pixels
        ).latent_dist.mode()


def raw(pipe, latents, size):
    """Latents as the pipeline hands them to its VAE's decoder."""
    config, name = pipe.vae.config, type(pipe).__name__
    if name == "WanPipeline":
        return latents * torch.tensor(config.latents_std).view(-1, 1, 1, 1) + torch.tensor(
            config.latents_mean
        ).view(-1, 1, 1, 1)
    if name == "FluxPipeline":
        whole = pipe._unpack_latents(
            latents[None], size["height"], size["width"], pipe.vae_scale_factor
        )[0]
        return whole / config.scaling_factor + config.shift_factor
    latents = latents.transpose(0, 1) if name == "CogVideoXPipeline" else latents
    return latents / config.scaling_factor


@pytest.mark.parametrize(
    ("name", "size", "latents", "text"),
    [
        ("wan", SIZE, (16, 2, 4, 6), {"encoder_hidden_states": (512, 8)}),
        (
            "hunyuan_video",
            SIZE,
            (4, 2, 4, 6),
            {
                "encoder_hidden_states": (256, 8),
                "pooled_projections": (6,),
                "encoder_attention_mask": (256,),
            },
        ),
        (
            "hunyuan_video15",
            SIZE | {"height": 64, "width": 96},
            (4, 2, 4, 6),
            {
                "encoder_hidden_states": (7, 8),
                "encoder_attention_mask": (7,),
                "encoder_hidden_states_2": (4, 8),
                "encoder_attention_mask_2": (4,),
            },
        ),
        ("cogvideox", SIZE, (2, 4, 4, 6), {"encoder_hidden_states": (226, 8)}),
        (
            "flux",
            {"num_frames": 1, "height": 16, "width": 24},
            (24, 8),
            {"encoder_hidden_states": (512, 8), "pooled_projections": (6,), "txt_ids": (512, 3)},
        ),
    ],
)
def test_every_family_trains_on_what_its_pipeline_encodes(
    folder, tmp_path, name, size, latents, text
):
    pipe = getattr(pipelines, name)()
    data = encode_folder(folder, pipe, tmp_path / "cache", **size)
    sample = data[0]
    assert sample["latents"].shape == latents
    assert {key: tuple(sample[key].shape) for key in text} == text
    assert {key: tuple(value.shape) for key, value in data.unconditional.items()} == text
    assert not torch.equal(sample["encoder_hidden_states"], data[1]["encoder_hidden_states"])
    torch.testing.assert_close(
        raw(pipe, sample["latents"], size), mode(pipe, folder, size)[0], atol=1e-5, rtol=1e-5
    )
    pipe.vae = pipe.text_encoder = None  # nothing is encoded again
    with pytest.raises(
        ValueError, match=r"^pipe: expected a \w+ with its (vae|text_encoder), got none$"
    ):
        encode_folder(folder, pipe, tmp_path / "other", **size)
    data = encode_folder(folder, pipe, tmp_path / "cache", **size)
    changes = {"topk": 0.5, "block_q": 4, "block_k": 2, "precision": "int8"}
    handle = apply_sla2(pipe.transformer, families.config(pipe.transformer, **changes))
    report = train_stage2(
        handle, data, Stage2Config(steps=1, batch_size=2, caption_dropout=0.5), tmp_path / "run"
    )
    assert np.isfinite(report.loss[0])


@pytest.mark.parametrize("kind", ["2.1", "2.1 both frames", "2.2"])
def test_image_to_video_gets_the_condition_that_its_pipeline_makes(folder, tmp_path, kind):
    pipe = pipelines.wan_image(kind)
    data = encode_folder(folder, pipe, tmp_path / "cache", **SIZE)
    frames = read_frames(captioned_files(folder)[0][0], **SIZE)
    seen = {}
    own = pipe.transformer.forward

    def forward(hidden_states, encoder_hidden_states_image=None, **given):
        seen["x"], seen["image"] = hidden_states, encoder_hidden_states_image
        return own(hidden_states, encoder_hidden_states_image=encoder_hidden_states_image, **given)

    pipe.transformer.forward = forward
    pipe.set_progress_bar_config(disable=True)
    pipe(
        image=Image.fromarray(frames[0]),
        last_image=Image.fromarray(frames[-1]) if "both" in kind else None,
        prompt=CAPTIONS[0],
        num_inference_steps=1,
        guidance_scale=1.0,
        output_type="latent",
        **SIZE,
    )
    pipe.transformer.forward = own
    sample = data[0]
    torch.testing.assert_close(sample["image_latents"], seen["x"][0, 16:], atol=1e-4, rtol=1e-4)
    if kind != "2.2":
        embeds = seen["image"].flatten(0, 1)
        torch.testing.assert_close(
            sample["encoder_hidden_states_image"], embeds, atol=1e-4, rtol=1e-4
        )
    changes = {"topk": 0.5, "block_q": 4, "block_k": 2}
    handle = apply_sla2(pipe.transformer, families.config(pipe.transformer, **changes))
    report = train_stage2(handle, data, Stage2Config(steps=1, batch_size=2), tmp_path / "run")
    assert np.isfinite(report.loss[0])


@pytest.fixture
def pipe():
    """A WanPipeline whose text encoder is a stand-in: embeddings that tell the caption's length."""
    found = pipelines.wan()
    found.encode_prompt = lambda caption, **_: (torch.full((1, 4, 6), float(len(caption))), None)
    return found


def test_captions_and_the_empty_one_are_kept_apart(folder, tmp_path, pipe):
    data = encode_folder(folder, pipe, tmp_path / "cache", **SIZE)
    assert [float(data[i]["encoder_hidden_states"][0, 0]) for i in range(2)] == [
        len(text) for text in CAPTIONS
    ]
    assert float(data.unconditional["encoder_hidden_states"].sum()) == 0.0


def test_a_broken_video_or_missing_caption_is_named_and_nothing_is_lost(folder, tmp_path, pipe):
    (folder / "00001.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"00001\.mp4"):
        encode_folder(folder, pipe, tmp_path / "cache", **SIZE)
    assert (tmp_path / "cache" / "000000.safetensors").exists()
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(
        ValueError, match=r"00000\.mp4: expected a caption in 00000\.txt or metadata.jsonl"
    ):
        encode_folder(folder, pipe, tmp_path / "other", **SIZE)


def test_a_corrected_caption_is_noticed(folder, tmp_path, pipe):
    encode_folder(folder, pipe, tmp_path / "cache", **SIZE)
    check_videos(folder, tmp_path / "cache")
    manifest = folder / "metadata.jsonl"
    manifest.write_text(manifest.read_text().replace(CAPTIONS[1], "another"))
    with pytest.raises(ValueError, match=r"plan.json: expected 00001.mp4 as it was encoded"):
        check_videos(folder, tmp_path / "cache")
    with pytest.raises(ValueError, match=r"plan.json: expected 00001.mp4 as it was encoded"):
        encode_folder(folder, pipe, tmp_path / "cache", **SIZE)


def named(name, **parts):
    return type(name, (SimpleNamespace,), {})(**parts)


@pytest.mark.parametrize(
    ("pipe", "message"),
    [
        (object(), "expected one of WanPipeline, .*, got object"),
        (
            named("LTX2Pipeline"),
            ".*, got LTX2Pipeline, whose transformer also takes the latents of a sound track",
        ),
        (
            named("WanImageToVideoPipeline", transformer=None),
            "expected a WanImageToVideoPipeline with its transformer, whose configuration says",
        ),
        (
            named("CogVideoXPipeline", transformer=None),
            (
                "expected a CogVideoXPipeline with its transformer, whose configuration gives the"
                " rotary embedding, got none"
            ),
        ),
    ],
)
def test_other_pipelines_are_refused_in_one_line(folder, tmp_path, pipe, message):
    with pytest.raises(ValueError, match=f"^pipe: {message}") as error:
        encode_folder(folder, pipe, tmp_path / "cache", **SIZE)
    assert "\n" not in str(error.value)


def test_sizes_that_do_not_fit_the_model_are_refused(folder, tmp_path):
    with pytest.raises(
        ValueError, match="num_frames: expected 1 for FluxPipeline, a model of images, got 5"
    ):
        encode_folder(folder, pipelines.flux(), tmp_path / "flux", **SIZE)
    deep = pipelines.cogvideox(patch_size_t=2, patch_bias=False, sample_frames=9)
    with pytest.raises(
        ValueError, match=r"num_frames: expected latent frames that 2 divides.* got 3 from 9 frames"
    ):
        encode_folder(folder, deep, tmp_path / "cog", **SIZE | {"num_frames": 9})


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ({"num_frames": 6}, r"video.num_frames: expected 1 more than a multiple of \d+, got 6"),
        ({"height": 33}, r"video.height: expected a multiple of \d+, got 33"),
        ({"width": 21}, r"video.width: expected a multiple of \d+, got 21"),
    ],
)
def test_a_size_that_the_pipeline_would_cut_is_refused(folder, tmp_path, size, words):
    with pytest.raises(ValueError, match=f"^{words}$"):
        encode_folder(folder, pipelines.wan(), tmp_path / "cache", **{**SIZE, **size})
    assert not (tmp_path / "cache").exists()
