"""The custom ops over the CUDA kernels: values, gradients, opcheck, torch.compile, what they
refuse.

On the emulator, or with SLA2_TEST_TARGET=cuda (`make gpu-check` sets it) on the GPU.
"""

import dataclasses
import os
import warnings

import pytest
import torch
from sla2_core import BlockMap, SLA2Attention, SLA2Config, SLAAttention, backends
from sla2_core.backends import cuda as cuda_ops
from sla2_core.backends import cuda_routed, ops
from sla2_core.backends.base import Inputs, Problem
from sla2_core.backends.pooling import pool
from sla2_core.backends.run_precision import precision_to_run
from sla2_core.functional import block_sparse_attention, sla2_attention, sla_attention
from sla2_core.options import make_options
from sla2_core.reference import sla2_reference
from sla2_core.routing import top_k_map
from sla2_core.variants import sla
from sla2_kernels.problem import Device

BLOCKS = {"block_q": 32, "block_k": 16}
SIZES = tuple(BLOCKS.values())
TARGET = os.environ.get("SLA2_TEST_TARGET", "emulator")
DEVICE = "cuda" if TARGET == "cuda" else "cpu"
pytestmark = [pytest.mark.gpu] if TARGET == "cuda" else []


def how(save=True):
    """The last arguments of ops.attention."""
    return make_options(*SIZES, "full", "paper", True).text, TARGET, save


def inputs(n_q=63, n_k=111, d=64, dtype=torch.bfloat16, b=1, h=2):
    """q, k, v, dO, alpha, and a map with a row of every block and a row of none."""
    generator = torch.Generator().manual_seed(5)
    q, k, v, grad = (
        torch.randn(b, h, n, d, generator=generator).to(DEVICE, dtype) for n in (n_q, n_k, n_k, n_q)
    )
    t_m, t_n = -(-n_q // 32), -(-n_k // 16)
    mask = torch.rand(b, h, t_m, t_n, generator=generator) < 0.4
    mask[0, 0, 0], mask[-1, -1, -1] = True, False
    block_map = BlockMap.from_mask(mask.to(DEVICE), n_q=n_q, n_k=n_k, **BLOCKS)
    return q, k + 0.5, v, grad, torch.rand(1, h, t_m, generator=generator).to(DEVICE), block_map


def gradients(call, leaves, grad):
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def assert_as_good(found, exact, plain):
    """Error against fp64 within 2 times (gradients: 3 times) that of dense torch in 16 bit."""
    for index, (x, right, rounded) in enumerate(zip(found, exact, plain, strict=True)):
        factor, floor = (3 if index else 2), 1e-3 * right.abs().max()
        error, allowed = x.double() - right, rounded.double() - right
        assert error.abs().max() <= factor * allowed.abs().max() + floor, index
        assert (
            error.square().mean().sqrt() <= factor * allowed.square().mean().sqrt() + floor / 5
        ), index


@pytest.mark.parametrize(
    ("n_q", "n_k", "d", "dtype"),
    [
        (63, 111, 64, torch.bfloat16),
        (33, 17, 40, torch.bfloat16),
        (33, 17, 40, torch.float16),
        (100, 95, 128, torch.float16),
        pytest.param(63, 111, 64, torch.float16, marks=pytest.mark.slow),
        pytest.param(100, 95, 128, torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_sla2_attention_against_the_reference_with_every_gradient(n_q, n_k, d, dtype):
    *leaves, grad, alpha, block_map = inputs(n_q, n_k, d, dtype)

    def call(function, **options):
        return lambda q, k, v, a: function(q, k, v, block_map, a, **options)

    wide = [x.double() for x in (*leaves, alpha)]
    found = gradients(call(sla2_attention, backend=TARGET), (*leaves, alpha), grad)
    exact = gradients(call(sla2_reference), wide, grad)
    plain = gradients(call(sla2_reference), [x.to(dtype) for x in wide], grad)
    assert_as_good(found, exact, plain)
    assert found[0].dtype == dtype
    assert found[-1].shape == alpha.shape


@pytest.mark.parametrize("lengths", [None, [50]])
def test_the_sparse_branch_alone_and_its_lse(lengths):
    *leaves, grad, _, block_map = inputs()

    def call(backend):
        return lambda q, k, v: block_sparse_attention(
            q, k, v, block_map, backend=backend, kv_lengths=lengths
        )[0]

    wide = [x.double() for x in leaves]
    found = gradients(call(TARGET), leaves, grad)
    assert_as_good(
        found, gradients(call("reference"), wide, grad), gradients(call("reference"), leaves, grad)
    )
    lse = [
        block_sparse_attention(*x, block_map, backend=b, kv_lengths=lengths)[1]
        for x, b in ((leaves, TARGET), (wide, "reference"))
    ]
    torch.testing.assert_close(lse[0].double(), lse[1], atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("precision", ["int8", "int8_int8", "fp8"])
@pytest.mark.parametrize("qat_backward", ["paper", "matched"])
def test_low_bit_forward_and_its_backward(precision, qat_backward):
    *leaves, grad, alpha, _ = inputs(d=48)
    mask = torch.rand(1, 2, 2, 4, generator=torch.Generator().manual_seed(2)) < 0.5
    block_map = BlockMap.from_mask(mask, n_q=63, n_k=111, block_q=32, block_k=32)

    def run(precision, backend, device):
        def call(q, k, v, a):
            options = dict(
                precision=precision, qat_backward=qat_backward, smooth_k=False, backend=backend
            )
            return sla2_attention(q, k, v, block_map.to(device), a, **options)

        found = gradients(call, [x.to(device) for x in (*leaves, alpha)], grad.to(device))
        return [x.double().cpu() for x in found]

    low, numba, full = (
        run(precision, TARGET, DEVICE),
        run(precision, "cpu", "cpu"),
        run("full", TARGET, DEVICE),
    )
    assert 1e-3 < (low[0] - full[0]).norm() / full[0].norm() < 0.1
    for x, y in zip(low, numba, strict=True):  # the same formulas, rounding apart
        assert (x - y).norm() <= 0.02 * y.norm()


@pytest.mark.parametrize("alpha", ["position", "mass", "one", "published SLA"])
@pytest.mark.parametrize("lengths", [None, [70]])
def test_the_modules_agree_with_the_cpu_kernels_in_every_gradient(alpha, lengths):
    *qkv, grad, _, _ = inputs(111, 95)
    torch.manual_seed(0)
    if alpha == "published SLA":
        base = sla(SLA2Config(head_dim=64, num_heads=2, topk=0.3, **BLOCKS))
        module = SLAAttention(base)
        torch.nn.init.normal_(module.complement.weight, std=0.1)
    else:
        per_head = alpha == "mass"
        base = SLA2Config(
            head_dim=64, num_heads=2, topk=0.3, alpha=alpha, per_head_router=per_head, **BLOCKS
        )
        module = SLA2Attention(base)
        torch.nn.init.normal_(module.router.weight_q, std=0.1)
    found = []
    for backend, device in ((TARGET, DEVICE), ("cpu", "cpu")):
        module.to(device).config = dataclasses.replace(base, backend=backend)
        leaves = [x.detach().to(device, copy=True).requires_grad_() for x in qkv]
        out, info = module(*leaves, kv_lengths=lengths, return_info=True)
        module.zero_grad()
        out.backward(grad.to(device))
        grads = [x.grad for x in (*leaves, *module.parameters()) if x.grad is not None]
        found.append([x.detach().double().cpu() for x in (info.block_map.mask(), out, *grads)])
    assert torch.equal(found[0][0], found[1][0])
    for kernels, numba in zip(*found, strict=True):
        assert (kernels - numba).abs().max() <= 0.02 * numba.abs().max()


def test_pool_and_route_are_the_plain_ones():
    q, k, *_ = inputs(63, 111, 40)
    lengths = torch.tensor([77], device=DEVICE)
    pooled = cuda_ops.pool(q, k, lengths, *SIZES, TARGET)
    torch.testing.assert_close(pooled[0], pool(q, 32), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pooled[1], pool(k, 16, lengths), atol=1e-5, rtol=1e-5)
    weight = torch.randn(1, 40, 40, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    scores, indices, counts = cuda_ops.route(
        *pooled, weight, weight, lengths, *SIZES, 63, 111, 0.5, 7, TARGET
    )
    expected = (pooled[0] @ weight) @ (pooled[1] @ weight).transpose(-1, -2) * 40**-0.5
    torch.testing.assert_close(scores[..., :5], expected[..., :5], atol=1e-4, rtol=1e-4)
    assert (scores[..., 5:] == -torch.inf).all()
    plain = top_k_map(scores, 0.5, **BLOCKS, n_q=63, n_k=111, kv_lengths=lengths)
    assert torch.equal(counts, plain.counts)
    assert torch.equal(indices[..., : plain.indices.shape[-1]], plain.indices)


@pytest.mark.parametrize("weights", [1, 2])
def test_opcheck(weights):
    q, k, v, grad, alpha, block_map = inputs()
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    rows = (block_map.indices, block_map.counts)
    torch.library.opcheck(cuda_ops.pool, (q, k, torch.tensor([90], device=DEVICE), *SIZES, TARGET))
    pooled = [x.detach().requires_grad_() for x in cuda_ops.pool(q, k, None, *SIZES, TARGET)]
    weight = torch.eye(64, device=DEVICE).repeat(weights, 1, 1).requires_grad_()
    torch.library.opcheck(
        cuda_ops.route, (*pooled, weight, weight, None, *SIZES, 63, 111, 0.3, 7, TARGET)
    )
    plain = [x.detach() for x in (q, k, v, weight)]
    text = how()[0]
    for rule in ((torch.zeros(2), torch.ones(2)), (None, None)):
        rule = [x if x is None else x.to(DEVICE) for x in rule]
        whole = (*plain[:3], plain[3], plain[3], None, *rule, 0.3, 7, text, TARGET)
        torch.library.opcheck(cuda_ops.routed, whole)
    for mixed in (alpha.expand(1, 2, 2).clone().requires_grad_(), None):
        call = (q, k, v, *rows, mixed, None)
        torch.library.opcheck(ops.attention, (*call, *how()))
        with torch.no_grad():
            call = [x if x is None else x.detach() for x in call]
            results = ops.attention(*call, *how())
            arguments = (grad, None, *call, results, *how()[:2])
            torch.library.opcheck(ops.attention_backward, arguments)


def test_gradients_of_the_scores_are_the_matrix_products():
    q, k = (torch.randn(1, 2, n, 64, device=DEVICE, requires_grad=True) for n in (2, 7))
    weights = [torch.randn(1, 64, 64, device=DEVICE, requires_grad=True) for _ in range(2)]
    leaves, grad = (q, k, *weights), torch.randn(1, 2, 2, 7, device=DEVICE)
    scores = cuda_ops.route(*leaves, None, *SIZES, 63, 111, 0.3, 7, TARGET)[0]
    plain = (q @ weights[0]) @ (k @ weights[1]).transpose(-1, -2) / 8
    for found, right in zip(
        torch.autograd.grad(scores, leaves, grad), torch.autograd.grad(plain, leaves, grad)
    ):
        torch.testing.assert_close(found, right, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("alpha", ["position", "mass"])
def test_a_compiled_module_equals_the_eager_one(alpha):
    *qkv, grad, _, _ = inputs()
    attn = SLA2Attention(
        SLA2Config(head_dim=64, num_heads=2, topk=0.3, alpha=alpha, backend=TARGET, **BLOCKS)
    ).to(DEVICE)
    torch.compiler.reset()  # other tests compiled it for other head dimensions
    compiled = torch.compile(attn, fullgraph=True, backend="aot_eager")
    for found, right in zip(
        gradients(compiled, qkv, grad), gradients(attn, qkv, grad), strict=True
    ):
        assert torch.equal(found, right)


@pytest.mark.parametrize("precision", ["full", "int8_int8"])
@pytest.mark.parametrize(
    ("alpha", "options"),
    [
        ("mass", {}),
        ("position", {"kv_lengths": [70]}),
        ("one", {"text_tokens": 21}),
        ("mass", {"text_tokens": 21, "kv_lengths": [90]}),
    ],
)
def test_without_gradients_one_operator_gives_what_the_steps_give(
    alpha, options, precision, monkeypatch
):
    q, k, v, *_ = inputs(111, 111, d=40)
    config = SLA2Config(
        head_dim=40,
        num_heads=2,
        topk=0.3,
        alpha=alpha,
        backend=TARGET,
        precision=precision,
        block_q=32,
        block_k=32,
    )
    attn = SLA2Attention(config).to(DEVICE)
    for parameter in (*attn.mixing.parameters(), attn.router.weight_q):
        torch.nn.init.normal_(parameter, std=0.3)
    steps, first = attn(
        *(x.clone().requires_grad_() for x in (q, k, v)), **options, return_info=True
    )
    monkeypatch.setattr(attn, "_in_steps", lambda *_: pytest.fail("went by steps"))
    with torch.no_grad():
        out, info = attn(q, k, v, **options, return_info=True)
        torch.compiler.reset()  # other tests compiled it for other head dimensions
        compiled = torch.compile(attn, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(q, k, v, **options), out)
    assert torch.equal(info.block_map.mask(), first.block_map.mask())
    torch.testing.assert_close(info.alpha, first.alpha.expand(1, 2, -1).expand_as(info.alpha))
    torch.testing.assert_close(out, steps, atol=0.02, rtol=0.02)


def tokens_first(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def part_of_one_projection(x):
    b, h, n, d = x.shape
    packed = x.new_full((b, n, 3, h, d), float("nan"))
    packed[:, :, 1] = x.transpose(1, 2)
    return packed[:, :, 1].transpose(1, 2)


def channels_apart(x):
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def at_an_odd_address(x):
    flat = x.new_empty(x.numel() + 1)
    flat[1:] = x.flatten()
    return flat[1:].view(x.shape)


@pytest.mark.parametrize(
    "layout", [tokens_first, part_of_one_projection, channels_apart, at_an_odd_address]
)
@pytest.mark.parametrize(("d", "smooth_k"), [(64, True), (64, False), (40, True)])
def test_every_layout_gives_the_same_bits(layout, d, smooth_k):
    *qkv, grad, alpha, block_map = inputs(d=d)
    found = []
    for change in (lambda x: x, layout):
        leaves = [change(x).detach().requires_grad_() for x in qkv]
        out = sla2_attention(*leaves, block_map, alpha, smooth_k=smooth_k, backend=TARGET)
        found.append([out.detach(), *torch.autograd.grad(out, leaves, change(grad))])
    for plain, other in zip(*found, strict=True):
        assert torch.equal(plain, other)


def test_a_plan_serves_its_own_layout_alone():
    q, k, v, *_ = inputs(111, 111)
    config = SLA2Config(head_dim=64, num_heads=2, topk=0.3, backend=TARGET, block_q=32, block_k=32)
    attn = SLA2Attention(config).to(DEVICE)
    cuda_routed.plan_of.cache_clear()
    with torch.no_grad():
        plain, short = attn(q, k, v), attn(q, k, v, kv_lengths=[70])
        for change in (tokens_first, part_of_one_projection, channels_apart, at_an_odd_address):
            assert torch.equal(attn(*map(change, (q, k, v))), plain)
            assert torch.equal(attn(*map(change, (q, k, v)), kv_lengths=[70]), short)
        planned = cuda_routed.plan_of.cache_info().misses
        assert not torch.equal(plain, short)
        # Other values of the same layouts, and in low bit, which is planned anew.
        assert torch.equal(attn(q, k, v), plain)
        assert not torch.equal(attn(q + 1, k, v), plain)
        assert cuda_routed.plan_of.cache_info().misses == planned
        attn.config = dataclasses.replace(config, precision="int8")
        attn(q, k, v)
        assert cuda_routed.plan_of.cache_info().misses == planned + 1


def test_a_model_s_own_layout_is_neither_copied_nor_changed(monkeypatch):
    from sla2_kernels import forward, prepare

    launched, real = [], forward.run_kernel
    for caller in (prepare, forward):
        monkeypatch.setattr(
            caller, "run_kernel", lambda *args: launched.append(args[2]) or real(*args)
        )
    qkv = [tokens_first(x) for x in inputs(b=2)[:3]]
    sizes = {**BLOCKS, "block_k": 32}
    attn = SLA2Attention(
        SLA2Config(head_dim=64, num_heads=2, topk=0.3, backend=TARGET, **sizes)
    ).to(DEVICE)
    for precision in ("full", "int8"):
        attn.config = dataclasses.replace(attn.config, precision=precision)
        out = attn(*qkv)
        assert out.transpose(1, 2).is_contiguous()
    assert "sla2_sparse_fwd" in launched
    assert "sla2_copy_columns" not in launched


def test_opcheck_and_compile_with_tokens_first():
    *qkv, grad, alpha, block_map = inputs()
    qkv = [tokens_first(x).requires_grad_() for x in qkv]
    rows = (block_map.indices, block_map.counts, alpha.expand(1, 2, 2).clone(), None)
    torch.library.opcheck(ops.attention, (*qkv, *rows, *how()))
    attn = SLA2Attention(
        SLA2Config(head_dim=64, num_heads=2, topk=0.3, backend=TARGET, **BLOCKS)
    ).to(DEVICE)
    torch.compiler.reset()  # other tests compiled it for other head dimensions
    compiled = torch.compile(attn, fullgraph=True, backend="aot_eager")
    for found, right in zip(
        gradients(compiled, qkv, grad), gradients(attn, qkv, grad), strict=True
    ):
        assert torch.equal(found, right)


def test_nan_is_not_hidden():
    *qkv, _, alpha, block_map = inputs()
    qkv[1][0, 0, 5, 3] = float("nan")
    assert sla2_attention(*qkv, block_map, alpha, backend=TARGET)[0, 0].isnan().any()


def test_without_gradients_nothing_is_kept():
    *qkv, _, alpha, block_map = inputs()
    rows = (block_map.indices, block_map.counts, alpha.expand(1, 2, 2), None)
    assert len(ops.attention(*qkv, *rows, *how(save=False))) == 2
    qkv[0].requires_grad_()
    with pytest.raises(RuntimeError, match="expected save=True"):
        ops.attention(*qkv, *rows, *how(save=False))


@pytest.mark.parametrize(
    ("change", "options", "match"),
    [
        (
            dict(dtype=torch.float32),
            {},
            "^q: expected bfloat16 or float16 for the CUDA kernels, got torch.float32$",
        ),
        (dict(d=160), {}, "^head_dim: expected at most 128, got 160$"),
        ({}, dict(precision="int4"), "^precision: the CUDA kernels do not have 'int4'$"),
        ({}, dict(precision="int8"), r"^block_k: expected a multiple of 32 in \[32, 64\], got 16$"),
    ],
)
def test_what_no_kernel_takes_is_named(change, options, match):
    *qkv, _, alpha, block_map = inputs(**change)
    with pytest.raises(ValueError, match=match):
        sla2_attention(*qkv, block_map, alpha, backend=TARGET, **options)


def test_auto_takes_the_kernels_for_cuda_tensors_and_warns_once_where_it_cannot(monkeypatch):
    backends._warn_once.cache_clear()
    options = make_options(*SIZES, "full", "paper", True)
    problem = Problem(torch.bfloat16, torch.device("cuda"), 64, options)
    monkeypatch.setattr(cuda_ops, "missing", lambda: None)
    monkeypatch.setattr(cuda_ops, "_unfit", lambda *_: None)
    assert backends.resolve("auto", problem).name == "cuda"
    monkeypatch.setattr(cuda_ops, "_unfit", lambda *_: "q: expected bfloat16")
    with pytest.warns(RuntimeWarning, match="plain torch runs.*: q: expected bfloat16"):
        assert backends.resolve("auto", problem).name == "blocked"
    monkeypatch.setattr(cuda_ops, "missing", lambda: "no GPU")
    with pytest.warns(RuntimeWarning, match="no GPU"):
        assert backends.resolve("auto", problem).name == "blocked"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.resolve("auto", problem).name == "blocked"


def test_sla_on_the_kernels_has_the_linear_branch_over_all_blocks():
    *qkv, _, _, block_map = inputs()
    weight, bias = torch.randn(64, 64, device=DEVICE) * 0.1, torch.randn(64, device=DEVICE)
    found, right = (
        sla_attention(*x, block_map, weight, bias, backend=backend)
        for x, backend in ((qkv, TARGET), ([y.double() for y in qkv], "reference"))
    )
    torch.testing.assert_close(found.double(), right, atol=2e-2, rtol=2e-2)


@pytest.mark.skipif(TARGET != "cuda", reason="no GPU here")
@pytest.mark.parametrize("alpha", ["position", "mass"])
def test_the_module_never_waits_for_the_device(alpha):
    *qkv, grad, _, _ = inputs()
    attn = SLA2Attention(SLA2Config(head_dim=64, num_heads=2, topk=0.3, alpha=alpha, **BLOCKS)).to(
        DEVICE
    )
    gradients(attn, qkv, grad)  # compiles and loads
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(attn, qkv, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_fp8_runs_in_16_bit_where_it_would_be_emulated_and_that_is_said_once(monkeypatch):
    ran = []

    def forward(device, problem, *args, save, **kwargs):
        ran.append((problem.precision, save))
        raise NotImplementedError("what follows needs a GPU")

    monkeypatch.setattr("sla2_kernels.forward.forward", forward)
    q, k, v, _, alpha, block_map = inputs()
    call = Inputs(q, k, v, block_map.indices, block_map.counts, alpha, None)
    precision_to_run.cache_clear()
    monkeypatch.delenv("SLA2_WGMMA", raising=False)
    for arch, precision, save, *blocks in (
        ("sm_90a", "int8", False, 32, 32),
        ("sm_90a", "fp8", True, 32, 32),
        ("sm_90a", "int8", False, 32, 32),
        ("sm_90a", "int8_int8", False, 32, 32),
        ("sm_120a", "int8", False, 32, 32),
        ("sm_90a", "int8", False, 128, 64),  # by wgmma
        ("sm_100a", "int8", False, 128, 64),
    ):
        device = Device(allocate=lambda *_: None, target="cuda", arch=arch)
        monkeypatch.setattr(cuda_ops, "device_of", lambda *_, device=device: device)
        options = make_options(*blocks, precision, "paper", True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with pytest.raises(NotImplementedError):
                backends.BACKENDS["cuda"].forward(call, options, save)
        said = [str(warning.message) for warning in caught]
        assert len(said) == (len(ran) in (1, 7)), said
    assert ran == [
        ("full", False),
        ("fp8", True),
        ("full", False),
        ("int8_int8", False),
        ("int8", False),
        ("int8", False),
        ("full", False),
    ]
