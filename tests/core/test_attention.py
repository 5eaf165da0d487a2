"""SLA2Attention and SLAAttention: layouts, info, dtypes, gradients, configuration."""

import dataclasses
import warnings

import pytest
import torch
from sla2_core import (
    SLA2Attention,
    SLA2Config,
    SLAAttention,
    attention,
    build_attention,
    soft_topk,
)
from sla2_core.reference import full_attention, sla2_reference
from sla2_core.variants import paper_alpha, pooled, sla, sparse_only, training_free

CONFIG = SLA2Config(head_dim=8, num_heads=2, topk=0.3, block_q=16, block_k=8)


def qkv(n_q=63, n_k=111, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(2, 2, n, 8, dtype=dtype, requires_grad=True) for n in (n_q, n_k, n_k)]


def test_output_is_the_operator_on_the_routed_map():
    q, k, v = qkv()
    attn = SLA2Attention(dataclasses.replace(CONFIG, alpha="position"))
    out, info = attn(q, k, v, return_info=True)
    expected = sla2_reference(q, k, v, info.block_map, info.alpha)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert info.block_map.counts.unique().tolist() == [round(0.3 * 14)]
    assert info.sparsity == pytest.approx(1 - 4 / 14)
    torch.testing.assert_close(info.alpha, torch.full((1, 2, 4), 0.8))


@pytest.mark.parametrize("config", [CONFIG, sla(CONFIG)], ids=["sla2", "sla"])
def test_layouts_agree(config):
    q, k, v = qkv()
    attn = build_attention(config)
    swapped = attn(*(x.transpose(1, 2) for x in (q, k, v)), layout="bnhd")
    torch.testing.assert_close(swapped.transpose(1, 2), attn(q, k, v))


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        dataclasses.replace(CONFIG, alpha="mass"),
        paper_alpha(CONFIG, 1),
        sparse_only(CONFIG),
        dataclasses.replace(CONFIG, smooth_k=False),
        sla(CONFIG),
        pooled(CONFIG),
    ],
    ids=["position", "mass", "paper", "one", "unsmoothed", "sla", "pooled"],
)
def test_gradcheck(config):
    torch.manual_seed(1)
    config = dataclasses.replace(config, head_dim=3, num_heads=1, block_q=8, block_k=4)
    attn = build_attention(config).double()
    with torch.no_grad():
        for parameter in attn.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    q, k, v = (
        torch.randn(1, 1, n, 3, dtype=torch.float64, requires_grad=True) for n in (11, 13, 13)
    )
    attn.requires_grad_(True)  # the router too, which an alpha from the mass gives a gradient
    learned = [p for n, p in attn.named_parameters() if "router" not in n or config.alpha == "mass"]

    def run(q, k, v, *_):
        return attn(q, k, v)

    assert torch.autograd.gradcheck(run, (q, k, v, *learned), atol=1e-6)


def test_all_blocks_and_any_alpha_is_full_attention():
    q, k, v = qkv()
    attn = SLA2Attention(dataclasses.replace(CONFIG, topk=1.0))
    assert (attn(q, k, v) - full_attention(q, k, v)).abs().max() < 1e-5


def test_a_configuration_that_is_none_is_refused():
    with pytest.raises(
        TypeError, match=r"config: expected an SLA2Config, got dict; .*training_free"
    ):
        SLA2Attention(training_free())


def test_parameters_exist_from_the_start_and_stay_fp32():
    attn = SLA2Attention(CONFIG).to(torch.bfloat16)
    names = {"router.weight_q", "router.weight_k", "mixing.offset", "mixing.slope"}
    assert set(attn.state_dict()) == names
    assert {p.dtype for p in attn.parameters()} == {torch.float32}
    q, k, v = (x.bfloat16() for x in qkv())
    assert attn(q, k, v).dtype == torch.bfloat16
    assert set(SLAAttention(sla(CONFIG)).state_dict()) == {
        "complement.weight",
        "complement.bias",
    }


def test_kv_lengths_equal_a_shorter_sequence():
    q, k, v = qkv()
    for config in (CONFIG, dataclasses.replace(CONFIG, alpha="mass"), sla(CONFIG), pooled(CONFIG)):
        attn = build_attention(config)
        out = attn(q, k, v, kv_lengths=[50, 111])
        torch.testing.assert_close(
            out[:1], attn(q[:1], k[:1, :, :50], v[:1, :, :50]), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(out[1:], attn(q[1:], k[1:], v[1:]), rtol=1e-4, atol=1e-5)


def test_topk_and_precision_can_be_replaced_between_calls():
    q, k, v = qkv()
    attn = SLA2Attention(CONFIG)
    attn.config = dataclasses.replace(attn.config, topk=0.6, precision="int8")
    out, info = attn(q, k, v, return_info=True)
    assert info.block_map.counts.unique().tolist() == [round(0.6 * 14)]
    torch.testing.assert_close(
        out,
        sla2_reference(q, k, v, info.block_map, info.alpha, precision="int8"),
        rtol=1e-4,
        atol=1e-5,
    )


def test_autocast_takes_the_inputs_in_its_dtype_as_sdpa_does_and_lowers_nothing_else():
    q, k, v = qkv()
    attn = SLA2Attention(CONFIG)
    expected = attn(*(x.to(torch.bfloat16) for x in (q, k, v)))
    with torch.autocast("cpu", torch.bfloat16):
        found = attn(q, k, v.to(torch.bfloat16))  # as after rotary positions in fp32
        assert (
            found.dtype
            == torch.nn.functional.scaled_dot_product_attention(q, k, v).dtype
            == torch.bfloat16
        )
        assert attn(*(x.double() for x in (q, k, v))).dtype == torch.float64
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda a, q, k, v: a(q[:, :1], k[:, :1], v[:, :1]), "q: expected num_heads=2"),
        (lambda a, q, k, v: a(q[..., :4], k[..., :4], v[..., :4]), "q: expected head_dim=8"),
        (lambda a, q, k, v: a(q, k, v, layout="bhdn"), "layout: expected one of"),
        (lambda a, q, k, v: a(q[0], k, v, layout="bnhd"), "q, k, v: expected 4 dimensions"),
    ],
)
def test_bad_calls(call, match):
    with pytest.raises(ValueError, match=match):
        call(SLA2Attention(CONFIG), *qkv())


@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
def test_what_is_no_tensor_is_named(layout):
    q, _, v = qkv()
    with pytest.raises(TypeError, match=r"k: expected a torch\.Tensor, got NoneType"):
        SLA2Attention(CONFIG)(q, None, v, layout=layout)


def test_sla_takes_the_backward_of_its_configuration():
    leaves = [x.requires_grad_() for x in qkv()]
    found = []
    for qat_backward in ("paper", "matched"):
        config = dataclasses.replace(sla(CONFIG), precision="int4", qat_backward=qat_backward)
        found.append(torch.autograd.grad(SLAAttention(config)(*leaves).sin().sum(), leaves[0])[0])
    assert (found[0] - found[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"topk": 0.0}, "topk"),
        ({"topk": 1.2}, "topk"),
        ({"block_q": 0}, "block_q"),
        ({"alpha": "learned"}, "alpha"),
        ({"alpha_init": 1.0}, "alpha_init"),
        ({"smooth_k": 1}, "smooth_k"),
        ({"tau": 0}, "tau"),
    ],
)
def test_bad_configuration_is_named(change, match):
    with pytest.raises(ValueError, match=f"^{match}: expected"):
        dataclasses.replace(CONFIG, **change)


def test_configuration_round_trips_and_names_unknown_and_missing_fields():
    assert SLA2Config.from_dict(CONFIG.to_dict()) == CONFIG
    with pytest.raises(ValueError, match="blok_q: expected a field among"):
        SLA2Config.from_dict(CONFIG.to_dict() | {"blok_q": 3})
    with pytest.raises(ValueError, match="topk: expected a value, got none"):
        SLA2Config.from_dict({"head_dim": 8, "num_heads": 2})


@pytest.mark.parametrize("alpha", ["position", "mass"])
@pytest.mark.parametrize("per_head", [False, True])
def test_a_module_made_under_a_bf16_default_keeps_router_and_alpha_in_fp32(alpha, per_head):
    config = dataclasses.replace(CONFIG, alpha=alpha, per_head_router=per_head)
    expected = SLA2Attention(config)
    torch.set_default_dtype(torch.bfloat16)
    try:
        attn = SLA2Attention(config)
        assert {p.dtype for p in attn.parameters()} == {torch.float32}
        q, k, v = (x.detach().bfloat16() for x in qkv())
        out, info = attn(q, k, v, return_info=True)
    finally:
        torch.set_default_dtype(torch.float32)
    # Some processors round the exponentials by where the tensors lie: fp32's rounding, not bf16's.
    right, expected_info = expected(q, k, v, return_info=True)
    torch.testing.assert_close(info.alpha, expected_info.alpha, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(out, right, atol=1e-6, rtol=2**-7)


@pytest.mark.parametrize("config", [CONFIG, sla(CONFIG)], ids=["sla2", "sla"])
def test_bf16_parameters_are_computed_with_in_fp32(config):
    """As FSDP2's mixed precision hands them over."""
    config = dataclasses.replace(config, alpha="mass") if config is CONFIG else config
    attn, other = SLA2Attention(config), SLA2Attention(config)
    with torch.no_grad():
        for parameter, same in zip(attn.parameters(), other.parameters()):
            parameter.add_(torch.randn_like(parameter) * 0.1)
            same.copy_(parameter.bfloat16())
            parameter.data = parameter.data.bfloat16()
    q, k, v = qkv()
    out, info = attn(q, k, v, return_info=True)
    expected, right = other(q, k, v, return_info=True)
    assert torch.equal(out, expected)
    assert torch.equal(info.block_map.mask(), right.block_map.mask())


def test_the_router_requires_no_gradient_outside_of_stage_1():
    attn = SLA2Attention(dataclasses.replace(CONFIG, alpha="mass"))
    out = attn(*qkv())
    out.sum().backward()
    for name, parameter in attn.named_parameters():
        assert parameter.requires_grad == (not name.startswith("router.")), name
        assert (parameter.grad is not None) == parameter.requires_grad, name


@pytest.mark.parametrize(
    "config",
    [CONFIG, dataclasses.replace(CONFIG, alpha="mass"), sla(CONFIG), pooled(CONFIG)],
    ids=["position", "mass", "sla", "pooled"],
)
def test_the_meta_device_gives_shapes_and_to_empty_then_reset_the_initial_values(config):
    with torch.device("meta"):
        attn = SLA2Attention(config)
        q, k, v = (torch.empty(2, 2, n, 8, dtype=torch.bfloat16) for n in (63, 111, 111))
        out = attn(q, k, v, kv_lengths=torch.tensor([50, 111]))
    assert (out.device.type, out.dtype, out.shape) == ("meta", torch.bfloat16, q.shape)
    attn = attn.to_empty(device="cpu")
    attn.reset_parameters()
    again = SLA2Attention(config)
    for name, value in again.state_dict().items():
        assert torch.equal(attn.state_dict()[name], value), name
    assert torch.equal(attn(*qkv()), again(*qkv()))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"alpha": "position"}, "alpha"),
        ({"alpha": "one"}, "alpha"),
        ({"token_order": "raster"}, "token_order"),
        ({"complement": "projected"}, "complement"),
        ({"router": "heuristic"}, "router"),
        ({"alpha_init": 0.5}, "alpha_init"),
        ({"block_q": 32}, "block_q"),
        ({"smooth_k": False}, "smooth_k"),
    ],
)
def test_a_configuration_that_would_change_the_parameters_is_refused(change, name):
    attn = SLA2Attention(CONFIG)
    other = dataclasses.replace(CONFIG, topk=0.5, **change)
    with pytest.raises(ValueError, match=f"^{name}: expected a field that may change, one of topk"):
        attn.config = other
    assert attn.config == CONFIG


def test_tau_may_change_and_reaches_the_router():
    attn = SLA2Attention(CONFIG)
    attn.config = dataclasses.replace(CONFIG, tau=0.5)
    scores = torch.randn(1, 2, 3, 7)
    soft = attn.router.soft(scores, torch.full((1, 1, 1, 1), 2))
    torch.testing.assert_close(soft, soft_topk(scores, 2, 0.5))


def test_text_keys_are_always_selected_and_text_queries_see_everything():
    q, k, v = (x.detach() for x in qkv(111, 111))
    for config in (CONFIG, dataclasses.replace(CONFIG, alpha="mass"), sla(CONFIG), pooled(CONFIG)):
        attn = build_attention(config)
        out, info = attn(q, k, v, text_tokens=13, kv_lengths=[107, 111], return_info=True)
        mask = info.block_map.mask()
        assert mask.shape[2:] == (7, 14)  # 98 video queries; block 12 holds video and text
        assert mask[..., 12:].all()
        assert (mask[..., :12].sum(-1) == round(0.3 * 12)).all()
        dense = full_attention(q[:, :, 98:], k, v, kv_lengths=[107, 111])
        torch.testing.assert_close(out[:, :, 98:], dense, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"text_tokens: expected an integer in \[0, 111\), got 1"):
        attn(q, k, v, text_tokens=111)
    message = r"kv_lengths: expected values in \[98, 111\] \(padding .* text\), got \[97, 111\]"
    with pytest.raises(ValueError, match=message):
        attn(q, k, v, text_tokens=13, kv_lengths=[97, 111])


def test_a_layout_that_cannot_be_told_from_the_shape_is_warned_about_once():
    attention._warn_once.cache_clear()
    attn = SLA2Attention(dataclasses.replace(CONFIG, block_q=2, block_k=2))
    q = torch.randn(1, 2, 2, 8)
    with pytest.warns(RuntimeWarning, match="its layout cannot be told from its shape"):
        attn(q, q, q)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attn(q, q, q, layout="bnhd")


def test_sla_attention_takes_the_variant_of_any_configuration():
    assert SLAAttention(CONFIG).config == sla(CONFIG)
