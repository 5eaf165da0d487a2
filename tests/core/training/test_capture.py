"""Capture: what is recorded, sampling, bounded size, resuming, refusals."""

from __future__ import annotations

import json

import pytest
import torch
from sla2_core.integrations.diffusers import apply_sla2
from sla2_core.training.capture import CaptureConfig, Captures, capture


def runner(handle, inputs, calls=None):
    def run(sample):
        if calls is not None:
            calls.append(sample)
        data = inputs(seed=sample)
        for t in (900.0, 500.0, 100.0):
            handle.transformer(**data | {"timestep": torch.full((2,), t)}, return_dict=False)

    return run


def test_what_is_recorded_is_what_attention_saw_in_full_attention(
    wan, inputs, sla2_config, tmp_path
):
    handle = apply_sla2(wan(), sla2_config())
    expected = []
    handle_run = runner(handle, inputs)
    with (
        torch.no_grad(),
        handle.recording(lambda layer, q, k, v, *_: expected.append((layer, q, k, v))),
    ):
        handle_run(0)
    found = list(capture(handle, handle_run, tmp_path, samples=1))
    assert [c.layer for c in found] == [0, 1, 0, 1, 0, 1]
    assert [c.timestep for c in found] == [900, 900, 500, 500, 100, 100]
    for captured, (layer, *tensors) in zip(found, expected):
        assert captured.layer == layer
        for x, y in zip((captured.q, captured.k, captured.v), tensors):
            assert torch.equal(x, y)
    assert handle.enabled


def test_samples_layers_heads_and_forwards(wan, inputs, sla2_config, tmp_path):
    handle = apply_sla2(wan(num_layers=3), sla2_config())
    config = CaptureConfig(layers_per_sample=1, heads=1, every=3, dtype="bfloat16", seed=1)
    found = list(capture(handle, runner(handle, inputs), tmp_path, samples=12, config=config))
    assert len(found) == 12
    assert {c.layer for c in found} == {0, 1, 2}
    assert {c.heads for c in found} == {(0,), (1,)}
    assert {c.timestep for c in found} == {900, 500, 100}
    assert found[0].q.shape == (2, 1, 45, 12)
    assert found[0].q.dtype == torch.bfloat16


def test_goes_on_where_it_was_and_gives_the_same_bytes(wan, inputs, sla2_config, tmp_path):
    handle = apply_sla2(wan(), sla2_config())
    hooks = list(handle.transformer._forward_pre_hooks)
    capture(handle, runner(handle, inputs), tmp_path / "whole", samples=3)
    capture(handle, runner(handle, inputs), tmp_path / "parts", samples=1)
    with pytest.raises(KeyboardInterrupt):
        capture(
            handle,
            lambda i: (_ for _ in ()).throw(KeyboardInterrupt),
            tmp_path / "parts",
            samples=3,
        )
    assert handle.enabled
    assert list(handle.transformer._forward_pre_hooks) == hooks
    calls, seen = [], []
    capture(
        handle,
        runner(handle, inputs, calls),
        tmp_path / "parts",
        samples=3,
        progress=lambda *p: seen.append(p),
    )
    assert calls == [1, 2]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    names = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "parts").iterdir())
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_ends_before_the_bound(wan, inputs, sla2_config, tmp_path):
    handle = apply_sla2(wan(), sla2_config())
    one = 3 * 2 * 3 * 2 * 45 * 24 * 4  # forwards, layers, qkv, batch, tokens, channels, bytes
    captures = capture(
        handle,
        runner(handle, inputs),
        tmp_path,
        samples=5,
        config=CaptureConfig(max_bytes=2 * one + 1),
    )
    assert (len(captures.samples), captures.bytes, captures.full) == (2, 2 * one, True)
    with pytest.raises(
        ValueError, match=f"max_bytes: expected room for one sample of {one} bytes, got 7"
    ):
        capture(
            handle,
            runner(handle, inputs),
            tmp_path / "b",
            samples=1,
            config=CaptureConfig(max_bytes=7),
        )


def test_refusals(wan, inputs, sla2_config, tmp_path):
    handle = apply_sla2(wan(), sla2_config())
    run = runner(handle, inputs)
    capture(handle, run, tmp_path, samples=1)
    with pytest.raises(
        ValueError, match=r"index.json: expected seed=1 as given, got 0; use a new folder"
    ):
        capture(handle, run, tmp_path, samples=1, config=CaptureConfig(seed=1))
    with pytest.raises(ValueError, match=r"layers: expected layers among \[0, 1\], got 5"):
        capture(handle, run, tmp_path / "a", samples=1, config=CaptureConfig(layers=(5,)))
    with pytest.raises(ValueError, match=r"run: expected run\(0\) to call the transformer"):
        capture(handle, lambda i: None, tmp_path / "b", samples=1)
    with pytest.raises(ValueError, match="every: expected an integer >= 1, got 0"):
        CaptureConfig(every=0)
    with pytest.raises(FileNotFoundError, match=r"index.json: expected a JSON file, found none"):
        Captures(tmp_path / "nowhere")
    shard = tmp_path / "capture-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"capture-00000.safetensors: expected a readable shard"):
        list(Captures(tmp_path))
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="expected a shard of the index"):
        list(Captures(tmp_path))
    (tmp_path / "index.json").write_text(json.dumps({"format_version": 7}))
    with pytest.raises(ValueError, match="expected format_version 1, got 7"):
        Captures(tmp_path)
