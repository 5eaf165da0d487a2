"""Variants as diffusers' attention backends: what apply_sla2 gives, undone without a trace, and
other models untouched.
"""

from __future__ import annotations

import pytest
import torch
from helpers import families, tiny_wan
from sla2_core.integrations.attention_backends import (
    register_attention_backend,
    register_attention_backends,
)
from sla2_core.integrations.diffusers import apply_sla2

FIELDS = dict(topk=0.3, block_q=8, block_k=5)


@torch.no_grad()
def run(transformer):
    return transformer(**tiny_wan.inputs(), return_dict=False)[0]


@pytest.mark.parametrize(
    ("name", "members"),
    [
        ("sla2-sparse-only", {"complement": "none", "alpha": "one"}),
        ("sla2-training-free", {"variant": "training_free"}),
    ],
)
def test_a_backend_is_what_apply_sla2_gives_and_is_undone(name, members, wan):
    assert name in register_attention_backends(**FIELDS)
    expected = wan()
    # A backend of diffusers sees no grid, and so takes the tokens in raster order.
    own = {"router": "heuristic", "token_order": "raster"} | FIELDS | members
    apply_sla2(expected, own)
    transformer, other = wan(), wan()
    full = run(transformer)
    transformer.set_attention_backend(name)
    assert torch.equal(run(transformer), run(expected))
    assert (run(transformer) - full).abs().max() > 1e-3
    assert torch.equal(run(other), full)  # another model keeps diffusers' default
    transformer.reset_attention_backend()
    assert torch.equal(run(transformer), full)
    transformer.set_attention_backend(name)
    transformer.set_attention_backend("native")
    assert torch.equal(run(transformer), full)


def test_every_block_is_full_attention_and_compiles_whole(wan):
    name = register_attention_backend("sla2-all", **FIELDS | {"topk": 1.0})
    transformer = wan()
    full = run(transformer)
    transformer.set_attention_backend(name)
    torch.testing.assert_close(run(transformer), full, atol=2e-6, rtol=1e-5)
    torch._dynamo.reset()
    compiled = torch.compile(transformer, backend="eager", fullgraph=True)
    torch.testing.assert_close(run(compiled), full, atol=2e-6, rtol=1e-5)


def test_the_same_name_takes_new_settings(wan):
    transformer, found = wan(), []
    for topk in (0.3, 1.0):
        register_attention_backend("sla2-again", **FIELDS | {"topk": topk})
        transformer.set_attention_backend("sla2-again")
        found.append(run(transformer))
    transformer.reset_attention_backend()
    torch.testing.assert_close(found[1], run(transformer), atol=2e-6, rtol=1e-5)
    assert not torch.allclose(*found)


def test_what_it_cannot_be_is_refused_in_one_line():
    for arguments, message in (
        ({"variant": "sla2"}, "expected one without trained parameters such as router.weight_q"),
        ({"variant": "sla9"}, "variant: expected one of sla2, .* got 'sla9'"),
        ({"topk": 2.0}, r"topk: expected a number in \(0, 1\], got 2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            register_attention_backend("sla2-bad", **arguments)
    with pytest.raises(ValueError, match="name: expected one that begins with 'sla2-', got 'x'"):
        register_attention_backend("x")


def test_masked_text_in_joint_attention_is_refused():
    register_attention_backends(**FIELDS)
    transformer, sample, _ = families.build("hunyuan_video")
    transformer.set_attention_backend("sla2-sparse-only")
    from sla2_core.integrations.family import family_of

    latents, sigma, conditions = families.batch(sample)
    with pytest.raises(ValueError, match=r"attn_mask: expected None .* got a mask; use apply_sla2"):
        family_of(transformer).predict(transformer, latents, sigma, conditions)
