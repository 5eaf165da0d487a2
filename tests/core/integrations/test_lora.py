"""LoRA beside SLA2: loaded before or after it, at any scale, fused or not, each as full attention
with that LoRA where every block is selected.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import tiny_wan
from sla2_core.integrations.diffusers import apply_sla2
from sla2_core.integrations.loading import apply_adapter, save_pretrained
from sla2_core.training.capture import capture
from sla2_core.training.stage1 import Stage1Config, train_stage1
from sla2_core.training.stage2 import Stage2Config, train_stage2

EVERY_BLOCK = dict(topk=1.0)
ORDERS = ("LoRA, SLA2", "SLA2, LoRA", "fused LoRA, SLA2", "SLA2, LoRA, fused")


def lora_file(folder):
    """A LoRA of rank 3 on self-attention, cross-attention and feed-forward, as a user has it."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    model = tiny_wan.model()
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj"]
    model.add_adapter(LoraConfig(r=3, lora_alpha=3, target_modules=targets))
    torch.manual_seed(7)
    found = {
        f"transformer.{name.replace('.default.', '.')}": 0.3 * torch.randn_like(value)
        for name, value in model.state_dict().items()
        if ".lora_" in name
    }
    save_file(found, folder / "pytorch_lora_weights.safetensors")
    return folder


def pipeline(transformer):
    from helpers import families

    return families.pipeline("wan", transformer)


@torch.no_grad()
def run(transformer, **kwargs):
    return transformer(**tiny_wan.inputs(), **kwargs, return_dict=False)[0]


def put_together(order, folder, scale, **config):
    """The pipeline and the handle of its transformer, LoRA and SLA2 put on it in that order."""
    pipe, handle = pipeline(tiny_wan.model()), None
    for step in order.split(", "):
        if step == "SLA2":
            handle = apply_sla2(pipe.transformer, tiny_wan.config(**config))
            continue
        if "LoRA" in step:
            pipe.load_lora_weights(folder, adapter_name="style")
            pipe.set_adapters("style", scale)
        if "fused" in step:
            pipe.fuse_lora(components=["transformer"])
    return pipe, handle


@pytest.mark.parametrize(("order", "scale"), list(itertools.product(ORDERS, (1.0, 0.4))))
def test_every_block_gives_full_attention_with_that_lora(order, scale, tmp_path):
    plain = pipeline(tiny_wan.model())
    without = run(plain.transformer)
    plain.load_lora_weights(lora_file(tmp_path), adapter_name="style")
    plain.set_adapters("style", scale)
    expected = run(plain.transformer)
    assert (expected - without).abs().max() > 1e-2
    pipe, handle = put_together(order, tmp_path, scale, **EVERY_BLOCK)
    torch.testing.assert_close(run(pipe.transformer), expected, atol=1e-5, rtol=1e-4)
    with handle.disabled():
        torch.testing.assert_close(run(pipe.transformer), expected, atol=1e-5, rtol=1e-4)
    if "fused" in order:
        pipe.unfuse_lora(components=["transformer"])
    pipe.unload_lora_weights()
    torch.testing.assert_close(run(pipe.transformer), without, atol=1e-5, rtol=1e-4)


def test_an_adapter_with_the_model_holds_its_weights_without_the_lora(tmp_path):
    (tmp_path / "lora").mkdir()
    pipe, handle = put_together("LoRA, SLA2", lora_file(tmp_path / "lora"), 1.0)
    handle.save(tmp_path / "adapter", include_model=True)
    plain = tiny_wan.model(seed=4)
    apply_adapter(plain, tmp_path / "adapter")
    pipe.unload_lora_weights()
    assert torch.equal(run(plain), run(pipe.transformer))
    _, other = put_together("SLA2, LoRA", tmp_path / "lora", 1.0)
    with pytest.raises(ValueError, match="expected no LoRA in save_pretrained, got 'style'"):
        save_pretrained(other, tmp_path / "whole")
    other.load(tmp_path / "adapter")  # beneath a LoRA that stays
    with_lora, _ = put_together("LoRA, SLA2", tmp_path / "lora", 1.0)
    assert torch.equal(run(other.transformer), run(with_lora.transformer))


def test_an_adapter_whose_lora_cannot_be_read_leaves_the_model_as_it_was(tmp_path):
    model = tiny_wan.model()
    apply_sla2(tiny_wan.model(seed=4), tiny_wan.config()).save(tmp_path, include_model=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match=r"pytorch_lora_weights\.safetensors"):
        apply_adapter(model, tmp_path)
    after = model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("order", ["LoRA, SLA2", "SLA2, LoRA"])
@pytest.mark.parametrize("merge", [True, False], ids=["merged", "kept"])
def test_a_lora_trains_beside_a_loaded_one_with_router_and_mixing(order, merge, tmp_path):
    (tmp_path / "lora").mkdir()
    pipe, handle = put_together(order, lora_file(tmp_path / "lora"), 0.4)
    transformer = pipe.transformer
    before = {n: p.detach().clone() for n, p in transformer.named_parameters()}
    captures = capture(handle, lambda i: run(transformer), tmp_path / "captures", samples=1)
    settings = Stage1Config(topk=(0.3,), steps=2, eval_every=2, rows=None)
    train_stage1(handle, captures, settings, tmp_path / "stage1")
    config = Stage2Config(
        steps=2,
        batch_size=2,
        warmup=1,
        learning_rate=0.05,
        lora_rank=2,
        lora_targets=("to_q", "proj_out"),
        lora_merge=merge,
        checkpoint_every=2,
    )
    report = train_stage2(handle, tiny_wan.pairs(), config, tmp_path / "stage2")
    names = {n for n, p in transformer.named_parameters() if n in before}
    after = dict(transformer.named_parameters())
    moved = {n for n in names if not torch.equal(after[n], before[n])}
    assert all("lora_" not in name for name in moved)  # the user's LoRA is as it was
    assert {n.rsplit(".", 1)[1] for n in moved if "processor" in n} == {
        "weight_q",
        "weight_k",
        "logit",
    }
    assert any("to_q.base_layer.weight" in name for name in moved) == merge
    again = pipeline(tiny_wan.model())
    again.load_lora_weights(tmp_path / "lora", adapter_name="style")
    again.set_adapters("style", 0.4)
    loaded = apply_adapter(again.transformer, report.adapter)
    assert loaded.config == handle.config
    torch.testing.assert_close(
        run(again.transformer), run(transformer.eval()), atol=1e-5, rtol=1e-4
    )
    assert (tmp_path / "stage2/adapter/pytorch_lora_weights.safetensors").exists() != merge


def test_training_beside_a_fused_lora_is_refused(tmp_path):
    (tmp_path / "lora").mkdir()
    _, handle = put_together("fused LoRA, SLA2", lora_file(tmp_path / "lora"), 1.0)
    config = Stage2Config(steps=1, batch_size=1, lora_rank=2)
    with pytest.raises(
        ValueError, match="expected no fused LoRA to train another one, got 'style'"
    ):
        train_stage2(handle, tiny_wan.pairs(), config, tmp_path / "stage2")
