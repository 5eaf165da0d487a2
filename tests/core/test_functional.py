"""sla2_attention and block_sparse_attention: every backend against the dense reference, exactness,
edges, bad input.
"""

import warnings

import pytest
import torch
from sla2_core import (
    BlockMap,
    SLA2Config,
    backends,
    block_sparse_attention,
    sla2_attention,
    sla_attention,
)
from sla2_core.attend import Parts, soft_attend
from sla2_core.backends.base import Problem
from sla2_core.backends.pooling import smooth_keys
from sla2_core.complement.linear import Linear
from sla2_core.options import make_options
from sla2_core.reference import (
    full_attention,
    linear_branch,
    routed_mass,
    sla2_reference,
)
from sla2_core.registry import MIXINGS

BLOCKS = {"block_q": 16, "block_k": 8}
LOW_BIT = ("int8", "int8_int8", "fp8", "int4", "nvfp4")


def inputs(n_q=63, n_k=111, d=8, dtype=torch.float32, seed=0, b=2, h=2):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(b, h, n, d, generator=generator, dtype=torch.float64) for n in (n_q, n_k, n_k)
    )
    t_m, t_n = -(-n_q // 16), -(-n_k // 8)
    mask = torch.rand(b, h, t_m, t_n, generator=generator) < 0.3
    mask[..., 0] = True
    alpha = torch.rand(1, h, t_m, generator=generator, dtype=torch.float64)
    q, k, v, alpha = (x.to(dtype).requires_grad_() for x in (q, k + 1.5, v, alpha))
    return q, k, v, alpha, mask, BlockMap.from_mask(mask, n_q=n_q, n_k=n_k, **BLOCKS)


def with_gradients(function, *leaves):
    out = function()
    weight = torch.sin(torch.arange(out.numel(), dtype=torch.float64)).view_as(out).to(out.dtype)
    return (out, *torch.autograd.grad((out * weight).sum(), leaves))


@pytest.mark.parametrize(("n_q", "n_k"), [(63, 111), (200, 200), (1, 1), (16, 9)])
@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("backend", ["cpu", "blocked"])
def test_backends_equal_the_reference_with_every_gradient(n_q, n_k, smooth, backend, monkeypatch):
    # Several chunks of uneven size, in the sparse branch and in the complement.
    monkeypatch.setattr("sla2_core.backends.blocked._CHUNK_ELEMENTS", 5000)
    monkeypatch.setattr("sla2_core.attend._CHUNK_ELEMENTS", 300)
    q, k, v, alpha, _, bm = inputs(n_q, n_k, dtype=torch.float64)
    pair = [
        with_gradients(
            lambda b=b: sla2_attention(q, k, v, bm, alpha, smooth_k=smooth, backend=b),
            q,
            k,
            v,
            alpha,
        )
        for b in (backend, "reference")
    ]
    for fast, plain in zip(*pair):
        torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_within_twice_that_of_dense_attention_in_the_same_dtype(dtype):
    q, k, v, alpha, _, bm = inputs(200, 200, d=16, dtype=torch.float64)
    q, k, v, alpha = (x.detach().to(dtype).double().requires_grad_() for x in (q, k, v, alpha))
    exact = with_gradients(lambda: sla2_reference(q, k, v, bm, alpha), q, k, v)
    dense = with_gradients(lambda: full_attention(q, k, v), q, k, v)
    low = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    fast = with_gradients(lambda: sla2_attention(*low, bm, alpha.detach(), backend="cpu"), *low)
    plain = with_gradients(lambda: torch.nn.functional.scaled_dot_product_attention(*low), *low)
    for i, (a, e, p, f) in enumerate(zip(fast, exact, plain, dense)):
        # smoothing sums over all keys, so dK's error is compared with the error of the dense
        # gradient plus one rounding
        floor = 2 * torch.finfo(dtype).eps * e.abs().max()
        assert (a - e).abs().max() <= (3 if i else 2) * (p - f).abs().max() + floor


@pytest.mark.parametrize("precision", LOW_BIT)
@pytest.mark.parametrize("qat_backward", ["paper", "matched"])
@pytest.mark.parametrize("backend", ["cpu", "blocked"])
def test_low_bit_forward_matches_its_plain_definition(precision, qat_backward, backend):
    q, k, v, alpha, _, bm = inputs(dtype=torch.float64, d=16)
    options = {"precision": precision, "qat_backward": qat_backward, "kv_lengths": [111, 50]}
    fast = with_gradients(
        lambda: sla2_attention(q, k, v, bm, alpha, backend=backend, **options), q, k, v, alpha
    )
    plain = with_gradients(lambda: sla2_reference(q, k, v, bm, alpha, **options), q, k, v, alpha)
    for a, b in zip(fast, plain):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    if qat_backward == "paper":  # the 16-bit gradient is near the full-precision one
        full = with_gradients(
            lambda: sla2_reference(q, k, v, bm, alpha, kv_lengths=[111, 50]), q, k, v, alpha
        )
        for a, b in zip(fast[1:4], full[1:4]):
            cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)
            assert cosine > (0.9 if precision in ("int4", "nvfp4") else 0.998)


@pytest.mark.parametrize("backend", ["cpu", "blocked", "reference"])
def test_paper_backward_is_alg_3_with_the_forward_lse_and_output(backend):
    q, k, v, _, mask, bm = inputs(dtype=torch.float64)
    out, lse = block_sparse_attention(q, k, v, bm, precision="int8", backend=backend)
    grad = torch.randn_like(out)
    got = torch.autograd.grad((out * grad).sum(), (q, k, v))
    tokens = mask.repeat_interleave(16, 2)[:, :, :63].repeat_interleave(8, 3)[..., :111]
    scores = q @ k.transpose(-1, -2) * 8**-0.5
    p = torch.where(tokens, torch.exp(scores - lse[..., None]), 0.0)
    ds = p * (grad @ v.transpose(-1, -2) - (grad * out).sum(-1, keepdim=True)) * 8**-0.5
    for a, b in zip(got, (ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ grad)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_exact_mass_and_exact_complement_give_full_attention_in_fp32():
    q, k, v, _, _, bm = inputs(64, 111, dtype=torch.float32)
    mass = routed_mass(q, k, bm)
    # alpha is one value per query block: with blocks of one token it is exact for every token
    fine = BlockMap.from_mask(
        bm.mask().repeat_interleave(16, 2), block_q=1, block_k=8, n_q=64, n_k=111
    )
    out = sla2_reference(q, k, v, fine, mass, complement="exact")
    assert (out - full_attention(q, k, v)).abs().max() < 1e-5


@pytest.mark.parametrize("backend", ["cpu", "blocked", "reference"])
def test_every_block_selected_is_full_attention_whatever_alpha(backend):
    q, k, v, alpha, mask, _ = inputs(dtype=torch.float32)
    bm = BlockMap.from_mask(torch.ones_like(mask), n_q=63, n_k=111, **BLOCKS)
    out = sla2_attention(q, k, v, bm, alpha, backend=backend)
    assert (out - full_attention(q, k, v)).abs().max() < 1e-5
    assert torch.autograd.grad(out.sum(), alpha)[0].abs().max() == 0


@pytest.mark.parametrize("backend", ["cpu", "blocked", "reference"])
def test_no_block_selected_is_linear_attention(backend):
    q, k, v, alpha, mask, _ = inputs(dtype=torch.float32)
    bm = BlockMap.from_mask(torch.zeros_like(mask), n_q=63, n_k=111, **BLOCKS)
    out = sla2_attention(q, k, v, bm, alpha, backend=backend)
    torch.testing.assert_close(
        out, linear_branch(q, smooth_keys(k), v, torch.ones(())), rtol=1e-4, atol=1e-5
    )
    o_s, lse = block_sparse_attention(q, k, v, bm, backend=backend)
    assert (o_s == 0).all()
    assert (lse == -torch.inf).all()
    assert torch.isfinite(
        torch.cat([g.flatten() for g in torch.autograd.grad(out.sum(), (q, k, v, alpha))])
    ).all()


@pytest.mark.parametrize("backend", ["cpu", "blocked", "reference"])
def test_kv_lengths_equal_a_shorter_sequence(backend):
    q, k, v, alpha, mask, bm = inputs(dtype=torch.float64)
    out = sla2_attention(q, k, v, bm, alpha, kv_lengths=torch.tensor([50, 111]), backend=backend)
    short = BlockMap.from_mask(mask[:1, :, :, :7], n_q=63, n_k=50, **BLOCKS)
    alone = sla2_attention(q[:1], k[:1, :, :50], v[:1, :, :50], short, alpha, backend=backend)
    torch.testing.assert_close(out[:1], alone, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(
        out[1:], sla2_attention(q, k, v, bm, alpha, backend=backend)[1:], rtol=1e-10, atol=1e-11
    )
    padded = k.detach().clone()
    padded[0, :, 50:] = float("nan")  # padding never counts, whatever it holds
    again = sla2_attention(q, padded, v, bm, alpha, kv_lengths=[50, 111], backend=backend)
    torch.testing.assert_close(again, out)


@pytest.mark.parametrize("backend", ["cpu", "blocked", "reference"])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_are_never_hidden(backend, which, bad):
    tensors = list(inputs(dtype=torch.float32))
    x = tensors[which].detach().clone()
    x[0, 0, 5, 2] = bad
    tensors[which] = x
    q, k, v, alpha, _, bm = tensors
    out = sla2_attention(q, k, v, bm, alpha, backend=backend)
    assert not torch.isfinite(out[0, 0]).all()
    assert torch.isfinite(out[1]).all()


@pytest.mark.parametrize("backend", ["cpu", "blocked", "reference"])
@pytest.mark.parametrize("precision", ["full", "nvfp4"])
@pytest.mark.parametrize(
    ("of_q", "of_k"), [(-torch.inf, 1.0), (1e30, -1e30)], ids=["infinite", "overflow"]
)
def test_a_row_whose_selected_scores_are_all_minus_infinity_is_not_taken_for_an_empty_one(
    backend, precision, of_q, of_k
):
    q, k, v = (torch.full((1, 1, n, 4), value) for n, value in ((1, of_q), (2, of_k), (2, 1.0)))
    bm = BlockMap.from_mask(torch.tensor([[[[True, False]]]]), block_q=1, block_k=1, n_q=1, n_k=2)
    for x in (q, q.requires_grad_()):
        out, _ = block_sparse_attention(x, k, v, bm, precision=precision, backend=backend)
        assert not torch.isfinite(out).any()
    assert not torch.isfinite(torch.autograd.grad(out.sum(), q)[0]).all()


def test_repeated_runs_are_bit_equal():
    q, k, v, alpha, _, bm = inputs()
    first, second = (
        with_gradients(lambda: sla2_attention(q, k, v, bm, alpha, precision="int8"), q, k, v, alpha)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_gradcheck_of_the_reference():
    q, k, v, alpha, _, bm = inputs(9, 13, d=3, dtype=torch.float64, b=1, h=1)
    assert torch.autograd.gradcheck(lambda *x: sla2_reference(*x[:3], bm, x[3]), (q, k, v, alpha))


def soft(q, k, v, mask, alpha):
    """soft_attend with the linear complement and a given alpha, in blocks of 16 x 8."""
    options = make_options(16, 8, "full", "paper", False)
    config = SLA2Config(head_dim=q.shape[3], num_heads=q.shape[1], topk=0.5, **BLOCKS)
    parts = Parts(Linear(), MIXINGS.make(config))
    return soft_attend(q, k, v, mask, alpha, parts, lengths=None, options=options)


def test_soft_attention_with_a_hard_mask_is_the_operator_and_full_attention():
    q, k, v, alpha, mask, bm = inputs(dtype=torch.float64)
    out, full = soft(q, k, v, mask.double(), alpha)
    torch.testing.assert_close(out, sla2_reference(q, k, v, bm, alpha, smooth_k=False))
    torch.testing.assert_close(full, full_attention(q, k, v))


def test_soft_attention_matches_its_definition_and_gradchecks_on_some_rows():
    q, k, v, alpha, _, _ = inputs(21, 13, d=3, dtype=torch.float64, b=1, h=1)
    m = torch.rand(1, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    weights = m.repeat_interleave(16, 2)[:, :, :21].repeat_interleave(8, 3)[..., :13]
    e = torch.exp(q @ k.transpose(-1, -2) / 3**0.5) * weights
    o_s = e @ v / e.sum(-1, keepdim=True)
    a = alpha.repeat_interleave(16, 2)[:, :, :21, None]
    expected = a * o_s + (1 - a) * linear_branch(q, k, v, 1 - weights)
    torch.testing.assert_close(soft(q, k, v, m, alpha)[0], expected)
    assert torch.autograd.gradcheck(
        lambda m, a: soft(q.detach(), k.detach(), v.detach(), m, a)[0], (m, alpha)
    )


@pytest.mark.parametrize("qat_backward", ["paper", "matched"])
def test_backends_agree_on_the_backward_of_a_low_bit_forward(qat_backward):
    q, k, v, alpha, _, bm = inputs(dtype=torch.float64)
    options = dict(precision="int4", qat_backward=qat_backward)
    calls = (
        lambda backend: sla2_attention(q, k, v, bm, alpha, backend=backend, **options),
        lambda backend: block_sparse_attention(q, k, v, bm, backend=backend, **options)[0],
        lambda backend: sla_attention(q, k, v, bm, backend=backend, **options),
    )
    for call in calls:
        fast, plain = (
            torch.autograd.grad(call(backend).sin().sum(), (q, k, v))
            for backend in ("cpu", "reference")
        )
        for a, b in zip(fast, plain):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_the_backward_of_the_reference_does_not_touch_its_value():
    q, k, v, alpha, _, bm = inputs(dtype=torch.float64)
    q, k = 1e4 * q, 1e4 * k  # exp(S - L) overflows: L is that of rounded scores
    out = sla2_reference(q, k, v, bm, alpha, precision="int8")
    with torch.no_grad():
        assert torch.equal(out, sla2_reference(q, k, v, bm, alpha, precision="int8"))
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("backend", ["cpu", "blocked", "reference"])
def test_autocast_lowers_the_inputs_and_nothing_else(backend):
    q, k, v, _, _, bm = inputs()
    low = [x.to(torch.bfloat16) for x in (q, k, v)]
    calls = (
        lambda q, k, v: sla2_attention(q, k, v, bm, 0.5, backend=backend),
        lambda q, k, v: block_sparse_attention(q, k, v, bm, backend=backend)[1],
        lambda q, k, v: sla_attention(q, k, v, bm, torch.eye(8), backend=backend),
    )
    for call in calls:
        with torch.autocast("cpu", torch.bfloat16):
            found = call(q, k, v)
        assert torch.equal(found, call(*low))
        assert found.dtype == call(*low).dtype


def test_a_number_as_alpha_is_exact_in_fp64():
    q, k, v, _, _, bm = inputs(dtype=torch.float64)
    alpha = torch.full((1, 1, 1), 0.8, dtype=torch.float64)
    for call in (sla2_attention, sla2_reference):
        assert torch.equal(call(q, k, v, bm, 0.8), call(q, k, v, bm, alpha))


def test_the_reference_backend_needs_no_kernel(monkeypatch):
    q, k, v, alpha, _, bm = inputs(dtype=torch.float64)
    calls = (
        lambda backend: sla2_attention(
            q, k, v, bm, alpha, smooth_k=False, kv_lengths=[111, 50], backend=backend
        ),
        lambda backend: sla_attention(
            q, k, v, bm, torch.eye(8), kv_lengths=[111, 50], backend=backend
        ),
    )
    expected = [call("cpu") for call in calls]
    monkeypatch.setattr("sla2_core.backends.ops.attention", None)
    for call, value in zip(calls, expected):
        torch.testing.assert_close(call("reference"), value, rtol=1e-9, atol=1e-10)


def test_sla_adds_the_projected_linear_branch_over_all_blocks():
    q, k, v, _, _, bm = inputs(dtype=torch.float64)
    o_s, _ = block_sparse_attention(q, k, v, bm)
    torch.testing.assert_close(sla_attention(q, k, v, bm), o_s)
    weight, bias = torch.randn(8, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    o_l = linear_branch(q, k, v, torch.ones((), dtype=torch.float64))
    expected = o_s + torch.nn.functional.linear(o_l, weight, bias)
    torch.testing.assert_close(
        sla_attention(q, k, v, bm, weight, bias), expected, rtol=1e-9, atol=1e-10
    )


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"q": torch.zeros(2, 63, 8)}, ValueError, "q: expected 4 dimensions"),
        ({"k": torch.zeros(2, 2, 111, 4)}, ValueError, "k: expected shape"),
        ({"v": torch.zeros(2, 2, 110, 8)}, ValueError, "v: expected shape"),
        ({"v": torch.zeros(2, 2, 111, 8, dtype=torch.float64)}, TypeError, "v: expected q's dtype"),
        ({"q": torch.zeros(2, 2, 63, 8, dtype=torch.int32)}, TypeError, "q: expected float64"),
        ({"q": torch.zeros(2, 2, 0, 8)}, ValueError, "q: expected no empty dimension"),
        ({"k": torch.zeros(2, 2, 111, 8, device="meta")}, ValueError, "k: expected q's device"),
        ({"alpha": torch.zeros(2, 2, 3)}, ValueError, "alpha: expected shape"),
        ({"alpha": 1.5}, ValueError, "alpha: expected a value"),
        ({"precision": "int3"}, ValueError, "precision: expected one of"),
        ({"backend": "gpu"}, ValueError, "backend: expected one of"),
        ({"kv_lengths": [0, 5]}, ValueError, "kv_lengths: expected values in"),
        ({"kv_lengths": [5]}, ValueError, "kv_lengths: expected shape"),
        ({"kv_lengths": ["a", "b"]}, TypeError, "kv_lengths: expected integers"),
        ({"kv_lengths": [None, 5]}, TypeError, "kv_lengths: expected integers"),
        ({"block_map": "map"}, TypeError, "block_map: expected a"),
        (
            {"block_map": torch.ones(2, 2, 4, 14, dtype=torch.bool)},
            TypeError,
            "block_map: expected a",
        ),
    ],
)
def test_bad_input_is_one_line_that_names_the_argument(change, error, match):
    q, k, v, alpha, _, bm = inputs()
    arguments = {"q": q, "k": k, "v": v, "block_map": bm, "alpha": alpha, **change}
    with pytest.raises(error, match=match) as caught:
        sla2_attention(**arguments)
    assert "\n" not in str(caught.value)


def test_a_map_for_other_lengths_or_heads_is_refused():
    q, k, v, alpha, mask, _ = inputs()
    other = BlockMap.from_mask(mask, n_q=63, n_k=112, **BLOCKS)
    with pytest.raises(ValueError, match="block_map: expected a map for N_q=63, N_k=111"):
        sla2_attention(q, k, v, other, alpha)
    fewer = BlockMap.from_mask(mask[:, :1], n_q=63, n_k=111, **BLOCKS)
    with pytest.raises(ValueError, match="block_map: expected \\(B, H\\)"):
        sla2_attention(q, k, v, fewer, alpha)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU lacks")
def test_cuda_without_a_gpu_says_in_one_line_what_is_missing():
    q, k, v, alpha, _, bm = inputs()
    with pytest.raises(RuntimeError, match=r"^backend='cuda': ") as caught:
        sla2_attention(q, k, v, bm, alpha, backend="cuda")
    assert "\n" not in str(caught.value)


def problem(device="cpu", dtype=torch.float32, precision="full"):
    options = make_options(16, 8, precision, "paper", False)
    return Problem(dtype, torch.device(device), 16, options)


def test_auto_falls_back_to_blocks_in_plain_torch_with_one_warning(monkeypatch):
    backends._warn_once.cache_clear()
    monkeypatch.setattr("sla2_core.backends.cuda.missing", lambda: "no GPU here")
    with pytest.warns(RuntimeWarning, match="plain torch runs, block by block.*: no GPU here"):
        assert backends.resolve("auto", problem("cuda")).name == "blocked"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.resolve("auto", problem("cuda")).name == "blocked"
        assert backends.resolve("auto", problem("cpu", precision="nvfp4")).name == "cpu"
