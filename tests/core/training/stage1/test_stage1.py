"""Stage 1: the soft operator by rows, learning, early stop, resuming to the bit, the report,
sharing, refusals.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import tiny_wan
from sla2_core import SLA2Attention, build_attention
from sla2_core.attend import Parts
from sla2_core.block_map import BlockMap
from sla2_core.integrations.diffusers import apply_sla2
from sla2_core.reference import full_attention, routed_mass
from sla2_core.training.capture import Captured, Captures, capture, record
from sla2_core.training.stage1.soft import Call, calls
from sla2_core.training.stage1.train import Stage1Config, load_stage1, train_router, train_stage1

CONFIG = Stage1Config(
    topk=(0.2, 0.5), steps=12, rows=4, eval_every=4, checkpoint_every=4, eval_rows=None
)


@pytest.fixture
def prepared(wan, inputs, sla2_config, tmp_path):
    """(handle factory, captures): sharp attention, so that routing matters."""

    def make(seed=0, **changes):
        transformer = wan(seed=seed)
        with torch.no_grad():
            for block in transformer.blocks:
                block.attn1.norm_q.weight.fill_(4.0)
        # In raster order 40 steps on two random samples are enough to learn from.
        return apply_sla2(transformer, sla2_config(**{"token_order": "raster"} | changes))

    handle = make()
    captures = capture(
        handle, lambda i: handle.transformer(**inputs(seed=i)), tmp_path / "captures", samples=3
    )
    return make, captures


def parts_of(attention):
    return Parts(attention.complement, attention.mixing)


def values(handle):
    return {name: value.detach().clone() for name, value in handle.adapter_tensors().items()}


@pytest.mark.parametrize("alpha", ["position", "mass"])
def test_rows_and_heads_put_together_are_the_whole(prepared, alpha):
    make, captures = prepared
    attention = make(alpha=alpha, per_head_router=True).attentions[0]
    captured = captures.load(captures.calls[0])
    rows = torch.arange(6)
    whole = Call(captured, attention.config, slice(None))
    scores = whole.scores(attention.router, rows)
    mask = whole.soft_mask(attention.router, scores, 0.3)
    out, full = whole.attend(rows, scores, mask, parts_of(attention))
    torch.testing.assert_close(
        full, full_attention(captured.q, captured.k, captured.v), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(mask.sum(-1), torch.full((2, 2, 6), 3.0))
    parts = []
    for call, share in calls(captured, attention.config, 2, max_scores=1):
        assert share == 0.5
        pieces = []
        for some in (torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([4, 5])):
            s = call.scores(attention.router, some)
            m = call.soft_mask(attention.router, s, 0.3)
            pieces.append(call.attend(some, s, m, parts_of(attention))[0])
        parts.append(torch.cat(pieces, 2))
    torch.testing.assert_close(torch.cat(parts, 1), out, atol=1e-6, rtol=1e-5)


def test_block_masses_are_the_routed_mass(prepared):
    make, captures = prepared
    captured = captures.load(captures.calls[0])
    call = Call(captured, make().config, slice(None))
    rows = torch.arange(6)
    masses = call.block_masses(rows)
    torch.testing.assert_close(masses.sum(-1), torch.ones(2, 2, 6))
    mask = call.hard_mask(make().attentions[0].router, masses, 0.3)
    assert (mask.sum(-1) == 3).all()
    block_map = BlockMap.from_mask(mask, block_q=8, block_k=5, n_q=45, n_k=45)
    per_token = routed_mass(captured.q, captured.k, block_map)
    torch.testing.assert_close((masses * mask).sum(-1)[..., 5], per_token[..., 40:].mean(-1))


def test_text_is_always_selected_and_padding_never(sla2_config):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 27, 12).unbind(0)
    captured = Captured(0, 0, 1.0, (0, 1), q, k, v, text_tokens=9, kv_lengths=(21,))
    call = Call(captured, sla2_config(block_q=8, block_k=4), slice(None))
    assert (
        call.forced.tolist() == [False] * 4 + [True] * 3
    )  # 18 video tokens: block 4 holds two of them and text
    scores = torch.randn(1, 2, 3, 7)
    attention = build_attention(sla2_config(block_q=8, block_k=4))
    hard = call.hard_mask(attention.router, scores, 0.5)
    soft = call.soft_mask(attention.router, scores, 0.5)
    assert hard[..., 4:6].all()
    assert not hard[..., 6].any()  # tokens 24 to 26 are padding
    assert (hard[..., :4].sum(-1) == 2).all()
    torch.testing.assert_close(soft[..., :4].sum(-1), torch.full((1, 2, 3), 2.0))
    out, full = call.attend(torch.arange(3), scores, torch.ones_like(soft), parts_of(attention))
    torch.testing.assert_close(out, full)
    torch.testing.assert_close(
        full, full_attention(q[:, :, :18], k, v, kv_lengths=[21]), atol=1e-5, rtol=1e-5
    )


def test_learns_and_reports_against_heuristic_and_oracle(prepared, tmp_path):
    make, captures = prepared
    handle = make()
    before = values(handle)
    report = train_stage1(handle, captures, dataclasses.replace(CONFIG, steps=40), tmp_path / "run")
    errors = [error for _, error in report.held_out]
    assert errors[-1] < 0.99 * errors[0]
    assert all(not torch.equal(value, before[name]) for name, value in values(handle).items())
    assert len(report.layers) == 4
    for line in report.layers:
        mass = line["mass"]
        assert 0 < mass["learned"] <= mass["oracle"] + 1e-6 < 1 + 1e-5
        assert mass["heuristic"] <= mass["oracle"] + 1e-6
        assert all(0 < error < 2 for error in line["error"].values())
    assert all(p.grad is None for p in handle.transformer.parameters())


def test_a_killed_run_gives_the_same_weights_to_the_bit(prepared, tmp_path):
    make, captures = prepared
    whole = make()
    first = train_stage1(whole, captures, CONFIG, tmp_path / "whole")

    def kill(step, steps, metrics):
        if step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_stage1(make(), captures, CONFIG, tmp_path / "parts", progress=kill)
    parts, steps = make(), []
    second = train_stage1(
        parts, captures, CONFIG, tmp_path / "parts", progress=lambda s, n, m: steps.append(s)
    )
    assert steps == list(range(5, 13))
    assert first == second
    for name, value in values(whole).items():
        assert torch.equal(value, values(parts)[name]), name
    assert (
        train_stage1(make(), captures, CONFIG, tmp_path / "parts", progress=kill).loss == first.loss
    )


def test_alpha_of_the_nearest_topk_is_loaded_and_runs_are_shared(prepared, tmp_path):
    make, captures = prepared
    train_stage1(make(), captures, CONFIG, tmp_path / "run")
    found = {}
    for topk in (0.1, 0.2, 0.9):
        handle = make(seed=4, topk=topk, precision="int8")
        load_stage1(handle, tmp_path / "run")
        found[topk] = values(handle)
    assert all(torch.equal(found[0.1][name], found[0.2][name]) for name in found[0.1])
    name = "layers.0.mixing.logit"
    assert not torch.equal(found[0.2][name], found[0.9][name])
    assert torch.equal(
        found[0.2]["layers.0.router.weight_q"], found[0.9]["layers.0.router.weight_q"]
    )


def test_early_stop(prepared, tmp_path):
    make, captures = prepared
    config = dataclasses.replace(
        CONFIG, steps=200, router_lr=1e-9, alpha_lr=1e-9, eval_every=2, patience=2
    )
    report = train_stage1(make(), captures, config, tmp_path / "run")
    assert report.stopped_early
    assert report.steps == 6


def test_heuristic_router_trains_alpha_alone_and_sla_nothing(prepared, tmp_path):
    make, captures = prepared
    heuristic = make(router="heuristic")
    before = values(heuristic)
    train_stage1(heuristic, captures, CONFIG, tmp_path / "heuristic")
    assert set(before) == {"layers.0.mixing.logit", "layers.1.mixing.logit"}
    assert not torch.equal(
        values(heuristic)["layers.0.mixing.logit"], before["layers.0.mixing.logit"]
    )
    assert train_stage1(make(**tiny_wan.SLA), captures, CONFIG, tmp_path / "sla").steps == 0
    assert (
        train_stage1(
            make(router="heuristic", alpha="one"), captures, CONFIG, tmp_path / "one"
        ).steps
        == 0
    )


def test_a_run_with_nothing_to_learn_goes_on_after_a_kill(prepared, tmp_path):
    make, captures = prepared
    run = tmp_path / "run"
    first = train_stage1(make(**tiny_wan.SLA), captures, CONFIG, run)
    (run / "report.json").unlink()  # killed between the checkpoint and the report
    assert train_stage1(make(**tiny_wan.SLA), captures, CONFIG, run) == first


def test_refusals(prepared, wan, sla2_config, tmp_path):
    make, captures = prepared
    train_stage1(make(), captures, dataclasses.replace(CONFIG, steps=1), tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"stage1.json: expected steps=\d+ as given, got 1; use a new folder"
    ):
        train_stage1(make(), captures, CONFIG, tmp_path / "run")
    with pytest.raises(ValueError, match="expected alpha='mass' as applied, got 'position'"):
        load_stage1(make(alpha="mass"), tmp_path / "run")
    with pytest.raises(
        ValueError, match="captures: expected captures of this WanTransformer3DModel"
    ):
        train_stage1(
            apply_sla2(wan(ffn_dim=48), sla2_config()), captures, CONFIG, tmp_path / "other"
        )
    with pytest.raises(FileNotFoundError, match=r"stage1.json: expected a JSON file, found none"):
        load_stage1(make(), tmp_path / "nothing")
    with pytest.raises(ValueError, match="topk: expected fractions"):
        Stage1Config(topk=(0.0,))
    with pytest.raises(ValueError, match="router_lr: expected a number >= 0, got '5e-3'"):
        Stage1Config(router_lr="5e-3")
    with pytest.raises(ValueError, match=r"holdout: expected a number in \[0, 1\), got 1.0"):
        Stage1Config(holdout=1.0)


def test_a_loss_that_is_not_finite_stops_with_step_and_layer(prepared, tmp_path):
    make, captures = prepared
    handle = make()
    with torch.no_grad():
        handle.attentions[1].router.weight_q.fill_(float("nan"))
    with pytest.raises(
        FloatingPointError,
        match="step 1, layer 1: the loss is nan; the last good checkpoint is none",
    ):
        train_stage1(handle, captures, CONFIG, tmp_path / "run")


def test_held_out_captures_that_are_not_finite_stop_it(prepared, tmp_path, monkeypatch):
    make, captures = prepared
    load, held = Captures.load, max(call["sample"] for call in captures.calls)

    def spoilt(self, call, device="cpu"):
        found = load(self, call, device)
        return (
            dataclasses.replace(found, q=found.q * float("nan"))
            if call["sample"] == held
            else found
        )

    monkeypatch.setattr(Captures, "load", spoilt)
    with pytest.raises(FloatingPointError, match="step 2, layer 0: the held-out error is nan"):
        train_stage1(make(), captures, dataclasses.replace(CONFIG, eval_every=2), tmp_path / "run")


class HandWritten(torch.nn.Module):
    """Two attention layers of a model that no family knows."""

    def __init__(self, config):
        super().__init__()
        self.qkv = torch.nn.ModuleList(torch.nn.Linear(24, 72) for _ in range(2))
        self.attention = torch.nn.ModuleList(SLA2Attention(config) for _ in range(2))

    def forward(self, x):
        for qkv, attention in zip(self.qkv, self.attention):
            q, k, v = (2 * qkv(x)).unflatten(-1, (3, 2, 12)).unbind(2)
            x = x + attention(q, k, v / 2, layout="bnhd").flatten(2)
        return x


def test_a_hand_written_model_trains_its_router_without_a_handle(sla2_config, tmp_path):
    torch.manual_seed(0)
    model = HandWritten(sla2_config(alpha_init=0.99))
    attentions = dict(enumerate(model.attention))

    def run(sample):
        return model(torch.randn(1, 45, 24, generator=torch.Generator().manual_seed(sample)))

    seen = []
    hook = model.attention[1].register_forward_hook(lambda m, args, out: seen.append((args, out)))
    captures = record(attentions, run, samples=3)
    hook.remove()
    (q, k, v), out = seen[0]
    turned = (x.transpose(1, 2) for x in (q, k, v))
    torch.testing.assert_close(out.transpose(1, 2), full_attention(*turned), atol=1e-5, rtol=1e-4)
    assert captures.layers == (0, 1)
    assert len(captures.calls) == 6
    before = {n: p.detach().clone() for n, p in model.attention.named_parameters()}
    report = train_router(
        attentions, captures, dataclasses.replace(CONFIG, steps=40), tmp_path / "run"
    )
    assert report.held_out[-1][1] < 0.99 * report.held_out[0][1]
    for name, parameter in model.attention.named_parameters():
        assert not torch.equal(parameter, before[name]), name
        assert parameter.requires_grad == (".router." not in name)
    with pytest.raises(ValueError, match="run: expected run\\(0\\) to call the attentions"):
        record(attentions, lambda sample: None, samples=1)
    with pytest.raises(ValueError, match="captures: expected calls of layer 2"):
        train_router({2: model.attention[0]}, captures, CONFIG, tmp_path / "other")
    other = SLA2Attention(sla2_config(topk=0.5, alpha_init=0.99))
    with pytest.raises(ValueError, match="attentions: expected modules of one configuration"):
        train_router({0: model.attention[0], 1: other}, captures, CONFIG, tmp_path / "two")
