"""The pooled complement: one softmax with the selected tokens, on every backend, hard and soft."""

import pytest
import torch
from sla2_core import (
    BlockMap,
    SLA2Attention,
    SLA2Config,
    backends,
    block_sparse_attention,
    pooled_attention,
)
from sla2_core.attend import Parts, soft_attend
from sla2_core.options import make_options
from sla2_core.reference import full_attention
from sla2_core.registry import COMPLEMENTS, MIXINGS
from torch.nn.functional import scaled_dot_product_attention

BLOCKS = {"block_q": 16, "block_k": 8}
BACKENDS = ["cpu", "blocked", "reference"]


def inputs(n_q=63, n_k=111, d=8, dtype=torch.float64, b=2, h=2):
    """q, k, v, bias and a mask whose first row selects nothing and whose last selects all."""
    generator = torch.Generator().manual_seed(n_q)
    q, k, v = (
        torch.randn(b, h, n, d, generator=generator, dtype=torch.float64) for n in (n_q, n_k, n_k)
    )
    mask = torch.rand(b, h, -(-n_q // 16), -(-n_k // 8), generator=generator) < 0.3
    mask[0, 0, 0], mask[-1, -1, -1] = False, True
    bias = torch.randn(h, generator=generator, dtype=torch.float64)
    leaves = [x.to(dtype).requires_grad_() for x in (q, k + 1.5, v, bias)]
    return *leaves, mask


def map_of(mask, n_q=63, n_k=111):
    return BlockMap.from_mask(mask, n_q=n_q, n_k=n_k, **BLOCKS)


def one_softmax(q, k, v, bias, mask, lengths=None):
    """The definition as one call of scaled_dot_product_attention over [K; block means of K]."""
    n_q, n_k = q.shape[2], k.shape[2]
    lengths = torch.tensor(lengths or [n_k] * len(q))
    valid = torch.arange(n_k) < lengths[:, None]  # (B, N_k)
    owner = torch.arange(n_k) // 8 == torch.arange(mask.shape[3])[:, None]
    member = (owner & valid[:, None]).to(k.dtype)[:, None]  # (B, 1, T_n, N_k)
    tokens = member.sum(-1, keepdim=True)
    means_k, means_v = (member @ x / tokens.clamp_min(1) for x in (k, v))
    rows = mask.repeat_interleave(16, 2)[:, :, :n_q]
    selected = rows.repeat_interleave(8, 3)[..., :n_k] & valid[:, None, None]
    here = torch.zeros(selected.shape, dtype=q.dtype).masked_fill(~selected, -torch.inf)
    sizes = tokens.log().transpose(-1, -2) + bias[:, None, None]
    there = sizes.expand(rows.shape).masked_fill(rows, -torch.inf)
    keys, values = torch.cat([k, means_k], 2), torch.cat([v, means_v], 2)
    return scaled_dot_product_attention(q, keys, values, torch.cat([here, there], -1))


def with_gradients(out, leaves):
    weight = torch.sin(torch.arange(out.numel(), dtype=torch.float64)).view_as(out).to(out.dtype)
    return out, *torch.autograd.grad((out * weight).sum(), leaves)


@pytest.mark.parametrize(("n_q", "n_k"), [(63, 111), (1, 1), (16, 9), (200, 77)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_one_softmax_over_tokens_and_means_with_every_gradient(
    n_q, n_k, backend, monkeypatch
):
    monkeypatch.setattr("sla2_core.attend._CHUNK_ELEMENTS", 300)  # several chunks
    *leaves, mask = inputs(n_q, n_k)
    lengths = [max(1, n_k - 55), n_k]
    for given in (None, lengths):
        block_map = map_of(mask, n_q, n_k)
        out = pooled_attention(*leaves[:3], block_map, leaves[3], kv_lengths=given, backend=backend)
        expected = one_softmax(*leaves, mask, given)
        for a, b in zip(with_gradients(out, leaves), with_gradients(expected, leaves)):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_within_rounding_of_the_definition(backend, dtype):
    *leaves, mask = inputs(200, 333, d=24, dtype=dtype)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    out = pooled_attention(*leaves[:3], map_of(mask, 200, 333), leaves[3], backend=backend)
    found = with_gradients(out, leaves)
    expected = with_gradients(one_softmax(*wide, mask), wide)
    for a, b in zip(found, expected):
        limit = 1e-5 if dtype == torch.float32 else 2e-2
        assert (a.double() - b).abs().max() <= limit * b.detach().abs().max().clamp_min(1)
        assert a.dtype == dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_full_attention_where_all_is_selected_or_blocks_are_constant(backend):
    q, k, v, bias, mask = inputs(63, 112)
    everything = map_of(torch.ones_like(mask), 63, 112)
    out = pooled_attention(q, k, v, everything, bias, backend=backend)
    torch.testing.assert_close(out, full_attention(q, k, v))
    found = with_gradients(out, (q, k, v, bias))
    for a, b in zip(found[1:], with_gradients(full_attention(q, k, v), (q, k, v))[1:]):
        torch.testing.assert_close(a, b)
    assert (found[4] == 0).all()
    k, v = (x[:, :, ::8].repeat_interleave(8, 2) for x in (k, v))
    out = pooled_attention(q, k, v, map_of(mask, 63, 112), backend=backend)
    torch.testing.assert_close(out, full_attention(q, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_shift_of_k_changes_nothing(backend):
    q, k, v, bias, mask = inputs()
    plain = pooled_attention(q, k, v, map_of(mask), bias, smooth_k=False, backend=backend)
    for keys, smooth in ((k, True), (k + 3, False)):
        out = pooled_attention(q, keys, v, map_of(mask), bias, smooth_k=smooth, backend=backend)
        torch.testing.assert_close(out, plain)


@pytest.mark.parametrize("precision", ["int8", "int8_int8", "fp8", "int4", "nvfp4"])
@pytest.mark.parametrize("qat_backward", ["paper", "matched"])
@pytest.mark.parametrize("backend", ["cpu", "blocked"])
def test_low_bit_rounds_the_selected_part_alone(precision, qat_backward, backend):
    *leaves, mask = inputs(d=16)
    how = {"precision": precision, "qat_backward": qat_backward, "kv_lengths": [111, 50]}
    found = [
        with_gradients(pooled_attention(*leaves[:3], map_of(mask), leaves[3], **how), leaves)
        for how in ({**how, "backend": name} for name in (backend, "reference"))
    ]
    for fast, plain in zip(*found):
        torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-10)
    # O and L of the selected part as they are, and the pooled part of the unrounded tensors.
    q, k, v, bias = (x.detach() for x in leaves)
    nothing = map_of(torch.zeros_like(mask))
    how = {"smooth_k": False, "precision": precision, "backend": backend}
    alone = pooled_attention(q, k, v, nothing, bias, **how)
    torch.testing.assert_close(alone, one_softmax(q, k, v, bias, torch.zeros_like(mask)))
    full = pooled_attention(q, k, v, map_of(mask), bias, **{**how, "precision": "full"})
    low = pooled_attention(q, k, v, map_of(mask), bias, **how)
    assert 1e-6 < (low - full).abs().max() < 1.0
    everything = map_of(torch.ones_like(mask))
    o_s, _ = block_sparse_attention(q, k, v, everything, precision=precision, backend=backend)
    torch.testing.assert_close(pooled_attention(q, k, v, everything, bias, **how), o_s)


@pytest.mark.parametrize("backend", BACKENDS)
def test_kv_lengths_equal_a_shorter_sequence_whatever_the_padding_holds(backend):
    q, k, v, bias, mask = (x.detach() for x in inputs())
    short = map_of(mask[:1, :, :, :7], 63, 50)
    alone = pooled_attention(q[:1], k[:1, :, :50], v[:1, :, :50], short, bias, backend=backend)
    k[0, :, 50:], v[0, :, 50:] = float("nan"), float("inf")
    out = pooled_attention(q, k, v, map_of(mask), bias, kv_lengths=[50, 111], backend=backend)
    torch.testing.assert_close(out[:1], alone)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_are_never_hidden(backend, which, bad):
    *tensors, mask = (x.detach() for x in inputs(dtype=torch.float32))
    tensors[which][0, 0, 5, 2] = bad
    out = pooled_attention(*tensors[:3], map_of(mask), tensors[3], backend=backend)
    assert not torch.isfinite(out[0, 0]).all()
    if which and bad != bad:  # every row has the token, or the mean of its block
        assert out[0, 0].isnan().any(-1).all()
    assert torch.isfinite(out[1]).all()
    tensors[which][0, 0, 5, 2] = 0.0
    tensors[3][0] = bad
    out = pooled_attention(*tensors[:3], map_of(mask), tensors[3], backend=backend)
    assert not torch.isfinite(out[0, 0]).all()
    assert torch.isfinite(out[:, 1]).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", ["full", "nvfp4"])
@pytest.mark.parametrize("selected", [(True, False), (True, True), (False, False)])
def test_a_row_whose_scores_are_all_minus_infinity_is_not_taken_for_an_empty_one(
    backend, precision, selected
):
    q, k, v = (torch.full((1, 1, n, 4), value) for n, value in ((1, -1e30), (2, 1e30), (2, 1.0)))
    mask = torch.tensor([[[list(selected)]]])
    block_map = BlockMap.from_mask(mask, block_q=1, block_k=1, n_q=1, n_k=2)
    q.requires_grad_()
    how = {"smooth_k": False, "precision": precision, "backend": backend}
    out = pooled_attention(q, k, v, block_map, **how)
    assert not torch.isfinite(out).any()
    assert not torch.isfinite(torch.autograd.grad(out.sum(), q)[0]).all()


@pytest.mark.parametrize("precision", ["full", "int8"])
def test_the_cpu_kernels_take_it_in_one_call_on_any_number_of_threads(precision, monkeypatch):
    monkeypatch.setattr("sla2_core.attend.rest_branch", None)
    *leaves, mask = inputs(300, 333, d=24, dtype=torch.float32, b=1)
    found = []
    for threads in (1, 2):
        monkeypatch.setattr("sla2_core.backends.cpu._threads", lambda *_, n=threads: n)
        how = {"kv_lengths": [301], "precision": precision}
        out = pooled_attention(*leaves[:3], map_of(mask, 300, 333), leaves[3], **how)
        found.append(with_gradients(out, leaves))
    assert all(torch.equal(a, b) for a, b in zip(*found))
    block_map, options = (
        map_of(mask, 300, 333),
        make_options(16, 8, precision, "paper", False, "pooled"),
    )
    bias = leaves[3].detach()[None, :, None].expand(block_map.shape[:3]).clone().requires_grad_()
    call = (*leaves[:3], block_map.indices, block_map.counts, bias, torch.tensor([301]))
    torch.library.opcheck(backends.ops.attention, (*call, options.text, "cpu", True))


def soft(q, k, v, mask, bias):
    """soft_attend with the pooled complement, in blocks of 16 x 8; bias (H,) or None."""
    config = SLA2Config(
        head_dim=q.shape[3], num_heads=q.shape[1], topk=0.5, complement="pooled", **BLOCKS
    )
    complement = COMPLEMENTS.make(config)
    complement.bias_of = lambda heads=None: bias
    parts = Parts(complement, MIXINGS.make(config))
    options = make_options(16, 8, "full", "paper", False)
    return soft_attend(q, k, v, mask, None, parts, lengths=None, options=options)[0]


def test_a_soft_mask_of_0_and_1_is_the_hard_operator():
    q, k, v, bias, mask = inputs()
    torch.testing.assert_close(soft(q, k, v, mask.double(), bias), one_softmax(q, k, v, bias, mask))


def test_the_soft_form_adds_the_logs_of_m_and_of_1_minus_m_to_the_logits():
    q, k, v, bias, mask = inputs(21, 13, d=3, b=1, h=1)
    m = torch.rand(mask.shape, dtype=torch.float64)
    m[0, 0, 0] = torch.tensor([1e-9, 1 - 1e-9])  # near the edges, and at them
    m[0, 0, 1] = torch.tensor([1.0, 0.3])
    m.requires_grad_()
    means = torch.stack(
        [x[0, 0, part].mean(0) for x in (k, v) for part in (slice(8), slice(8, 13))]
    )
    keys, values = torch.cat([k[0, 0], means[:2]]), torch.cat([v[0, 0], means[2:]])
    rows = m[0, 0].repeat_interleave(16, 0)[:21]
    tokens = rows.repeat_interleave(8, 1)[:, :13].log()
    blocks = (1 - rows).log() + torch.tensor([8.0, 5.0]).double().log() + bias
    logits = q[0, 0] @ keys.t() / 3**0.5 + torch.cat([tokens, blocks], 1)
    expected = (torch.softmax(logits, -1) @ values)[None, None]
    leaves = (q, k, v, m, bias)
    found = with_gradients(soft(q, k, v, m, bias), leaves)
    for a, b in zip(found, with_gradients(expected, leaves)):
        b = torch.where(torch.isfinite(b), b, a.detach())  # where the logs have no gradient
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        assert torch.isfinite(a).all()
    inner = torch.rand(mask.shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(soft, (q, k, v, inner, bias))


def test_bias_is_learned_or_absent_and_starts_at_zero():
    config = SLA2Config(head_dim=8, num_heads=2, topk=0.3, complement="pooled", **BLOCKS)
    attn = SLA2Attention(config).to(torch.bfloat16)
    assert config.alpha == "joint"
    assert attn.groups()["pooled"][0].dtype == torch.float32
    assert (attn.complement.bias == 0).all()
    q, k, v, _, _ = inputs(dtype=torch.bfloat16)
    attn(q, k, v).float().square().mean().backward()
    assert (attn.complement.bias.grad != 0).all()
    bare = SLA2Attention(config.replaced(router="heuristic", options={"pooled_bias": False}))
    assert list(bare.parameters()) == []
    with torch.no_grad():
        torch.testing.assert_close(bare(q, k, v), attn(q, k, v))
        some = attn.attend(q[:, 1:], k[:, 1:], v[:, 1:], heads=[1]).out  # as under Ulysses
        torch.testing.assert_close(some, attn(q, k, v)[:, 1:])


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"complement": "pooled", "alpha": "mass"}, "alpha: expected 'joint' for complement='pool"),
        ({"complement": "linear", "alpha": "joint"}, "alpha: expected a mixing of separate branc"),
        ({"options": {"pooled_bias": False}}, "options: expected one of tile, got 'pooled_bias'"),
    ],
)
def test_members_that_do_not_go_together_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        SLA2Config(head_dim=8, num_heads=2, topk=0.3, **changes)


@pytest.mark.parametrize(
    ("bias", "error"),
    [
        (0.5, TypeError),
        (torch.zeros(2, dtype=torch.int64), TypeError),
        (torch.zeros(3), ValueError),
    ],
)
def test_a_bad_bias_is_one_line(bias, error):
    q, k, v, _, mask = inputs()
    with pytest.raises(error, match=r"^bias: expected") as caught:
        pooled_attention(q, k, v, map_of(mask), bias)
    assert "\n" not in str(caught.value)
