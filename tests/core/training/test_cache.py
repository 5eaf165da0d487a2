"""Encoded training data: once, resumable, other data refused, and read by stage 2."""

from __future__ import annotations

import pytest
import torch
from sla2_core.integrations.diffusers import apply_sla2
from sla2_core.training.cache import CachedData, encode_samples
from sla2_core.training.stage2.train import Stage2Config, train_stage2

NAMES = ["a.mp4", "b.mp4", "c.mp4"]


def encode(index):
    torch.manual_seed(index)
    return {"latents": torch.randn(4, 3, 6, 10), "encoder_hidden_states": torch.randn(5, 8)}


def empty():
    return {"encoder_hidden_states": torch.full((5, 8), 7.0)}


def test_encodes_once_goes_on_and_feeds_stage_2(wan, sla2_config, tmp_path):
    calls = []

    def counted(index):
        calls.append(index)
        if index == 2 and len(calls) == 3:
            raise ValueError("c.mp4: broken")
        return encode(index)

    given = dict(settings={"height": 6}, unconditional=empty)
    with pytest.raises(ValueError, match=r"c\.mp4: broken"):
        encode_samples(NAMES, counted, tmp_path / "cache", **given)
    with pytest.raises(FileNotFoundError, match=r"cache.json: expected a JSON file, found none"):
        CachedData(tmp_path / "cache")
    data = encode_samples(NAMES, counted, tmp_path / "cache", **given)
    assert calls == [0, 1, 2, 2]
    assert len(data) == 3
    for index in range(3):
        for name, value in encode(index).items():
            assert torch.equal(data[index][name], value)
    assert float(data.unconditional["encoder_hidden_states"][0, 0]) == 7.0
    handle = apply_sla2(wan(), sla2_config())
    report = train_stage2(
        handle, data, Stage2Config(steps=2, batch_size=2, caption_dropout=0.5), tmp_path / "run"
    )
    assert report.steps == 2


def test_other_data_or_settings_are_refused(tmp_path):
    encode_samples(NAMES, encode, tmp_path, settings={"height": 6})
    with pytest.raises(ValueError, match=r"plan.json: expected the settings given"):
        encode_samples(NAMES, encode, tmp_path, settings={"height": 8})
    with pytest.raises(ValueError, match=r"plan.json: expected the names given"):
        encode_samples(NAMES[:2], encode, tmp_path, settings={"height": 6})
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "cache.json").write_text('{"format_version": 2}')
    with pytest.raises(ValueError, match=r"cache.json: expected format_version 1, got 2"):
        CachedData(tmp_path / "later")
    path = tmp_path / "000001.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(
        ValueError, match=r"000001.safetensors: expected a readable safetensors file"
    ):
        CachedData(tmp_path)[1]


def test_a_changed_sample_is_encoded_again_until_the_folder_is_finished(tmp_path):
    calls = []

    def broken(index):
        calls.append(index)
        if index == 2:
            raise ValueError("c.mp4: broken")
        return encode(index)

    with pytest.raises(ValueError, match="broken"):
        encode_samples(NAMES, broken, tmp_path, settings={}, keys=["a", "b", "c"])

    def whole(index):
        calls.append(index)
        return encode(index)

    encode_samples(NAMES, whole, tmp_path, settings={}, keys=["a", "b2", "c2"])
    assert calls == [0, 1, 2, 1, 2]
    encode_samples(NAMES, whole, tmp_path, settings={}, keys=["a", "b2", "c2"])
    assert len(calls) == 5
    message = f"plan.json: expected {NAMES[0]} as it was encoded, got another file or caption"
    with pytest.raises(ValueError, match=message):
        encode_samples(NAMES, whole, tmp_path, settings={}, keys=["a2", "b2", "c2"])
