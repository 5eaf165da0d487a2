"""SLA2 on a Wan whose linear layers hold int8 weights of torchao or bitsandbytes: full attention on
those weights where every block is selected, adapters beside them.
"""

from __future__ import annotations

import pytest
import torch
from helpers import tiny_wan
from sla2_core.integrations.diffusers import apply_sla2
from sla2_core.integrations.loading import apply_adapter, save_pretrained
from sla2_core.training.stage2 import Stage2Config, train_stage2


def by_torchao(model):
    found = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    found.quantize_(model, found.Int8WeightOnlyConfig())
    return model


def by_bitsandbytes(model):
    nn = pytest.importorskip("bitsandbytes.nn", reason="bitsandbytes is not installed")
    for block in model.blocks:
        for name in ("to_q", "to_k", "to_v"):
            own = getattr(block.attn1, name)
            made = nn.Linear8bitLt(own.in_features, own.out_features, has_fp16_weights=False)
            made.load_state_dict(own.state_dict())
            setattr(block.attn1, name, made.to("cpu"))
    return model


WAYS = {"torchao": by_torchao, "bitsandbytes": by_bitsandbytes}
pytestmark = pytest.mark.parametrize("quantise", WAYS.values(), ids=WAYS)


@torch.no_grad()
def run(model):
    return model(**tiny_wan.inputs(), return_dict=False)[0]


@pytest.mark.parametrize("first", [True, False], ids=["before SLA2", "after SLA2"])
def test_every_block_is_full_attention_on_these_weights(quantise, first, tmp_path):
    plain = quantise(tiny_wan.model())
    expected = run(plain)
    assert (expected - run(tiny_wan.model())).abs().max() > 1e-4
    model = quantise(tiny_wan.model()) if first else tiny_wan.model()
    handle = apply_sla2(model, tiny_wan.config(topk=1.0))
    if not first:
        quantise(model)
    torch.testing.assert_close(run(model), expected, atol=1e-5, rtol=1e-4)
    handle.configure(topk=0.3)
    torch.manual_seed(3)
    with torch.no_grad():
        for value in handle.adapter_tensors().values():
            value.add_(0.1 * torch.randn_like(value))
    handle.save(tmp_path)
    apply_adapter(plain, tmp_path)
    assert torch.equal(run(plain), run(model))


def test_what_would_write_or_change_these_weights_is_refused(quantise, tmp_path):
    apply_sla2(tiny_wan.model(), tiny_wan.config()).save(tmp_path / "whole", include_model=True)
    handle = apply_sla2(quantise(tiny_wan.model()), tiny_wan.config())
    before = run(handle.transformer)
    config = Stage2Config(steps=1, batch_size=1, lora_rank=2, lora_merge=False)
    for call in (
        lambda: handle.save(tmp_path, include_model=True),
        lambda: save_pretrained(handle, tmp_path),
        lambda: handle.load(tmp_path / "whole"),
        lambda: train_stage2(handle, tiny_wan.pairs(), config, tmp_path / "run"),
    ):
        with pytest.raises(ValueError, match=r"weights are not quantised, got a Int8\w+ at \w+\."):
            call()
    assert torch.equal(run(handle.transformer), before)
