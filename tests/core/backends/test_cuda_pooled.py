"""The pooled complement on the CUDA kernels: by steps and in one go, against the reference.

On the emulator, or with SLA2_TEST_TARGET=cuda (`make gpu-check` sets it) on the GPU.
"""

import os

import pytest
import torch
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
@pytest.mark.parametrize("options", [{}, {"text_tokens": 21, "kv_lengths": [90, 150]}])
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
            assert len(ops.attention(*call, save)) == count
        torch.library.opcheck(ops.attention, (*call, save), **fakes)


def test_as_yet_gradients_are_plain_torch_s():
    q, k, v, block_map = inputs()
    backends._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="has no gradient of the log-sum-exp"):
        pooled_attention(q, k, v.requires_grad_(), block_map, backend=TARGET)
