"""Every family on a tiny random model: equivalence, switching, gradients, state_dict, and the way
from capture to adapter.
"""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import families
from safetensors.torch import load_file
from sla2_core import SLA2Config
from sla2_core.integrations.diffusers import apply_sla2
from sla2_core.integrations.family import family_of
from sla2_core.integrations.loading import apply_adapter
from sla2_core.training.capture import capture
from sla2_core.training.stage1.train import Stage1Config, train_stage1
from sla2_core.training.stage2.train import Stage2Config, train_stage2

NAMES = list(families.BUILDERS)


@pytest.mark.parametrize("name", NAMES)
def test_every_block_with_alpha_one_is_the_original_and_less_is_not(name):
    transformer, sample, tokens = families.build(name)
    family, batch = family_of(transformer), families.batch(sample)
    with torch.no_grad():
        expected = family.predict(transformer, *batch)
        handle = apply_sla2(transformer, families.config(transformer, topk=1.0, alpha="one"))
        torch.testing.assert_close(
            family.predict(transformer, *batch), expected, atol=3e-6, rtol=1e-5
        )
        handle.configure(topk=0.3)
        maps = handle.block_maps(lambda: family.predict(transformer, *batch))
        assert (family.predict(transformer, *batch) - expected).abs().max() > 1e-3
        with handle.disabled():
            assert torch.equal(family.predict(transformer, *batch), expected)
        handle.remove()
        assert torch.equal(family.predict(transformer, *batch), expected)
    assert len(maps) == len(family.attention_layers(transformer)) == 2
    assert all(m.n_q == tokens for m in maps.values())


@pytest.mark.parametrize("name", ["hunyuan_video", "cogvideox_5b", "flux"])
def test_text_keys_are_always_selected(name):
    transformer, sample, tokens = families.build(name)
    family, batch = family_of(transformer), families.batch(sample)
    handle = apply_sla2(transformer, families.config(transformer))
    with torch.no_grad():
        maps = handle.block_maps(lambda: family.predict(transformer, *batch))
    for block_map in maps.values():
        assert block_map.n_k == tokens + families.TEXT
        mask = block_map.mask()
        assert mask[..., 9].all()  # the first text tokens: 45 to 49
        assert (mask[..., :9].sum(-1) == 3).all()
        if name != "hunyuan_video":  # whose second text block is padding for short captions
            assert mask[..., 10].all()


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_alpha_router_and_model(name):
    transformer, sample, _ = families.build(name)
    handle = apply_sla2(transformer, families.config(transformer, alpha="mass", precision="int8"))
    noisy, sigma, conditions = families.batch(sample)
    assert not any(p.requires_grad for p in handle.parameters()["router"])
    for parameter in handle.parameters()["router"]:  # as a training loop of one's own may ask
        parameter.requires_grad_(True)
    handle.family.predict(transformer, noisy, sigma, conditions).square().mean().backward()
    for group in ("router", "alpha"):
        assert all(
            p.grad is not None and p.grad.abs().sum() > 0 for p in handle.parameters()[group]
        ), group
    own = {
        n
        for n, p in transformer.named_parameters()
        if p.grad is not None and p.grad.abs().sum() > 0
    }
    for layer in handle.names.values():
        assert f"{layer}.to_q.weight" in own


@pytest.mark.parametrize("name", NAMES)
def test_from_capture_to_adapter_and_back(name, tmp_path):
    transformer, sample, tokens = families.build(name)
    handle = apply_sla2(transformer, families.config(transformer))
    family = handle.family

    def run(i):
        noisy, sigma, conditions = families.batch(lambda j: sample(i + j))
        family.predict(transformer, noisy, sigma, conditions)

    captures = capture(handle, run, tmp_path / "captures", samples=2)
    assert captures.layers == handle.layers
    assert captures.load(captures.calls[0]).q.shape[2] - captures.calls[0]["text_tokens"] == tokens
    report = train_stage1(
        handle, captures, Stage1Config(topk=(0.3,), steps=3, eval_every=2), tmp_path / "stage1"
    )
    assert len(report.layers) == 2
    before = {n: p.detach().clone() for n, p in transformer.named_parameters()}
    config = Stage2Config(
        steps=2, batch_size=2, learning_rate=1e-3, loss="distill", checkpoint_every=1
    )
    handle.configure(precision="int8")
    result = train_stage2(handle, families.Samples(sample), config, tmp_path / "stage2")
    moved = {n for n, p in transformer.named_parameters() if not torch.equal(p, before[n])}
    assert not any(".router." in n for n in moved)
    assert all(
        f"{layer}.processor.attention.mixing.logit" in moved for layer in handle.names.values()
    )
    assert all(f"{layer}.to_q.weight" in moved for layer in handle.names.values())
    other, _, _ = families.build(name, seed=5)
    again = apply_adapter(other, result.adapter)
    assert again.config == handle.config
    batch = families.batch(sample)
    with torch.no_grad():
        expected = family.predict(transformer, *batch)
        torch.testing.assert_close(family.predict(other, *batch), expected, atol=0, rtol=0)
    transformer.save_pretrained(tmp_path / "model")
    folded = load_file(tmp_path / "model" / "diffusion_pytorch_model.safetensors")
    assert set(folded) == set(transformer.state_dict())


@pytest.mark.parametrize(
    "name", ["hunyuan_video", "hunyuan_video15", "cogvideox_5b", "flux", "ltx2"]
)
def test_bfloat16_keeps_router_and_alpha_in_fp32(name):
    transformer, sample, _ = families.build(name)
    handle = apply_sla2(transformer, families.config(transformer))
    transformer.to(torch.bfloat16)
    noisy, sigma, conditions = families.batch(sample)
    conditions = {k: v.bfloat16() if v.dtype == torch.float32 else v for k, v in conditions.items()}
    with torch.no_grad():
        out = handle.family.predict(transformer, noisy.bfloat16(), sigma, conditions)
    assert out.dtype == torch.bfloat16
    assert torch.isfinite(out).all()
    assert all(
        p.dtype == torch.float32 for g in ("router", "alpha") for p in handle.parameters()[g]
    )


def test_masks_without_block_form_are_refused():
    transformer, sample, tokens = families.build("ltx2")
    handle = apply_sla2(transformer, families.config(transformer))
    noisy, sigma, conditions = families.batch(sample)
    conditions["video_self_attention_mask"] = torch.ones(2, tokens, tokens)
    with pytest.raises(
        ValueError, match="video_self_attention_mask: expected None with SLA2, got a mask"
    ):
        handle.family.predict(transformer, noisy, sigma, conditions)


@pytest.mark.parametrize("name", ["hunyuan_video", "hunyuan_video15"])
def test_context_parallelism_of_masked_text_is_refused(name):
    """diffusers has no plan for these models, and leaves its configuration on the processors when
    it says so.
    """
    transformer, sample, _ = families.build(name)
    handle = apply_sla2(transformer, families.config(transformer))
    for processor in handle.processors.values():
        processor._parallel_config = object()
    with pytest.raises(
        ValueError, match=r"_parallel_config: expected a model without masked text for SLA2 \(Wan, "
    ):
        handle.family.predict(transformer, *families.batch(sample))


def test_perturbed_guidance_of_ltx2_is_the_original():
    transformer, sample, _ = families.build("ltx2_gated")
    noisy, sigma, conditions = families.batch(sample)
    for mask in (torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.0])):
        given = conditions | {"spatio_temporal_guidance_blocks": [1], "perturbation_mask": mask}
        with torch.no_grad():
            family = family_of(transformer)
            expected = family.predict(transformer, noisy, sigma, given)
            handle = apply_sla2(transformer, families.config(transformer, topk=1.0, alpha="one"))
            torch.testing.assert_close(
                family.predict(transformer, noisy, sigma, given), expected, atol=3e-6, rtol=1e-5
            )
            handle.remove()


def test_cogvideox_trains_on_the_checkpoints_schedule():
    from diffusers import CogVideoXDPMScheduler

    transformer, _, _ = families.build("cogvideox_5b")
    alphas = family_of(transformer).alphas_cumprod(transformer.config)
    scheduler = CogVideoXDPMScheduler(
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=1.0,
    )
    clean, noise = torch.randn(2, 3, 2, 4).unbind(0)
    steps = torch.tensor([0, 500, 999])
    from sla2_core.training.stage2.objectives import noisy_and_target

    noisy, target = noisy_and_target(clean, noise, steps / 999, alphas)
    torch.testing.assert_close(
        noisy, scheduler.add_noise(clean, noise, steps), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        target, scheduler.get_velocity(clean, noise, steps), atol=1e-5, rtol=1e-5
    )


def test_a_model_without_self_attention_is_refused():
    transformer, _, _ = families.build("wan")
    transformer.blocks = torch.nn.ModuleList()
    with pytest.raises(ValueError, match="transformer: expected self-attention layers, found none"):
        apply_sla2(transformer, SLA2Config(head_dim=12, num_heads=2, topk=0.3))


def test_processors_set_afterwards_are_noticed():
    transformer, _, _ = families.build("cogvideox_5b")
    heads, dim = family_of(transformer).heads(transformer.transformer_blocks[0].attn1)
    handle = apply_sla2(transformer, SLA2Config(head_dim=dim, num_heads=heads, topk=0.3))
    transformer.fuse_qkv_projections()  # replaces every processor of this model
    with pytest.raises(
        ValueError, match=r"at transformer_blocks\.0\.attn1, got FusedCogVideoXAttnProcessor2_0"
    ):
        handle.save("unused")


def test_processors_with_weights_and_offloaded_models_are_refused():
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    transformer, _, _ = families.build("flux")
    heads, dim = family_of(transformer).heads(transformer.transformer_blocks[0].attn)
    config = SLA2Config(head_dim=dim, num_heads=heads, topk=0.3)
    with pytest.raises(
        ValueError, match="expected weights, got meta tensors; SLA2 does not work with sequential"
    ):
        apply_sla2(copy.deepcopy(transformer).to("meta"), config)
    transformer.transformer_blocks[0].attn.set_processor(FluxIPAdapterAttnProcessor(heads * dim, 8))
    with pytest.raises(
        ValueError, match=r"at transformer_blocks\.0\.attn, got FluxIPAdapterAttnProcessor"
    ):
        apply_sla2(transformer, config)
