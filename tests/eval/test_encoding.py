"""A folder of mp4 files through a tiny random Wan VAE: cached latents, resuming, broken videos and missing captions."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sla2_eval.dataset import write_folder
from sla2_eval.encoding import encode_folder


class WanPipeline:
    """What encode_folder uses of diffusers' class: a real VAE, and a stand-in for the text encoder."""

    def __init__(self):
        from diffusers import AutoencoderKLWan

        torch.manual_seed(0)
        self.vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
        self.text_encoder = SimpleNamespace(device=torch.device("cpu"))

    def encode_prompt(self, caption, do_classifier_free_guidance, device):
        return torch.full((1, 4, 6), float(len(caption))), None


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    videos = rng.integers(0, 255, (2, 9, 32, 48, 3), dtype=np.uint8)
    write_folder(tmp_path / "videos", zip(videos, ["one", "three"]), fps=8)
    return tmp_path / "videos"


SIZE = dict(num_frames=5, height=16, width=32)


def test_latents_and_text_are_cached(folder, tmp_path):
    pipe = WanPipeline()
    data = encode_folder(folder, pipe, tmp_path / "cache", **SIZE)
    assert len(data) == 2
    assert data[0]["latents"].shape == (16, 2, 2, 4)
    assert data[1]["encoder_hidden_states"].shape == (4, 6)
    assert [float(data[i]["encoder_hidden_states"][0, 0]) for i in range(2)] == [3.0, 5.0]
    assert float(data.unconditional["encoder_hidden_states"].sum()) == 0.0
    decoded = data[0]["latents"] * torch.tensor(pipe.vae.config.latents_std).view(-1, 1, 1, 1)
    decoded = decoded + torch.tensor(pipe.vae.config.latents_mean).view(-1, 1, 1, 1)
    assert torch.isfinite(decoded).all()
    pipe.vae = None  # nothing is encoded again
    assert torch.equal(encode_folder(folder, pipe, tmp_path / "cache", **SIZE)[0]["latents"], data[0]["latents"])


def test_a_broken_video_or_missing_caption_is_named_and_nothing_is_lost(folder, tmp_path):
    (folder / "00001.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"00001\.mp4"):
        encode_folder(folder, WanPipeline(), tmp_path / "cache", **SIZE)
    assert (tmp_path / "cache" / "000000.safetensors").exists()
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match=r"00000\.mp4: expected a caption in 00000\.txt or metadata.jsonl"):
        encode_folder(folder, WanPipeline(), tmp_path / "other", **SIZE)
    with pytest.raises(ValueError, match="pipe: expected a WanPipeline, got object"):
        encode_folder(folder, object(), tmp_path / "other", **SIZE)
