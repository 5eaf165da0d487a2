"""An idea is one file and one line of registration: the toys of tests/helpers/toys.py, defined
outside the packages, work everywhere.
"""

import dataclasses
import json

import pytest
import torch
import yaml
from helpers import tiny_model, tiny_wan, toys
from sla2_core import SLA2Attention, SLA2Config
from sla2_core.attend import Parts, attend, soft_attend
from sla2_core.backends import BACKENDS
from sla2_core.block_map import BlockMap
from sla2_core.cost import sla2_cost
from sla2_core.integrations.diffusers import apply_sla2
from sla2_core.integrations.loading import apply_adapter
from sla2_core.options import Options
from sla2_core.reference import full_attention
from sla2_core.registry import AXES, MIXINGS
from sla2_core.training.capture import capture
from sla2_core.training.stage1 import Stage1Config, train_stage1
from sla2_core.training.stage2 import Stage2Config, train_stage2
from sla2_core.variants import build_config, pooled, sla2, training_free
from sla2_eval.cli.main import main
from sla2_eval.scoring import metrics

CHANGES = {
    "order": {"token_order": "toy-order"},
    "router": {"router": "toy-router"},
    "complement": {"complement": "toy-means", "alpha": "toy-joint"},
    "mixing": {"alpha": "toy-constant", "options": {"first": 0.25}},
    "format": {"precision": "toy-int4"},
    "all": {
        "token_order": "toy-order",
        "router": "toy-router",
        "complement": "toy-means",
        "alpha": "toy-joint",
        "precision": "toy-int4",
    },
}


def qkv(n=45, heads=2, dim=12, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    shape = (2, heads, n, dim)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("backend", ["auto", "blocked"])
def test_a_toy_equals_its_dense_definition_with_every_gradient(changes, backend):
    config = tiny_wan.config(**changes)
    found = []
    for name in (backend, "reference"):
        torch.manual_seed(0)
        attention = SLA2Attention(dataclasses.replace(config, backend=name)).double()
        leaves = qkv()
        out = attention(*leaves, grid=(3, 3, 5))
        learned = [p for p in attention.parameters() if p.requires_grad]
        grads = torch.autograd.grad(out.sin().sum(), [*leaves, *learned], allow_unused=True)
        found.append([out, *(g for g in grads if g is not None)])
    for fast, plain in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(changes, id=name, marks=() if name == "all" else pytest.mark.slow)
        for name, changes in CHANGES.items()
    ],
)
def test_a_toy_goes_through_adapter_stage_1_stage_2_and_torch_compile(changes, tmp_path):
    torch._dynamo.reset()
    config = tiny_wan.config(**changes)
    transformer = tiny_wan.model()
    handle = apply_sla2(transformer, config)
    captures = capture(
        handle, lambda i: transformer(**tiny_wan.inputs(seed=i)), tmp_path / "c", samples=3
    )
    before = {n: p.detach().clone() for n, p in handle.adapter_tensors().items()}
    stage1 = Stage1Config(topk=(0.3,), steps=3, eval_every=3, rows=None)
    train_stage1(handle, captures, stage1, tmp_path / "stage1")
    trained = {id(p) for p in handle.trained_in("stage1")}
    for name, parameter in handle.adapter_tensors().items():
        assert torch.equal(parameter, before[name]) == (id(parameter) not in trained), name
    stage2 = Stage2Config(steps=1, batch_size=2, learning_rate=1e-3, checkpoint_every=1)
    report = train_stage2(handle, tiny_wan.pairs(), stage2, tmp_path / "stage2")
    again = tiny_wan.model(seed=5)
    loaded = apply_adapter(again, report.adapter)
    assert loaded.config == handle.config
    with torch.no_grad():
        expected = transformer.eval()(**tiny_wan.inputs())[0]
        assert torch.equal(again(**tiny_wan.inputs())[0], expected)
        compiled = torch.compile(again, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(**tiny_wan.inputs())[0], expected)
    plain = apply_sla2(tiny_wan.model(), tiny_wan.config())
    if set(changes) <= {"precision"}:  # which may change at any time
        plain.load(report.adapter)
        return
    with pytest.raises(ValueError, match=r"expected \w+='\w+' as applied, got 'toy-"):
        plain.load(report.adapter)


def test_the_toy_complement_is_full_attention_where_blocks_are_constant():
    q, k, v = qkv(40)
    k, v = (x[:, :, ::5].repeat_interleave(5, 2) for x in (k, v))
    attention = SLA2Attention(tiny_wan.config(**CHANGES["complement"])).double()
    torch.testing.assert_close(attention(q, k, v), full_attention(q, k, v))


def test_a_soft_mask_of_0_and_1_is_the_hard_operator_for_a_joint_complement():
    q, k, v = qkv(40)
    config = tiny_wan.config(**CHANGES["complement"], smooth_k=False)
    attention = SLA2Attention(config).double()
    parts = Parts(attention.complement, attention.mixing)
    mask = torch.rand(2, 2, 5, 8, generator=torch.Generator().manual_seed(1)) < 0.4
    mask[0, 0, 0], mask[1, 1, 1] = True, False
    options = Options.of(config)
    soft, _ = soft_attend(q, k, v, mask.double(), None, parts, lengths=None, options=options)
    block_map = BlockMap.from_mask(mask, block_q=8, block_k=5, n_q=40, n_k=40)
    how = dict(lengths=None, options=options, backend=BACKENDS["blocked"])
    torch.testing.assert_close(soft, attend(q, k, v, block_map, None, parts, **how))


def test_tokens_of_an_order_come_back_in_their_places_and_text_stays():
    q, k, v = qkv(52, dtype=torch.float32)
    attention = SLA2Attention(tiny_wan.config(token_order="toy-order", topk=1.0))
    out = attention(q, k, v, grid=(3, 3, 5), text_tokens=7)
    torch.testing.assert_close(out, full_attention(q, k, v), atol=1e-5, rtol=1e-4)
    unordered = attention(q, k, v, text_tokens=7)  # as they come
    torch.testing.assert_close(unordered, full_attention(q, k, v), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"grid: expected .* of 52 tokens, got"):
        attention(q, k, v, grid=(3, 3, 5))


def test_an_order_changes_the_map_of_a_model_and_nothing_else():
    full = tiny_wan.model()(**tiny_wan.inputs())[0]
    for changes, same in (({"topk": 1.0}, True), ({}, False)):
        outputs = []
        for order in ("raster", "toy-order"):
            transformer = tiny_wan.model()
            handle = apply_sla2(transformer, tiny_wan.config(token_order=order, **changes))
            outputs.append(transformer(**tiny_wan.inputs())[0])
            with handle.disabled():
                assert torch.equal(transformer(**tiny_wan.inputs())[0], full)
        close = (outputs[0] - outputs[1]).abs().max() < 1e-5
        assert bool(close) == same


def test_options_are_checked_and_travel_with_the_configuration():
    config = tiny_wan.config(**CHANGES["mixing"])
    assert SLA2Config.from_dict(config.to_dict()) == config
    assert hash(config) == hash(dataclasses.replace(config))
    assert config.geometry()["options.first"] == 0.25
    with pytest.raises(ValueError, match=r"options: expected one of first, tile, got 'frist'"):
        tiny_wan.config(alpha="toy-constant", options={"frist": 1.0})
    with pytest.raises(ValueError, match=r"options.first: expected a float, got 'x'"):
        tiny_wan.config(alpha="toy-constant", options={"first": "x"})
    with pytest.raises(ValueError, match=r"options: expected one of none"):
        tiny_wan.config(token_order="raster", options={"first": 1.0})
    with pytest.raises(ValueError, match=r"options.first: expected an option that may change"):
        config.changed(options={"first": 0.75})


def test_costs_ask_the_complement():
    sizes = dict(n_q=640, n_k=640, num_heads=2, head_dim=16, topk=0.1, block_q=64, block_k=32)
    assert sla2_cost(**sizes, complement="toy-means").linear_flops == 2 * 4.0 * 640 * 20 * 16
    assert sla2_cost(**sizes, complement="none").linear_flops == 0
    assert sla2_cost(**sizes).linear_flops == 2.0 * 1280 * 16**2 * 2


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="alpha: expected a new name, got 'mass' of Mass"):
        MIXINGS.register("mass")(toys.Constant)
    assert MIXINGS.names()[:5] == ("joint", "mass", "one", "position", "sum")
    assert {axis.field for axis in AXES} <= set(
        SLA2Config(head_dim=8, num_heads=1, topk=1).to_dict()
    )


def test_variants_change_a_base_and_settings_override_them():
    config = build_config(
        {"variant": "sla", "topk": 0.1, "precision": "int8"}, head_dim=8, num_heads=2
    )
    assert (config.router, config.complement, config.alpha) == ("heuristic", "projected", "sum")
    assert (config.smooth_k, config.precision) == (False, "int8")
    given = {"variant": "sla", "topk": 0.1, "smooth_k": True}
    assert build_config(given, head_dim=8, num_heads=2).smooth_k
    assert build_config({"variant": "training_free"}, head_dim=8, num_heads=2).topk == 0.15
    given = training_free(topk=0.1, precision="int8")
    config = build_config(given, head_dim=8, num_heads=2)
    assert config == training_free(dataclasses.replace(config, smooth_k=False))
    assert (config.router, config.complement, config.alpha) == ("heuristic", "pooled", "joint")
    assert (config.topk, config.precision) == (0.1, "int8")
    assert config.options["pooled_bias"] is False
    assert pooled(config).options["pooled_bias"] is True
    assert sla2(pooled(config)).alpha == SLA2Config(head_dim=8, num_heads=2, topk=0.1).alpha
    with pytest.raises(ValueError, match="topk: expected a configuration or settings, got both"):
        training_free(config, topk=0.1)
    with pytest.raises(ValueError, match="variant: expected one of sla2, pooled, "):
        build_config({"variant": "slaa", "topk": 0.1}, head_dim=8, num_heads=2)
    with pytest.raises(ValueError, match="head_dim: expected 8 as in the model, got 16"):
        build_config({"head_dim": 16, "topk": 0.1}, head_dim=8, num_heads=2)
    with pytest.raises(ValueError, match="topk: expected a value, got none"):
        build_config({"variant": "sla"}, head_dim=8, num_heads=2)


def test_toys_are_a_row_of_a_grid_and_a_toy_metric_is_a_column(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "_MODULES", list(metrics._MODULES))
    tiny_model.save(tmp_path / "model")
    toy = {"topk": 0.1, "router": "toy-router", "precision": "toy-int4", "token_order": "toy-order"}
    toy |= {"complement": "toy-means", "alpha": "toy-joint"}
    own = {"router": "toy-router", "alpha": "toy-constant", "options": {"first": 0.25}}
    settings = {
        "model": str(tmp_path / "model"),
        "imports": ["helpers.toys"],
        "workers": 1,
        "seeds": [0],
        "attention": {"block_q": 32, "block_k": 16, "topk": 0.1},
        "data": {"num_videos": 4},
        "capture": {"samples": 2},
        "stage1": {"steps": 2, "topk": [0.1], "eval_every": 2},
        "stage2": {"steps": 1, "batch_size": 1, "checkpoint_every": 1},
        "generate": {"num_prompts": 2, "steps": 1, "dtype": "float32"},
        "metrics": ["psnr", "helpers.toys:toy-brightness"],
        "variants": [
            {"name": "toy", "label": "Toy", "family": "toy", "attention": toy},
            {"name": "own", "label": "Own", "family": "own", "attention": own},
        ],
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(settings))
    out = tmp_path / "out"
    assert main(["ablate", "--config", str(tmp_path / "grid.yaml"), "--out", str(out)]) == 0
    report = json.loads((out / "report" / "results.json").read_text())
    groups = {group["label"]: group["metrics"] for group in report["groups"]}
    for label in ("Toy", "Own"):
        assert 0 < groups[label]["toy-brightness"]["mean"] < 1
    assert groups["Toy"]["psnr"]["mean"] != groups["Own"]["psnr"]["mean"]
    maps = json.loads((out / "block_maps" / "toy.json").read_text())
    assert 0.85 < maps["sparsity"] < 0.95
    assert len(list((out / "work" / "stage1").iterdir())) == 2
    assert "Brightness" in (out / "report" / "index.html").read_text()
