"""A family of one's own, registered from outside the package."""

import pytest
import torch
from helpers import tiny_wan
from sla2_core.block_map import num_blocks
from sla2_core.integrations import family
from sla2_core.integrations.diffusers import apply_sla2
from sla2_core.integrations.family import Family, family_of, register_family
from sla2_core.integrations.inspect import inspect_model
from sla2_core.integrations.processor import SLA2Processor
from torch import nn

CONFIG = tiny_wan.config(head_dim=8, token_order="raster")  # it knows no grid of its tokens


class Attention(nn.Module):
    """Self-attention with a processor that can be replaced, as diffusers has it."""

    def __init__(self):
        super().__init__()
        self.qkv, self.processor = nn.Linear(16, 48), self.dense

    def set_processor(self, processor):
        self.processor = processor

    def dense(self, attn, x):
        q, k, v = (y.transpose(1, 2) for y in attn.heads(x))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).flatten(2)

    def heads(self, x):
        return self.qkv(x).unflatten(-1, (3, 2, 8)).unbind(2)

    def forward(self, x):
        return self.processor(self, x)


class MyTransformer(nn.Module):
    """Two blocks of attention alone."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, hidden_states, timestep):
        for block in self.blocks:
            hidden_states = hidden_states + block(hidden_states)
        return hidden_states


class MyProcessor(SLA2Processor):
    """The layer's projections around self_attention."""

    def attend(self, attn, x):
        return self.self_attention(*attn.heads(x)).flatten(2)


MINE = Family(
    name="mine",
    attention_layers=lambda model: {f"blocks.{i}": b for i, b in enumerate(model.blocks)},
    processor=MyProcessor,
    heads=lambda attn: (2, 8),
    predict=lambda model, noisy, sigma, conditions: model(noisy, sigma),
    tokens=lambda config, frames, height, width: frames * height * width,
    latent_shape=(1, 4, 4),
)


def test_a_registered_family_is_applied_like_the_others(monkeypatch):
    monkeypatch.setattr(family, "_FAMILIES", dict(family._FAMILIES))
    with pytest.raises(ValueError, match=r"transformer: expected one of Cog.*, got MyTransformer"):
        family_of(MyTransformer())
    register_family("MyTransformer", MINE)
    register_family("MyTransformer", MINE)  # again: nothing new
    torch.manual_seed(0)
    model, x, time = MyTransformer(), torch.randn(1, 45, 16), torch.tensor([1.0])
    expected = model(x, time)
    with pytest.raises(
        ValueError, match=r"token_order: expected 'raster' for mine, .* got 'tiles'"
    ):
        apply_sla2(model, tiny_wan.config(head_dim=8))
    handle = apply_sla2(model, CONFIG)
    maps = handle.block_maps(lambda: model(x, time))
    assert {layer: m.shape[3] for layer, m in maps.items()} == dict.fromkeys(
        (0, 1), num_blocks(45, 5)
    )
    assert not torch.allclose(model(x, time), expected)
    handle.configure(topk=1.0)
    torch.testing.assert_close(model(x, time), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="class_name: expected a class without a family"):
        register_family("MyTransformer", family_of(tiny_wan.model()))
    with pytest.raises(ValueError, match="_class_name: expected a class of diffusers, got 'My"):
        inspect_model({"_class_name": "MyTransformer"}, topk=0.1, block_q=16, block_k=5)
