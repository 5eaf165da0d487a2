"""Where the two branches meet: rows without one of them, padding, odd company; and options."""

import copy
import dataclasses
import pickle

import pytest
import torch
from helpers import tiny_wan, toys
from sla2_core import BlockMap, SLA2Attention, SLA2Config, block_sparse_attention, sla2_attention
from sla2_core.integrations.diffusers import apply_sla2
from sla2_core.reference import full_attention
from sla2_core.registry import FORMATS
from sla2_core.training.capture import Recorded, record
from sla2_core.training.stage1 import Stage1Config, train_router
from sla2_core.training.stage1.soft import Call
from sla2_core.variants import build_config, sla, sla2

CONFIG = SLA2Config(head_dim=8, num_heads=2, topk=0.3, block_q=16, block_k=8)
BACKENDS = ["cpu", "blocked", "reference"]


def qkv(n=96, dtype=torch.float64):
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(2, 2, n, 8, generator=generator).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sum_without_a_complement_is_full_attention(backend):
    q, k, v = qkv()
    config = dataclasses.replace(CONFIG, topk=1.0, alpha="sum", backend=backend)
    torch.testing.assert_close(SLA2Attention(config)(q, k, v), full_attention(q, k, v))


@pytest.mark.parametrize("precision", ["full", "nvfp4"])
def test_selected_blocks_of_padding_alone_count_as_nothing(precision):
    q, k, v = qkv()
    mask = torch.zeros(2, 2, 6, 12, dtype=torch.bool)
    mask[..., 11] = True
    block_map = BlockMap.from_mask(mask, block_q=16, block_k=8, n_q=96, n_k=96)
    found = [
        sla2_attention(
            q, k, v, block_map, 0.5, kv_lengths=[60, 96], precision=precision, backend=backend
        )
        for backend in BACKENDS
    ]
    for out in found[:2]:
        torch.testing.assert_close(out, found[2])


def test_a_short_row_reads_no_other_block():
    """NaN in a block spoils the rows that select it, not those that merely have fewer blocks."""
    q, k, v = qkv(dtype=torch.float32)
    v[:, :, :8] = float("nan")
    mask = torch.zeros(2, 2, 6, 12, dtype=torch.bool)
    mask[:, :, 0, :5], mask[:, :, 1:, 5] = True, True
    block_map = BlockMap.from_mask(mask, block_q=16, block_k=8, n_q=96, n_k=96)
    for backend in ("cpu", "blocked"):
        out, _ = block_sparse_attention(q, k, v, block_map, backend=backend)
        assert out[:, :, :16].isnan().all()
        assert torch.isfinite(out[:, :, 16:]).all()


def test_nan_in_padding_reaches_no_text_query():
    q, k, v = qkv(dtype=torch.float32)
    k[0, :, 90:], v[0, :, 90:] = float("nan"), float("nan")
    out = SLA2Attention(CONFIG)(q, k, v, kv_lengths=[90, 96], text_tokens=12)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("backend", ["cpu", "blocked"])
def test_backward_under_autocast(backend):
    attn = SLA2Attention(dataclasses.replace(CONFIG, precision="nvfp4", backend=backend))
    leaves = [x.requires_grad_() for x in qkv(dtype=torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        attn(*leaves).float().square().mean().backward()
    assert all(torch.isfinite(x.grad).all() for x in leaves)


def test_options_survive_copies_and_change_with_their_members():
    config = tiny_wan.config(alpha="toy-constant", options={"first": 0.25})
    attention = SLA2Attention(config)
    for again in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        assert again.config == config
    with pytest.raises(TypeError, match="options: expected no change"):
        config.options.update(first=0.5)
    assert config.replaced(alpha="mass").options == {"tile": None}
    assert config.replaced(alpha="mass", token_order="raster").options == {}
    bare = dataclasses.replace(config.replaced(alpha="mass"), token_order="raster")
    assert bare.options == {}  # the tile's default says nothing about the raster order
    with pytest.raises(ValueError, match=r"options: expected one of none, .* got 'tile'"):
        dataclasses.replace(bare, options={"tile": (4, 4, 4)})
    handle = apply_sla2(tiny_wan.model(), config)
    with torch.no_grad():
        handle.dense_copy()(**tiny_wan.inputs())
    given = {"variant": "sla", "topk": 0.3, "alpha": "toy-constant", "options": {"first": 0.3}}
    built = build_config(given, head_dim=8, num_heads=2)
    assert (built.complement, built.alpha) == ("projected", "toy-constant")
    assert built.options == {"first": 0.3, "tile": None}
    assert sla2(sla(CONFIG)) == CONFIG


def test_adjustable_and_list_options(tmp_path):
    config = tiny_wan.config(router="toy-limit", options={"most": 0.5, "pair": (1, 2)})
    assert SLA2Config.from_dict(config.to_dict()) == config
    handle = apply_sla2(tiny_wan.model(), config)
    handle.configure(options={"most": 0.75})
    assert handle.attentions[0].router.most == 0.75
    handle.save(tmp_path)
    other = apply_sla2(tiny_wan.model(), config)
    other.load(tmp_path)
    assert other.config.options == {"most": 0.75, "pair": (1, 2), "tile": None}
    with pytest.raises(ValueError, match=r"options.most: expected a float, got True"):
        dataclasses.replace(config, options={"most": True})
    with pytest.raises(ValueError, match="options: expected names and values, got 5"):
        handle.configure(options=5)


def test_a_format_registered_again_replaces_the_old_one():
    q, k, v = qkv(dtype=torch.float32)
    attn = SLA2Attention(dataclasses.replace(CONFIG, precision="toy-int4"))
    before = attn(q, k, v)
    real = FORMATS.get("toy-int4")
    finer = type("Coarse", (toys.Coarse,), {"qk": "int8", "__module__": real.__module__})
    try:
        FORMATS.register("toy-int4")(finer)
        after = SLA2Attention(attn.config)(q, k, v)
    finally:
        FORMATS.register("toy-int4")(real)
    assert not torch.equal(before, after)


def test_an_order_refuses_what_it_would_permute_wrongly():
    attn = SLA2Attention(dataclasses.replace(CONFIG, token_order="toy-order"))
    q, k, v = qkv()
    with pytest.raises(ValueError, match="kv_lengths: expected None for token_order='toy-order'"):
        attn(q, k, v, grid=(2, 6, 8), kv_lengths=[60, 96])
    with pytest.raises(ValueError, match="k: expected q's 96 tokens for token_order='toy-order'"):
        attn(q, k[:, :, :90], v[:, :, :90], grid=(2, 6, 8))
    for grid in (5, (4, 24)):
        with pytest.raises(ValueError, match=r"grid: expected .* of 96 tokens, got"):
            attn(q, k, v, grid=grid)


def captured(config):
    layers = {0: SLA2Attention(config)}

    def run(sample):
        generator = torch.Generator().manual_seed(sample)
        layers[0](*(2 * torch.randn(3, 1, 2, 96, 8, generator=generator)))

    return layers, record(layers, run, samples=2)


def test_stage_1_is_made_anew_for_another_start(tmp_path):
    settings = Stage1Config(topk=(0.3,), steps=1)
    layers, captures = captured(CONFIG)
    train_router(layers, captures, settings, tmp_path)
    other, _ = captured(dataclasses.replace(CONFIG, alpha_init=0.1))
    with pytest.raises(ValueError, match=r"expected alpha_init=0.1 as given, got 0.8"):
        train_router(other, captures, settings, tmp_path)


def test_stage_1_routes_as_the_operator_does_without_smoothing():
    config = dataclasses.replace(CONFIG, smooth_k=False, router="toy-cosine")
    layers, captures = captured(config)
    call = captures.load(captures.calls[0])
    prepared = Call(call, config, slice(None))
    rows = torch.arange(6)
    router = layers[0].router
    mask = prepared.hard_mask(router, prepared.scores(router, rows), config.topk)
    _, info = layers[0](call.q, call.k, call.v, return_info=True)
    assert torch.equal(mask, info.block_map.mask())


def test_nothing_to_record_is_named():
    with pytest.raises(ValueError, match="attentions, samples: expected at least one of each"):
        record({}, lambda sample: None, samples=1)
    assert Recorded([], {}).bytes == 0
