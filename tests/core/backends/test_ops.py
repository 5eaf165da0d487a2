"""The custom ops: opcheck, torch.compile equals eager, the same with one and two threads, dtypes
and what is returned.
"""

import pytest
import torch
from sla2_core import BlockMap, SLA2Attention, SLA2Config, sla2_attention
from sla2_core.backends import BACKENDS, kernels, ops, register_backend
from sla2_core.backends.blocked import BlockedBackend
from sla2_core.options import make_options
from sla2_core.reference import full_attention, sla2_reference

BLOCKS = {"block_q": 16, "block_k": 8}


def how(precision="full", backend="cpu", save=True):
    """The last arguments of ops.attention."""
    return make_options(16, 8, precision, "paper", False).text, backend, save


def inputs(n_q=63, n_k=111, d=8, dtype=torch.float32, b=2, h=2):
    generator = torch.Generator().manual_seed(3)
    q, k, v = (
        torch.randn(b, h, n, d, generator=generator, dtype=torch.float64).to(dtype)
        for n in (n_q, n_k, n_k)
    )
    t_m, t_n = -(-n_q // 16), -(-n_k // 8)
    mask = torch.rand(b, h, t_m, t_n, generator=generator) < 0.3
    mask[0, 0, 0], mask[-1, -1, -1] = True, False  # every block, and none
    alpha = torch.rand(b, h, t_m, generator=generator, dtype=torch.float64).to(dtype)
    return q, k, v, alpha, BlockMap.from_mask(mask, n_q=n_q, n_k=n_k, **BLOCKS)


@pytest.mark.parametrize("precision", ["full", "int8"])
@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("lengths", [None, torch.tensor([50, 111])])
def test_opcheck(precision, mixed, lengths):
    q, k, v, alpha, bm = inputs()
    for x in (q, k, v, alpha):
        x.requires_grad_()
    alpha = alpha if mixed else None
    call = (q, k, v, bm.indices, bm.counts, alpha, lengths)
    torch.library.opcheck(ops.attention, (*call, *how(precision)))
    with torch.no_grad():
        results = ops.attention(*call, *how(precision))
        call = [x if x is None or not x.requires_grad else x.detach() for x in call]
        arguments = (torch.ones_like(results[0]), None, *call, results, *how(precision)[:2])
        torch.library.opcheck(ops.attention_backward, arguments)


@pytest.mark.parametrize("precision", ["full", "nvfp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_of_plain_torch_with_the_gradient_of_the_log_sum_exp(precision, dtype):
    q, k, v, _, bm = inputs(dtype=dtype)
    for x in (q, k, v):
        x.requires_grad_()
    call = (q, k, v, bm.indices, bm.counts, None, torch.tensor([50, 111]))
    torch.library.opcheck(ops.attention, (*call, *how(precision, "blocked")))
    with torch.no_grad():
        results = ops.attention(*call, *how(precision, "blocked"))
    call = [x.detach() if x is not None and x.requires_grad else x for x in call]
    grads = (torch.ones_like(results[0]), torch.ones_like(results[1]))
    arguments = (*grads, *call, results, *how(precision, "blocked")[:2])
    torch.library.opcheck(ops.attention_backward, arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_opcheck_of_other_dtypes(dtype):
    q, k, v, alpha, bm = inputs(dtype=dtype)
    call = (q, k, v, bm.indices, bm.counts, alpha, None)
    torch.library.opcheck(ops.attention, (*call, *how()))


def test_opcheck_of_soft_top_k():
    torch.library.opcheck(kernels.soft_top_k, (torch.randn(2, 3, 7), torch.full((1, 1, 1), 2.0)))


def test_gradcheck():
    q, k, v, alpha = (
        x.requires_grad_() for x in inputs(5, 9, d=2, dtype=torch.float64, b=1, h=1)[:4]
    )
    mask = torch.tensor([[[[True, False]]]])
    bm = BlockMap.from_mask(mask, n_q=5, n_k=9, **BLOCKS)

    def run(q, k, v, alpha):
        return ops.attention(q, k, v, bm.indices, bm.counts, alpha, None, *how())[0]

    assert torch.autograd.gradcheck(run, (q, k, v, alpha))


@pytest.mark.parametrize("alpha", ["position", "mass"])
def test_a_compiled_module_equals_the_eager_one_with_every_gradient(alpha):
    q, k, v = (x.requires_grad_() for x in inputs()[:3])
    attn = SLA2Attention(SLA2Config(head_dim=8, num_heads=2, topk=0.3, alpha=alpha, **BLOCKS))
    leaves = (q, k, v, *attn.mixing.parameters())
    found = []
    for call in (torch.compile(attn, fullgraph=True, backend="aot_eager"), attn):
        out = call(q, k, v)
        found.append((out, *torch.autograd.grad(torch.sin(out).sum(), leaves)))
    for compiled, eager in zip(*found):
        torch.testing.assert_close(compiled, eager, rtol=0, atol=0)


def test_a_compiled_module_takes_kv_lengths_and_refuses_bad_ones():
    q, k, v = (x.requires_grad_() for x in inputs()[:3])
    attn = SLA2Attention(SLA2Config(head_dim=8, num_heads=2, topk=0.3, **BLOCKS))
    compiled = torch.compile(attn, fullgraph=True, backend="aot_eager")
    for lengths in ([50, 111], [1, 9]):  # one graph
        found = []
        for call in (compiled, attn):
            out = call(q, k, v, kv_lengths=torch.tensor(lengths))
            found.append((out, *torch.autograd.grad(torch.sin(out).sum(), (q, k, v))))
        for fast, eager in zip(*found):
            torch.testing.assert_close(fast, eager, rtol=0, atol=0)
    with pytest.raises(ValueError, match="kv_lengths: expected values in"):
        compiled(q, k, v, kv_lengths=torch.tensor([50, 112]))


@pytest.mark.slow
def test_inductor_equals_eager_with_every_gradient():
    q, k, v = (x.requires_grad_() for x in inputs()[:3])
    attn = SLA2Attention(SLA2Config(head_dim=8, num_heads=2, topk=0.3, **BLOCKS))
    leaves = (q, k, v, *attn.mixing.parameters())
    found = []
    for call in (torch.compile(attn, fullgraph=True), attn):
        out = call(q, k, v)
        found.append((out, *torch.autograd.grad(torch.sin(out).sum(), leaves)))
    for compiled, eager in zip(*found):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-6)


def test_a_compiled_function_equals_the_eager_one():
    q, k, v, alpha, bm = inputs()
    compiled = torch.compile(
        lambda *x: sla2_attention(*x[:3], bm, x[3]), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(q, k, v, alpha), sla2_attention(q, k, v, bm, alpha))


def test_one_and_two_threads_agree_to_the_bit(monkeypatch):
    monkeypatch.setattr("sla2_core.backends.cpu._ALONE", 0)
    leaves = [x.requires_grad_() for x in inputs(200, 333)[:4]]
    bm = inputs(200, 333)[4]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            call = (*leaves[:3], bm.indices, bm.counts, leaves[3], None)
            out = ops.attention(*call, *how())[0]
            found.append((out, *torch.autograd.grad(torch.sin(out).sum(), leaves)))
    finally:
        torch.set_num_threads(before)
    for one, two, again in zip(*found):
        assert torch.equal(one, two)
        assert torch.equal(two, again)


@pytest.mark.parametrize(
    ("n_q", "n_k", "d"), [(63, 111, 64), (200, 63, 128), (111, 200, 48), (1, 1, 16)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tolerance_rule_with_blocks_of_128_x_64(n_q, n_k, d, dtype):
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 2, n, d, generator=generator).to(dtype) for n in (n_q, n_k, n_k))
    mask = torch.zeros(1, 2, -(-n_q // 128), -(-n_k // 64), dtype=torch.bool)
    mask[..., ::2] = True
    bm = BlockMap.from_mask(mask, block_q=128, block_k=64, n_q=n_q, n_k=n_k)
    high = [x.double().requires_grad_() for x in (q, k, v)]
    low = [x.clone().requires_grad_() for x in (q, k, v)]
    plain = [x.clone().requires_grad_() for x in (q, k, v)]

    def outputs(out, leaves):
        return (out, *torch.autograd.grad(torch.sin(out).sum(), leaves))

    exact = outputs(sla2_reference(*high, bm, 0.6), high)
    fast = outputs(sla2_attention(*low, bm, 0.6), low)
    dense = outputs(torch.nn.functional.scaled_dot_product_attention(*plain), plain)
    full = outputs(full_attention(*high), high)
    for i, (a, e, p, f) in enumerate(zip(fast, exact, dense, full)):
        floor = 2 * torch.finfo(dtype).eps * e.abs().max()
        assert a.dtype == dtype
        assert (a - e).abs().max() <= (3 if i else 2) * (p - f).abs().max() + floor


def test_strided_inputs_and_gradients():
    q, k, v, alpha, bm = inputs()
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    plain = [x.clone().requires_grad_() for x in (q, k, v)]
    found = []
    for leaves in (turned, plain):
        out = ops.attention(*leaves, bm.indices, bm.counts, alpha, None, *how())[0]
        grad = torch.ones(out.shape[::-1]).permute(3, 2, 1, 0)
        found.append((out, *torch.autograd.grad(out, leaves, grad)))
    assert all(torch.equal(a, b) for a, b in zip(*found))


class Counting(BlockedBackend):
    """A backend from outside the package: plain torch that counts its forward calls."""

    name = "counting"
    calls = 0

    def forward(self, call, options, save):
        """As `blocked`."""
        type(self).calls += 1
        return super().forward(call, options, save)


def test_a_backend_of_one_s_own_is_chosen_by_its_name(monkeypatch):
    monkeypatch.setattr(Counting, "calls", 0)
    monkeypatch.setitem(BACKENDS, "counting", None)  # gone again after the test
    register_backend(Counting())
    q, k, v, alpha, bm = inputs()
    out = sla2_attention(q, k, v, bm, alpha, backend="counting")
    expected = sla2_attention(q, k, v, bm, alpha, backend="blocked")
    assert torch.equal(out, expected)
    assert Counting.calls == 1
    config = SLA2Config(head_dim=8, num_heads=2, topk=0.3, backend="counting", **BLOCKS)
    SLA2Attention(config)(q, k, v)
    assert Counting.calls == 2
    assert SLA2Config.from_dict(config.to_dict()) == config


def test_an_unknown_backend_is_refused_with_the_names_there_are():
    q, k, v, alpha, bm = inputs()
    names = "auto, blocked, cpu, cuda, emulator, reference"
    message = f"backend: expected one of {names}, got 'counting'"
    with pytest.raises(ValueError, match=message):
        SLA2Config(head_dim=8, num_heads=2, topk=0.3, backend="counting")
    with pytest.raises(ValueError, match=message):
        sla2_attention(q, k, v, bm, alpha, backend="counting")
