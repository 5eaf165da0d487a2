"""Stage 2: what trains, resuming to the bit, losses, averaging, NaN stop, data, refusals."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from helpers.tiny_wan import weights
from sla2_core.integrations.diffusers import apply_sla2
from sla2_core.training.data import collate
from sla2_core.training.stage2.objectives import draw_sigma, noisy_and_target
from sla2_core.training.stage2.train import (
    Stage2Config,
    TrainingStopped,
    autocast_dtype,
    train_stage2,
)

CONFIG = Stage2Config(
    steps=6,
    batch_size=4,
    learning_rate=1e-3,
    alpha_learning_rate=1e-2,
    checkpoint_every=2,
    warmup=1,
)


@pytest.fixture
def handle(wan, sla2_config):
    """Factory of handles on the same tiny Wan, low bit on."""
    return lambda **changes: apply_sla2(wan(), sla2_config(**({"precision": "int8"} | changes)))


def changed(handle, before):
    return {name for name, value in weights(handle).items() if not torch.equal(value, before[name])}


def kill_at(step):
    def progress(now, steps, metrics):
        if now == step:
            raise KeyboardInterrupt

    return progress


def test_trains_the_model_and_alpha_with_the_router_frozen(handle, data, tmp_path):
    h = handle()
    before, flags = weights(h), [p.requires_grad for p in h.transformer.parameters()]
    report = train_stage2(h, data, dataclasses.replace(CONFIG, steps=30), tmp_path)
    moved = changed(h, before)
    assert not any("router" in name for name in moved)
    assert {name for name in before if "mixing" in name} <= moved
    assert len(moved) > 0.9 * (len(before) - 4)
    assert np.mean(report.loss[-5:]) < np.mean(report.loss[:5])
    assert [p.requires_grad for p in h.transformer.parameters()] == flags
    again = handle()
    again.load(report.adapter)
    assert not changed(again, weights(h))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss": "distill", "ema": 0.9},
        {"accumulate": 2, "decay": "cosine"},
        {"lora_rank": 2, "ema": 0.5},
    ],
)
@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_killed_run_gives_the_same_weights_to_the_bit(handle, data, tmp_path, changes, step):
    config = dataclasses.replace(CONFIG, **changes)
    whole = handle()
    first = train_stage2(whole, data, config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_stage2(handle(), data, config, tmp_path / "parts", progress=kill_at(step))
    parts = handle()
    second = train_stage2(parts, data, config, tmp_path / "parts")
    assert (first.loss, first.grad_norm) == (second.loss, second.grad_norm)
    assert not changed(parts, weights(whole))
    assert sorted(p.name for p in (tmp_path / "parts").glob("*.safetensors")) == [
        "checkpoint-00000004.safetensors",
        "checkpoint-00000006.safetensors",
    ]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_accumulation_and_gradient_checkpointing_change_nothing_but_rounding(
    handle, data, tmp_path, checkpointing
):
    plain, other = handle(), handle()
    first = train_stage2(plain, data, CONFIG, tmp_path / "a")
    config = dataclasses.replace(CONFIG, accumulate=2, gradient_checkpointing=checkpointing)
    second = train_stage2(other, data, config, tmp_path / "b")
    np.testing.assert_allclose(first.loss, second.loss, rtol=1e-3)
    np.testing.assert_allclose(first.grad_norm[0], second.grad_norm[0], rtol=1e-4)


def test_distilling_at_full_attention_is_at_its_optimum(handle, data, tmp_path):
    """With every block selected the student is its own teacher."""
    h = handle(topk=1.0, precision="full")
    report = train_stage2(h, data, dataclasses.replace(CONFIG, loss="distill", steps=1), tmp_path)
    assert report.loss[0] < 1e-10
    assert (
        train_stage2(
            handle(), data, dataclasses.replace(CONFIG, loss="distill"), tmp_path / "b"
        ).loss[0]
        > 1e-6
    )


def test_frozen_groups(handle, data, tmp_path):
    h = handle()
    with pytest.raises(TypeError, match="handle: expected what apply_sla2 returns, got Linear;"):
        train_stage2(torch.nn.Linear(2, 2), data, CONFIG, tmp_path / "none")
    before = weights(h)
    train_stage2(h, data, dataclasses.replace(CONFIG, learning_rate=0.0), tmp_path / "a")
    assert changed(h, before) == {name for name in before if "mixing" in name}
    before = weights(h)
    train_stage2(h, data, dataclasses.replace(CONFIG, alpha_learning_rate=0.0), tmp_path / "b")
    assert not any(".processor." in name for name in changed(h, before))
    with pytest.raises(ValueError, match="expected something to train, got nothing"):
        train_stage2(
            h,
            data,
            dataclasses.replace(CONFIG, learning_rate=0.0, alpha_learning_rate=0.0),
            tmp_path / "c",
        )


def test_lora_trains_the_named_layers_alone_and_is_merged(handle, data, tmp_path):
    h = handle()
    before = weights(h)
    config = dataclasses.replace(CONFIG, lora_rank=2, lora_targets=("to_q", "to_v"))
    report = train_stage2(h, data, config, tmp_path)
    after = weights(h)
    assert set(after) == set(before)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    layers = {
        f"blocks.{i}.attn{j}.{x}.weight" for i in (0, 1) for j in (1, 2) for x in ("to_q", "to_v")
    }
    assert moved == layers | {name for name in before if "mixing" in name}
    for name in layers:
        assert torch.linalg.matrix_rank(after[name] - before[name], atol=1e-6) == 2
    again = handle()
    again.load(report.adapter)
    assert not changed(again, after)


def test_moving_average_is_what_is_saved(handle, data, tmp_path):
    plain, averaged = handle(), handle()
    train_stage2(plain, data, CONFIG, tmp_path / "a")
    train_stage2(averaged, data, dataclasses.replace(CONFIG, ema=1.0), tmp_path / "b")
    start, name = weights(handle()), "proj_out.weight"
    far = (weights(plain)[name] - start[name]).abs().max()
    near = (weights(averaged)[name] - start[name]).abs().max()
    assert 0 < near < far
    saved = handle()
    saved.load(tmp_path / "b" / "adapter")
    assert not changed(saved, weights(averaged))


@pytest.mark.parametrize(
    ("poison", "culprit"),
    [
        ("weight", r"the weight blocks\.1\.ffn\.net\.2\.bias"),
        ("activation", r"blocks\.1\.ffn"),
    ],
)
def test_nan_stops_with_step_layer_and_checkpoint(handle, data, tmp_path, poison, culprit):
    h = handle()

    def spoil(step, steps, metrics):
        if step == 3 and poison == "weight":
            with torch.no_grad():
                h.transformer.blocks[1].ffn.net[2].bias.fill_(float("nan"))
        if step == 3 and poison == "activation":
            h.transformer.blocks[1].ffn.register_forward_hook(lambda m, x, y: y * float("inf"))

    with pytest.raises(
        TrainingStopped, match=rf"step 4: loss nan.*in {culprit}; last good.*checkpoint-00000002"
    ):
        train_stage2(h, data, CONFIG, tmp_path, progress=spoil)


def test_nan_in_the_data_is_named_wherever_in_the_batch_it_is(handle, data, tmp_path):
    latents, text = data
    for what, spoilt in (
        ("latents", (latents.clone().index_fill_(0, torch.tensor(2), float("nan")), text)),
        (
            "encoder_hidden_states",
            (latents, text.clone().index_fill_(0, torch.tensor(2), float("inf"))),
        ),
    ):
        with pytest.raises(
            TrainingStopped, match=rf"first not finite in the data's {what}; last good"
        ):
            train_stage2(
                handle(),
                spoilt,
                dataclasses.replace(CONFIG, steps=40, accumulate=4),
                tmp_path / what,
            )


def test_a_nan_that_clipping_spread_names_no_weight(handle, data, tmp_path):
    h = handle()
    h.transformer.blocks[0].ffn.net[2].weight.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(
        TrainingStopped, match=r"step 1: loss .* first not finite in the gradients; last good"
    ):
        train_stage2(h, data, CONFIG, tmp_path)


def test_a_stopped_run_with_lora_goes_on_with_the_same_handle(handle, data, tmp_path):
    config, h = dataclasses.replace(CONFIG, lora_rank=2), handle()
    whole = handle()
    train_stage2(whole, data, config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_stage2(h, data, config, tmp_path / "run", progress=kill_at(3))
    train_stage2(h, data, config, tmp_path / "run")
    assert not changed(h, weights(whole))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"learning_rate": "1e-5"},
            r"learning_rate: expected a number >= 0, got '1e-5'",
        ),  # as YAML reads 1e-5
        ({"alpha_learning_rate": -1.0}, "alpha_learning_rate: expected a number >= 0, got -1.0"),
        ({"grad_clip": 0.0}, "grad_clip: expected a number > 0, got 0.0"),
        ({"shift": -3.0}, "shift: expected a number > 0, got -3.0"),
        ({"beta2": 1.0}, r"beta2: expected a number in \[0, 1\), got 1.0"),
        ({"warmup": -1}, "warmup: expected an integer >= 0, got -1"),
        ({"lora_rank": 0}, "lora_rank: expected an integer >= 1, got 0"),
        ({"lora_targets": "to_q"}, "lora_targets: expected a list of names, got 'to_q'"),
        ({"caption_dropout": None}, r"caption_dropout: expected a number in \[0, 1\], got None"),
        ({"tensorboard": 1}, "tensorboard: expected True or False, got 1"),
    ],
)
def test_settings_out_of_range_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        Stage2Config(**changes)


def test_refusals(handle, data, tmp_path):
    disabled = handle()
    disabled.disable()
    with pytest.raises(ValueError, match="handle: expected SLA2 enabled, got it disabled"):
        train_stage2(disabled, data, CONFIG, tmp_path / "disabled")
    train_stage2(handle(), data, dataclasses.replace(CONFIG, steps=1), tmp_path)
    with pytest.raises(ValueError, match=r"stage2.json: expected steps=6 as given, got 1"):
        train_stage2(handle(), data, CONFIG, tmp_path)
    with pytest.raises(
        ValueError, match=r"batch_size: expected a multiple of processes x accumulate = 3, got 4"
    ):
        train_stage2(handle(), data, dataclasses.replace(CONFIG, accumulate=3), tmp_path / "a")
    with pytest.raises(ValueError, match="as many latents as texts"):
        train_stage2(handle(), (data[0], data[1][:3]), CONFIG, tmp_path / "a")
    with pytest.raises(TypeError, match=r"data: expected .* got int"):
        train_stage2(handle(), 3, CONFIG, tmp_path / "a")
    with pytest.raises(ValueError, match="loss: expected one of diffusion, distill, got 'l1'"):
        Stage2Config(loss="l1")
    checkpoint = tmp_path / "checkpoint-00000001.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(
        ValueError, match=r"checkpoint-00000001.safetensors: expected a readable safetensors file"
    ):
        train_stage2(handle(), data, dataclasses.replace(CONFIG, steps=1), tmp_path)


def test_noise_levels_follow_the_scheduler_shift():
    from diffusers import FlowMatchEulerDiscreteScheduler

    rng = np.random.default_rng(0)
    uniform = draw_sigma(rng, 20000, "uniform", 3.0)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(1000)
    expected = scheduler.sigmas[:-1].flip(0)
    quantiles = torch.quantile(uniform, torch.linspace(0.001, 1, 1000))
    torch.testing.assert_close(quantiles, expected, atol=0.02, rtol=0.0)
    normal = draw_sigma(np.random.default_rng(0), 20000, "logit_normal", 1.0)
    assert abs(float(torch.logit(normal).std()) - 1) < 0.02


@pytest.mark.parametrize("kind", ["uniform", "logit_normal"])
@pytest.mark.parametrize("between", [(0.9, 1.0), (0.0, 0.9), (0.3, 0.35)])
def test_levels_of_an_expert_are_those_of_the_whole_between_its_ends(kind, between):
    whole = draw_sigma(np.random.default_rng(0), 400_000, kind, 3.0)
    inside = whole[(whole >= between[0]) & (whole <= between[1])]
    found = draw_sigma(np.random.default_rng(1), 20_000, kind, 3.0, between)
    assert between[0] <= found.min()
    assert found.max() <= between[1]
    places = torch.linspace(0.01, 0.99, 50)
    far = torch.quantile(found, places) - torch.quantile(inside[:20_000], places)
    assert far.abs().max() < 0.05 * (between[1] - between[0])


def test_objectives():
    clean, noise = torch.randn(2, 5, 3).unbind(0)
    sigma = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    noisy, target = noisy_and_target(clean, noise, sigma)
    torch.testing.assert_close(noisy - sigma[:, None] * target, clean)
    alphas = torch.tensor([0.9, 0.7, 0.4, 0.2, 0.0])
    noisy, target = noisy_and_target(clean, noise, sigma, alphas)
    signal, spread = alphas.sqrt()[:, None], (1 - alphas).sqrt()[:, None]
    torch.testing.assert_close(signal * noisy - spread * target, clean)
    torch.testing.assert_close(spread * noisy + signal * target, noise)


@pytest.mark.parametrize("native", [True, False])
def test_auto_computes_in_bfloat16_where_the_processor_does(
    handle, data, tmp_path, monkeypatch, native
):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    cpu = torch.device("cpu")
    assert autocast_dtype("auto", cpu) == (torch.bfloat16 if native else None)
    assert autocast_dtype(None, cpu) is None
    assert autocast_dtype("float16", cpu) is torch.float16
    short = dataclasses.replace(CONFIG, steps=1)
    losses = {}
    for name in ("auto", "bfloat16", None):
        config = dataclasses.replace(short, autocast=name)
        losses[name] = train_stage2(handle(), data, config, tmp_path / str(name)).loss
    assert losses["auto"] == losses["bfloat16" if native else None]
    assert losses["auto"] != losses[None if native else "bfloat16"]


def test_dropped_conditions():
    items = [{"latents": torch.ones(2), "encoder_hidden_states": torch.ones(3)} for _ in range(2)]
    out = collate(items, [True, False], None)
    assert out["encoder_hidden_states"].sum(1).tolist() == [0, 3]
    assert out["latents"].sum(1).tolist() == [2, 2]
    out = collate(items, [True, False], {"encoder_hidden_states": torch.full((3,), 7.0)})
    assert out["encoder_hidden_states"].sum(1).tolist() == [21, 3]
    with pytest.raises(ValueError, match="data: expected one shape for latents"):
        collate([items[0], items[1] | {"latents": torch.ones(3)}], [False, False], None)
    with pytest.raises(ValueError, match="data: expected the keys"):
        collate([items[0], {"latents": torch.ones(2)}], [False, False], None)
