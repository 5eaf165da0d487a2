"""The drop-in for scaled_dot_product_attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sla2_core import SLA2Config
from sla2_core.sdpa import ScaledDotProductSLA2

CONFIG = SLA2Config(head_dim=12, num_heads=4, topk=1.0, alpha="one", block_q=8, block_k=5)


@pytest.mark.parametrize("text_tokens", [0, 9])
def test_every_block_is_scaled_dot_product_attention(text_tokens):
    q, k, v = torch.randn(3, 2, 4, 45, 12)
    mask = (torch.arange(45) < torch.tensor([45, 40])[:, None])[:, None, None]
    attend = ScaledDotProductSLA2(CONFIG)
    for given in (None, mask):
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=given)
        out = attend(q, k, v, attn_mask=given, text_tokens=text_tokens, scale=12**-0.5)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


def test_grouped_queries():
    q, (k, v) = torch.randn(2, 4, 45, 12), torch.randn(2, 2, 2, 45, 12)
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(
        ScaledDotProductSLA2(CONFIG)(q, k, v, enable_gqa=True), expected, atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dropout_p": 0.1}, r"dropout_p: expected 0.0 with SLA2, got 0.1"),
        ({"is_causal": True}, "is_causal: expected False with SLA2"),
        ({"scale": 1.0}, r"scale: expected None or 1 / sqrt\(d\) = 0.288675 with SLA2, got 1.0"),
        (
            {"attn_mask": torch.zeros(45, 45)},
            r"attn_mask: expected a bool mask of keys .* got torch.float32 \(45, 45\)",
        ),
        (
            {"attn_mask": torch.arange(45).view(1, 1, 1, 45) != 3},
            "attn_mask: expected the valid keys first",
        ),
        (
            {"attn_mask": torch.ones(3, 1, 1, 45, dtype=torch.bool)},
            r"attn_mask: expected a bool mask of keys \(2, 1, 1, 45\) .* \(3, 1, 1, 45\)",
        ),
        (
            {"attn_mask": torch.zeros(2, 1, 1, 45, dtype=torch.bool)},
            "attn_mask: expected a valid key for each item",
        ),
        ({"query": torch.zeros(45, 12)}, r"query: expected 4 dimensions .* got shape \(45, 12\)"),
    ],
)
def test_what_has_no_block_form_is_refused(given, message):
    q, k, v = torch.randn(3, 2, 4, 45, 12)
    with pytest.raises(ValueError, match=message):
        ScaledDotProductSLA2(CONFIG)(**{"query": q, "key": k, "value": v, **given})


@pytest.mark.parametrize("name", ["query", "key", "value", "attn_mask"])
def test_what_is_no_tensor_is_named(name):
    q, k, v = torch.randn(3, 2, 4, 45, 12)
    given = {"query": q, "key": k, "value": v, "scale": 12**-0.5, name: [1, 2]}
    with pytest.raises(TypeError, match=f"^{name}: expected a torch.Tensor.*, got list$"):
        ScaledDotProductSLA2(CONFIG)(**given)
