"""The pooled complement on the CUDA kernels: by steps and in one go, against the reference.

On the emulator, or with SLA2_TEST_TARGET=cuda (`make gpu-check` sets it) on the GPU.
"""

import dataclasses
import os

import pytest
import torch
from helpers import problems
from sla2_core import BlockMap, SLA2Attention, SLA2Config, backends, pooled_attention
from sla2_core.backends import cuda_routed, ops
from sla2_core.options import make_options
from sla2_core.variants import training_free

TARGET = os.environ.get("SLA2_TEST_TARGET", "emulator")
DEVICE = "cuda" if TARGET == "cuda" else "cpu"
pytestmark = [pytest.mark.gpu] if TARGET == "cuda" else []
BLOCKS = {"block_q": 64, "block_k": 32}  # as those of the kernels' own tests


def inputs(n_q=150, n_k=150, d=48, b=2):
    """q, k, v, and a map with a row of every block and a row of none."""
    generator = torch.Generator().manual_seed(5)
    q, k, v = (
        torch.randn(b, 2, n, d, generator=generator).to(DEVICE, torch.bfloat16)
        for n in (n_q, n_k, n_k)
    )
    mask = torch.rand(b, 2, -(-n_q // 64), -(-n_k // 32), generator=generator) < 0.4
    mask[0, 0, 0], mask[-1, -1, -1] = True, False
    return q, k + 0.5, v, BlockMap.from_mask(mask.to(DEVICE), n_q=n_q, n_k=n_k, **BLOCKS)


@pytest.mark.parametrize("precision", ["full", "int8_int8"])
def test_one_call_gives_what_the_reference_gives(precision, monkeypatch):
    q, k, v, block_map = inputs()
    bias = torch.tensor([0.5, -0.5], device=DEVICE)
    how = {"kv_lengths": [150, 141], "precision": precision}
    expected = pooled_attention(q, k, v, block_map, bias, backend="reference", **how)
    monkeypatch.setattr("sla2_core.attend.rest_branch", None)
    with torch.no_grad():
        out = pooled_attention(q, k, v, block_map, bias, backend=TARGET, **how)
        none = pooled_attention(q, k, v, block_map, backend=TARGET, **how)
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    assert not torch.equal(out, none)


@pytest.mark.parametrize("precision", ["full", "int8_int8"])
@pytest.mark.parametrize("options", [{}, {"text_tokens": 21, "kv_lengths": [135, 150]}])
def test_without_gradients_one_operator_gives_what_the_steps_give(options, precision, monkeypatch):
    q, k, v, _ = inputs()
    config = SLA2Config(
        head_dim=48,
        num_heads=2,
        topk=0.3,
        complement="pooled",
        backend=TARGET,
        precision=precision,
        **BLOCKS,
    )
    attn = SLA2Attention(config).to(DEVICE)
    for parameter in (attn.complement.bias, attn.router.weight_q):
        torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(attn, "_in_one_go", lambda *_: None)
            steps, first = attn(q, k, v, **options, return_info=True)
        monkeypatch.setattr(attn, "_in_steps", lambda *_: pytest.fail("went by steps"))
        out, info = attn(q, k, v, **options, return_info=True)
        torch.compiler.reset()  # other tests compiled it for other head dimensions
        compiled = torch.compile(attn, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(q, k, v, **options), out)
    assert torch.equal(info.block_map.mask(), first.block_map.mask())
    assert info.alpha is None
    torch.testing.assert_close(out, steps, atol=0.02, rtol=0.02)


def test_training_free_has_no_bias_and_goes_in_one_go(monkeypatch):
    q, k, v, _ = inputs()
    config = SLA2Config(head_dim=48, num_heads=2, topk=0.3, backend=TARGET, **BLOCKS)
    attn = SLA2Attention(training_free(config)).to(DEVICE)
    monkeypatch.setattr(attn, "_in_steps", lambda *_: pytest.fail("went by steps"))
    with torch.no_grad():
        out, info = attn(q, k, v, return_info=True)
        right = pooled_attention(q, k, v, info.block_map, backend="reference")
    torch.testing.assert_close(out, right, atol=0.02, rtol=0.02)


def test_shapes_for_torch_compile():
    q, k, v, block_map = inputs()
    text = make_options(64, 32, "full", "paper", True, "pooled").text
    bias = torch.zeros(2, device=DEVICE)
    fakes = {"test_utils": ("test_schema", "test_faketensor")}
    routed = (q, k, v, None, None, None, bias, None, 0.3, 5, text, TARGET)
    torch.library.opcheck(cuda_routed.routed, routed, **fakes)
    given = bias[None, :, None].expand(block_map.shape[:3])
    call = (q, k, v, block_map.indices, block_map.counts, given, None, text, TARGET)
    for save, count in ((True, 6), (False, 2)):
        with torch.no_grad():
            results = ops.attention(*call, save)
        assert len(results) == count
        torch.library.opcheck(ops.attention, (*call, save), **fakes)
        if save:
            arguments = (torch.randn_like(q), None, *call[:-2], results, *call[-2:])
            torch.library.opcheck(ops.attention_backward, arguments, **fakes)


def differentiated(leaves, block_map, grad, **options):
    """O and dQ, dK, dV, db (H,) in fp64."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    q, k, v, bias = leaves
    out = pooled_attention(q, k, v, block_map, bias, **options)
    found = out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))
    return [x.detach().double() for x in found]


@pytest.mark.parametrize("precision", ["full", "int8_int8"])
def test_every_gradient(precision, monkeypatch):
    *qkv, block_map = inputs()
    bias, grad = torch.tensor([0.5, -0.5], device=DEVICE), torch.randn(qkv[0].shape, device=DEVICE)
    how = {"kv_lengths": [150, 141], "precision": precision}
    wide = [x.double() for x in (*qkv, bias)]
    exact = differentiated(wide, block_map, grad, backend="reference", **how)
    plain = differentiated((*qkv, bias), block_map, grad, backend="reference", **how)
    monkeypatch.setattr("sla2_core.attend.rest_branch", None)
    found = differentiated((*qkv, bias), block_map, grad, backend=TARGET, **how)
    for name, x, right, rounded in zip(("out", "dq", "dk", "dv", "db"), found, exact, plain):
        problems.assert_as_good(x, right, rounded, 3.0 if name[0] == "d" else 2.0, name)


def test_the_module_learns_b_by_the_kernels(monkeypatch):
    q, k, v, _ = inputs()
    config = SLA2Config(head_dim=48, num_heads=2, topk=0.3, complement="pooled", **BLOCKS)
    attn = SLA2Attention(dataclasses.replace(config, backend=TARGET)).to(DEVICE)
    torch.nn.init.normal_(attn.complement.bias, std=0.3)
    monkeypatch.setattr("sla2_core.attend.rest_branch", None)
    attn(q, k, v).float().square().sum().backward()
    found = attn.complement.bias.grad.clone()
    attn.zero_grad()
    monkeypatch.undo()
    attn.config = dataclasses.replace(config, backend="blocked")
    attn(q, k, v).float().square().sum().backward()
    torch.testing.assert_close(found, attn.complement.bias.grad, rtol=0.02, atol=0.02)


def test_the_matched_backward_is_plain_torch_s():
    q, k, v, block_map = inputs()
    backends._warn_once.cache_clear()
    how = {"backend": TARGET, "precision": "int8_int8", "qat_backward": "matched"}
    with pytest.warns(RuntimeWarning, match="has no gradient of the log-sum-exp"):
        pooled_attention(q, k, v.requires_grad_(), block_map, **how)
