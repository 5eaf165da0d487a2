"""apply_sla2 on a tiny random Wan: equivalence with full attention, switching, dtypes, gradients,
refusals.
"""

from __future__ import annotations

import pytest
import torch
from helpers import tiny_wan
from sla2_core.integrations.diffusers import apply_sla2
from sla2_core.integrations.families.wan import WanSelfAttnProcessor


def forward(transformer, inputs):
    return transformer(**inputs, return_dict=False)[0]


@pytest.mark.parametrize("fused", [False, True])
def test_every_block_with_alpha_one_is_the_original(wan, inputs, sla2_config, fused):
    transformer = wan()
    with torch.no_grad():
        expected = forward(transformer, inputs())
        if fused:
            transformer.fuse_qkv_projections()
        apply_sla2(transformer, sla2_config(topk=1.0, alpha="one"))
        torch.testing.assert_close(forward(transformer, inputs()), expected, atol=2e-6, rtol=1e-5)


def test_sla2_changes_the_output_and_disable_restores_it_to_the_bit(wan, inputs, sla2_config):
    transformer = wan()
    with torch.no_grad():
        expected = forward(transformer, inputs())
        handle = apply_sla2(transformer, sla2_config())
        routed = forward(transformer, inputs())
        with handle.disabled():
            assert torch.equal(forward(transformer, inputs()), expected)
        assert torch.equal(forward(transformer, inputs()), routed)
        handle.disable()
        assert torch.equal(forward(transformer, inputs()), expected)
        handle.enable()
        handle.remove()
        assert torch.equal(forward(transformer, inputs()), expected)
    assert (routed - expected).abs().max() > 1e-3
    assert not any("processor" in name for name in transformer.state_dict())


def test_rope_is_applied_before_routing(wan, inputs, sla2_config):
    """Recorded Q and K give, by plain softmax attention, the very input of the output
    projection.
    """
    transformer = wan()
    handle = apply_sla2(transformer, sla2_config())
    seen, projected = {}, {}
    hook = (
        transformer.blocks[1]
        .attn1.to_out[0]
        .register_forward_pre_hook(lambda m, x: projected.update(x=x[0]))
    )
    with (
        torch.no_grad(),
        handle.recording(lambda layer, q, k, v, *_: seen.update({layer: (q, k, v)})),
    ):
        forward(transformer, inputs())
    q, k, v = seen[1]
    weights = torch.softmax(q @ k.transpose(-1, -2) / 12**0.5, -1)
    hook.remove()
    torch.testing.assert_close(
        (weights @ v).transpose(1, 2).flatten(2), projected["x"], atol=1e-5, rtol=1e-4
    )


def test_parameters_are_in_the_state_dict_and_stay_fp32(wan, inputs, sla2_config):
    transformer = wan()
    handle = apply_sla2(transformer, sla2_config())
    transformer.to(torch.bfloat16)
    groups = handle.parameters()
    assert {name: len(group) for name, group in groups.items() if name != "model"} == {
        "router": 4,
        "alpha": 2,
        "proj": 0,
    }
    assert all(p.dtype == torch.float32 for name in ("router", "alpha") for p in groups[name])
    assert transformer.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert "blocks.1.attn1.processor.attention.router.weight_k" in transformer.state_dict()
    assert sum(len(group) for group in groups.values()) == len(list(transformer.parameters()))
    data = {k: v.to(torch.bfloat16) if k != "timestep" else v for k, v in inputs().items()}
    assert forward(transformer, data).dtype == torch.bfloat16


def test_state_dict_round_trip_through_save_pretrained(wan, inputs, sla2_config, tmp_path):
    from safetensors.torch import load_file

    transformer = wan()
    apply_sla2(transformer, sla2_config())
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if ".processor." in name:
                parameter.add_(torch.randn_like(parameter))
        expected = forward(transformer, inputs())
    transformer.save_pretrained(tmp_path)
    again = wan(seed=3)
    apply_sla2(again, sla2_config())
    again.load_state_dict(load_file(tmp_path / "diffusion_pytorch_model.safetensors"))
    with torch.no_grad():
        assert torch.equal(forward(again, inputs()), expected)


@pytest.mark.parametrize(
    ("changes", "learns"),
    [
        ({}, {"alpha", "model"}),
        ({"alpha": "mass"}, {"alpha", "model"}),
        (tiny_wan.SLA, {"proj", "model"}),
        ({"alpha": "one", "router": "heuristic"}, {"model"}),
    ],
    ids=["position", "mass", "sla", "one"],
)
def test_gradients_reach_what_should_learn_and_nothing_else(
    wan, inputs, sla2_config, changes, learns
):
    """A hard block map passes no gradient to the router, which requires one in stage 1 alone."""
    transformer = wan()
    handle = apply_sla2(transformer, sla2_config(**changes))
    forward(transformer, inputs()).square().mean().backward()
    for group, parameters in handle.parameters().items():
        reached = [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in parameters]
        if group == "model":
            assert sum(reached) > 0.9 * len(reached)
        else:
            assert all(r == (group in learns) for r in reached), group


def test_skip_layers_keep_their_processor(wan, sla2_config):
    transformer = wan()
    original = transformer.blocks[1].attn1.processor
    handle = apply_sla2(transformer, sla2_config(), skip_layers=[-1])
    assert handle.layers == (0,)
    assert transformer.blocks[1].attn1.processor is original


def test_dense_steps_are_counted_by_timestep_and_start_anew_with_each_video(
    wan, inputs, sla2_config
):
    transformer = wan()
    data = inputs()
    with torch.no_grad():
        dense = {
            t: forward(transformer, data | {"timestep": torch.full((2,), t)})
            for t in (900.0, 500.0, 100.0)
        }
        apply_sla2(transformer, sla2_config(), dense_steps=2)
        for _video in range(2):
            for t, is_dense in ((900.0, True), (500.0, True), (100.0, False)):
                for _guidance in range(2):
                    out = forward(transformer, data | {"timestep": torch.full((2,), t)})
                    assert torch.equal(out, dense[t]) == is_dense, t


def test_configure_changes_topk_and_precision_of_every_layer(wan, inputs, sla2_config):
    transformer = wan()
    handle = apply_sla2(transformer, sla2_config())
    with torch.no_grad():
        first = forward(transformer, inputs())
        handle.configure(topk=0.6, precision="int8")
        assert not torch.equal(forward(transformer, inputs()), first)
        maps = handle.block_maps(lambda: forward(transformer, inputs()))
    assert set(maps) == {0, 1}
    assert maps[0].shape == (2, 2, 6, 9)
    assert int(maps[0].counts.max()) == 5
    with pytest.raises(ValueError, match="block_q: expected a field that may change"):
        handle.configure(block_q=16)


def test_dense_copy_is_frozen_and_apart(wan, inputs, sla2_config):
    transformer = wan()
    with torch.no_grad():
        expected = forward(transformer, inputs())
    handle = apply_sla2(transformer, sla2_config(), dense_steps=1)
    teacher = handle.dense_copy()
    with torch.no_grad():
        transformer.proj_out.weight.add_(1.0)
        assert torch.equal(forward(teacher, inputs()), expected)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert handle.enabled


def test_a_callable_in_the_middle_of_wan_attention(wan, inputs):
    transformer = wan()
    with torch.no_grad():
        expected = forward(transformer, inputs())
        for block in transformer.blocks:
            block.attn1.set_processor(WanSelfAttnProcessor(lambda q, k, v: torch.zeros_like(v)))
        assert not torch.allclose(forward(transformer, inputs()), expected, atol=1e-3)


def test_refusals_name_the_argument(wan, sla2_config):
    for changes, message in (
        ({"head_dim": 16}, r"config: expected head_dim=12 as in blocks\.0\.attn1, got 16"),
        ({"num_heads": 3}, r"config: expected num_heads=2 as in blocks\.0\.attn1, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            apply_sla2(wan(), sla2_config(**changes))
    with pytest.raises(ValueError, match=r"skip_layers: expected layer numbers in \[0, 2\), got 2"):
        apply_sla2(wan(), sla2_config(), skip_layers=[2])
    with pytest.raises(ValueError, match="skip_layers: expected at least one"):
        apply_sla2(wan(), sla2_config(), skip_layers=[0, 1])
    with pytest.raises(ValueError, match="dense_steps: expected an integer >= 0, got -1"):
        apply_sla2(wan(), sla2_config(), dense_steps=-1)
    with pytest.raises(
        ValueError, match=r"transformer: expected one of .*WanTransformer3DModel.*, got Linear"
    ):
        apply_sla2(torch.nn.Linear(2, 2), sla2_config())
    transformer = wan()
    apply_sla2(transformer, sla2_config())
    with pytest.raises(ValueError, match="transformer: expected a model without SLA2"):
        apply_sla2(transformer, sla2_config())
