"""TurboDiffusion's SLA checkpoints: every layout and the quantised ones against a plain Wan with
its operator, refusals in one line, the folder that import writes, and SLA2 from there.
"""

from __future__ import annotations

import zipfile

import pytest
import torch
from helpers import turbodiffusion as turbo
from safetensors.torch import save_file
from sla2_core.integrations.loading import from_pretrained
from sla2_core.integrations.rcm import RCMScheduler
from sla2_core.integrations.turbodiffusion import (
    import_turbodiffusion,
    load_turbodiffusion,
    restart_as_sla2,
)
from sla2_core.integrations.turbodiffusion.loading import _transformer
from sla2_core.integrations.turbodiffusion.names import convert
from sla2_core.training.capture import capture
from sla2_core.training.stage1 import Stage1Config, train_stage1

GEOMETRY = dict(topk=0.3, block_q=8, block_k=5)
FP32 = dict(torch_dtype=torch.float32, **GEOMETRY)
I2V = turbo.SMALL | {"channels": 9}


def inputs(channels: int = 4) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, channels, 3, 6, 10, generator=rng),
        "timestep": torch.tensor([933.8, 609.0]),
        "encoder_hidden_states": torch.randn(2, 5, 8, generator=rng),
    }


def plain(tensors, given):
    return turbo.forward(tensors, *given.values(), heads=2, out=4, **GEOMETRY)


@torch.no_grad()
def run(transformer, given):
    return transformer(**given, return_dict=False)[0]


@pytest.mark.parametrize("layout", list(turbo.PROJECTION))
@pytest.mark.parametrize("low", [False, True], ids=["bf16", "int8"])
def test_a_checkpoint_equals_the_plain_model_with_its_operator(layout, low, tmp_path):
    tensors = turbo.checkpoint(turbo.SMALL | {"ffn": 140})
    tensors = turbo.quantised(tensors) if low else tensors
    stored = turbo.in_layout(tensors, layout)
    if layout == "turbodiffusion":
        torch.save(stored, path := tmp_path / "TurboWan.pth")
    else:
        save_file(stored, tmp_path / "part.safetensors")
        path = tmp_path
    handle = load_turbodiffusion(path, **FP32)
    found = run(handle.transformer, inputs())
    expected = plain(turbo.product(tensors) if low else tensors, inputs())
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    config = handle.config
    assert (config.router, config.complement, config.alpha) == ("truncated", "projected", "sum")
    assert (config.token_order, config.block_q, config.block_k) == ("raster", 8, 5)
    with handle.disabled():
        assert (run(handle.transformer, inputs()) - found).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("sizes", "count"), [(turbo.TURBO_1_3B, 885), (turbo.TURBO_A14B, 1175)], ids=["1.3B", "A14B"]
)
def test_the_published_sizes_are_read_off_the_shapes(sizes, count):
    tensors = turbo.checkpoint(sizes, device="meta")
    assert len(tensors) == count
    assert tensors["patch_embedding.weight"].shape == (sizes["dim"], 4 * sizes["channels"])
    model, head_dim = _transformer("file", convert("file", tensors), torch.bfloat16)
    config = model.config
    assert head_dim == config.attention_head_dim == 128
    assert (config.num_attention_heads, config.num_layers) == (sizes["heads"], sizes["layers"])
    assert (config.in_channels, config.out_channels) == (sizes["channels"], 16)
    assert model.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert model.blocks[0].norm2.weight.dtype == torch.float32
    last = sizes["layers"] - 1
    short = {n: v for n, v in tensors.items() if not n.startswith(f"blocks.{last}.")}
    message = f"file: expected {last + 1} layers of a model of width {sizes['dim']}, got {last}$"
    with pytest.raises(ValueError, match=message):
        _transformer("file", convert("file", short), torch.bfloat16)


BROKEN = {
    "no projection": (lambda t: {n: v for n, v in t.items() if "proj_l" not in n}, "found none"),
    "a mixture of projections": (
        lambda t: t | {"blocks.1.attn1.attn_impl.proj_l.weight": torch.zeros(12, 12)},
        "expected one layout of names, got blocks.0.self_attn",
    ),
    "a mixture of names": (
        lambda t: t | {"blocks.0.attn1.to_q.weight": torch.zeros(24, 24)},
        "expected Wan's own names .* got the key 'blocks.0.attn1.to_q.weight'",
    ),
    "another proj_l": (
        lambda t: t | {"blocks.0.cross_attn.proj_l.weight": torch.zeros(12, 12)},
        "got the key 'blocks.0.cross_attn.proj_l.weight'",
    ),
    "a layer without projection": (
        lambda t: {n: v for n, v in t.items() if not ("blocks.1." in n and "proj_l.bias" in n)},
        "expected proj_l.bias of every layer, found none of layer 1",
    ),
    "a missing tensor": (
        lambda t: {n: v for n, v in t.items() if n != "blocks.1.ffn.2.weight"},
        "expected the key 'blocks.1.ffn.net.2.weight', found none",
    ),
    "another shape": (
        lambda t: t | {"blocks.1.norm3.weight": torch.ones(23)},
        r"expected shape \(24,\) for blocks.1.norm2.weight, got \(23,\)",
    ),
    "a weight twice": (
        lambda t: turbo.quantised(t) | {"blocks.0.ffn.0.weight": torch.zeros(40, 24)},
        "expected no blocks.0.ffn.0.weight beside blocks.0.ffn.0.int8_weight",
    ),
    "scales of another size": (
        lambda t: turbo.quantised(t) | {"blocks.0.ffn.0.scale": torch.ones(1, 2)},
        r"for blocks.0.ffn.0.scale, shape \(1, 1\), got torch.float32 of shape \(1, 2\)",
    ),
    "no scale": (
        lambda t: {n: v for n, v in turbo.quantised(t).items() if n != "blocks.0.ffn.0.scale"},
        "expected blocks.0.ffn.0.scale beside",
    ),
    "scales without weights": (
        lambda t: t | {"blocks.0.ffn.0.scale": torch.ones(1, 1)},
        "expected blocks.0.ffn.0.int8_weight beside blocks.0.ffn.0.scale, found none",
    ),
    "a layer without any tensor": (
        lambda t: {n: v for n, v in t.items() if not n.startswith("blocks.0.")},
        "expected proj_l.bias of every layer, found none of layer 0",
    ),
    "a tensor of no model": (
        lambda t: t | {"blocks.0.self_attn.gate.weight": torch.zeros(24, 24)},
        "expected Wan's own names .* got the key 'blocks.0.self_attn.gate.weight'",
    ),
    "no patch embedding": (
        lambda t: {n: v for n, v in t.items() if n != "patch_embedding.weight"},
        "expected a tensor of the whole model under diffusers' name patch_embedding.weight",
    ),
    "a projection of another head dimension": (
        lambda t: {n: v[..., :7][:7] if "proj_l" in n else v for n, v in t.items()},
        "expected projections of a head dimension that divides 24, got 7",
    ),
    "a projection that is not square": (
        lambda t: t | {"blocks.1.self_attn.attn_op.local_attn.proj_l.weight": torch.zeros(12, 11)},
        r"expected shape \(12, 12\) for layers.1.complement\S*weight, got \(12, 11\)",
    ),
    "integers": (
        lambda t: t | {"blocks.0.ffn.0.weight": torch.zeros(40, 24, dtype=torch.int64)},
        "expected floating numbers for blocks.0.ffn.net.0.proj.weight, got torch.int64",
    ),
    "a nested file": (lambda t: {"state_dict": t}, "expected tensors by name, got dict"),
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_refuses_in_one_line_that_names_the_file(case, tmp_path):
    change, message = BROKEN[case]
    torch.save(change(turbo.checkpoint()), path := tmp_path / "broken.pth")
    with pytest.raises(ValueError, match=message) as caught:
        load_turbodiffusion(path, **FP32)
    assert str(caught.value).startswith(f"{path}: expected")
    assert "\n" not in str(caught.value)


def test_a_damaged_file_and_one_that_runs_code_are_refused(tmp_path):
    torch.save(turbo.checkpoint(), path := tmp_path / "cut.pth")
    path.write_bytes(path.read_bytes()[:5000])
    (tmp_path / "code.pth").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with zipfile.ZipFile(tmp_path / "text.pth", "w") as archive:
        archive.writestr("notes.txt", "no tensors")
    for name, words in (
        ("cut.pth", "a checkpoint of torch.save or a .safetensors file, got another"),
        ("code.pth", "a checkpoint of torch.save or a .safetensors file, got another"),
        ("text.pth", "a readable checkpoint, got: "),
    ):
        with pytest.raises(ValueError, match=f"expected {words}") as caught:
            load_turbodiffusion(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="expected a checkpoint, found none"):
        load_turbodiffusion(tmp_path / "nowhere.pth")


def test_import_writes_a_folder_that_loads_to_the_same_model(tmp_path):
    torch.save(turbo.checkpoint(), tmp_path / "turbo.pth")
    folder = import_turbodiffusion(tmp_path / "turbo.pth", tmp_path / "out", **FP32)
    first = load_turbodiffusion(tmp_path / "turbo.pth", **FP32)
    again = from_pretrained(folder, subfolder="transformer")
    assert again.config == first.config
    assert torch.equal(run(again.transformer, inputs()), run(first.transformer, inputs()))
    with pytest.raises(ValueError, match=f"{folder}: expected a new folder"):
        import_turbodiffusion(tmp_path / "turbo.pth", folder, **FP32)


def test_a_folder_is_refused_that_is_empty_or_holds_a_tensor_twice(tmp_path):
    tensors = turbo.in_layout(turbo.checkpoint(), "fastvideo")
    with pytest.raises(FileNotFoundError, match=f"^{tmp_path}: expected safetensors files, found"):
        load_turbodiffusion(tmp_path)
    save_file(tensors, tmp_path / "one.safetensors")
    save_file({"proj_out.bias": tensors["proj_out.bias"]}, tmp_path / "two.safetensors")
    message = "two.safetensors: expected each tensor once, got 'proj_out.bias' again$"
    with pytest.raises(ValueError, match=message):
        load_turbodiffusion(tmp_path)


def test_a_pair_of_wan22_becomes_two_transformers_and_rcm_of_image_to_video(tmp_path):
    for seed, name in enumerate(("high", "low")):
        torch.save(turbo.checkpoint(I2V, seed=seed), tmp_path / f"{name}.pth")
    folder = import_turbodiffusion(
        tmp_path / "high.pth", tmp_path / "out", low_noise=tmp_path / "low.pth", **FP32
    )
    given = inputs(channels=9)
    for part, name in (("transformer", "high"), ("transformer_2", "low")):
        again = from_pretrained(folder, subfolder=part)
        expected = load_turbodiffusion(tmp_path / f"{name}.pth", **FP32)
        assert torch.equal(run(again.transformer, given), run(expected.transformer, given))
    sampler = RCMScheduler.from_pretrained(folder, subfolder="scheduler")
    assert sampler.config.sigma_max == 200.0


def test_a_failed_import_leaves_nothing(tmp_path):
    torch.save(turbo.checkpoint(I2V), tmp_path / "high.pth")
    torch.save(turbo.checkpoint(), tmp_path / "low.pth")
    with pytest.raises(ValueError, match=r"low.pth: expected the sizes of .*high.pth, its pair"):
        import_turbodiffusion(
            tmp_path / "high.pth", tmp_path / "out", low_noise=tmp_path / "low.pth", **FP32
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["high.pth", "low.pth"]


def test_sla2_starts_from_sla_without_its_projection(tmp_path):
    torch.save(turbo.checkpoint(), tmp_path / "turbo.pth")
    sla = load_turbodiffusion(tmp_path / "turbo.pth", **FP32)
    weights = sla.model_tensors()
    handle = restart_as_sla2(sla, topk=0.5)
    assert all(torch.equal(v, weights[n]) for n, v in handle.model_tensors().items())
    groups = handle.parameters()
    assert (len(groups["router"]), len(groups["alpha"]), len(groups["proj"])) == (4, 4, 0)
    assert handle.config.complement == "linear"
    assert handle.config.smooth_k
    before = {n: v.detach().clone() for n, v in handle.adapter_tensors().items()}
    captures = capture(
        handle, lambda _: handle.transformer(**inputs()), tmp_path / "captures", samples=1
    )
    settings = Stage1Config(topk=(0.5,), steps=2, eval_every=2, rows=None)
    train_stage1(handle, captures, settings, tmp_path / "stage1")
    assert all(not torch.equal(v, before[n]) for n, v in handle.adapter_tensors().items())
