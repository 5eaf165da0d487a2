"""Loading adapters and whole models from a folder, what is refused, and the report of
integrations.check.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers import families
from sla2_core import SLA2Config
from sla2_core.integrations.diffusers import apply_sla2
from sla2_core.integrations.inspect import inspect_model, main, read_config
from sla2_core.integrations.loading import apply_adapter, from_pretrained, save_pretrained


def shaken(handle):
    torch.manual_seed(3)
    with torch.no_grad():
        for group in handle.parameters().values():
            for parameter in group:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return handle


def forward(transformer, inputs):
    with torch.no_grad():
        return transformer(**inputs(), return_dict=False)[0]


def test_a_model_with_sla2_folded_in(wan, inputs, sla2_config, tmp_path):
    handle = shaken(
        apply_sla2(wan(num_layers=3), sla2_config(alpha="mass"), skip_layers=[1], dense_steps=0)
    )
    expected = forward(handle.transformer, inputs)
    save_pretrained(handle, tmp_path / "pipeline" / "transformer", max_shard_size="20KB")
    again = from_pretrained(tmp_path / "pipeline", subfolder="transformer")
    assert again.layers == (0, 2)
    assert torch.equal(forward(again.transformer, inputs), expected)
    half = from_pretrained(tmp_path / "pipeline" / "transformer", torch_dtype=torch.bfloat16)
    assert half.transformer.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in half.parameters()["router"])
    from diffusers import WanTransformer3DModel

    plain = WanTransformer3DModel.from_pretrained(tmp_path / "pipeline" / "transformer")
    with handle.disabled():
        assert torch.equal(forward(plain, inputs), forward(handle.transformer, inputs))


def test_an_adapter_says_how_it_is_applied(wan, inputs, sla2_config, tmp_path):
    handle = apply_sla2(
        wan(), sla2_config(precision="int8"), skip_layers=[0], dense_steps=2, base_model="me/wan"
    )
    shaken(handle).save(tmp_path)
    again = apply_adapter(wan(), tmp_path)
    assert (again.config, again.layers, again.dense_steps, again.base_model) == (
        handle.config,
        (1,),
        2,
        "me/wan",
    )


def test_a_refused_adapter_leaves_the_model_as_it_was(wan, sla2_config, tmp_path):
    apply_sla2(wan(), sla2_config()).save(tmp_path)
    other = wan(ffn_dim=48)
    before = other.blocks[0].attn1.processor
    with pytest.raises(ValueError, match="expected an adapter of a model with ffn_dim=48, got 32"):
        apply_adapter(other, tmp_path)
    assert other.blocks[0].attn1.processor is before
    with pytest.raises(
        ValueError, match=r"sla2_config\.json: .*expected at least 2 self-attention layers, got 1"
    ):
        apply_adapter(wan(num_layers=1), tmp_path)


def test_refusals_name_the_file(wan, sla2_config, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        FileNotFoundError,
        match=r"no/such: expected a folder or a hub id .owner/name. that can be reached",
    ):
        from_pretrained("no/such")
    save_pretrained(apply_sla2(wan(), sla2_config()), tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "other")
    config = tmp_path / "other" / "config.json"
    config.write_text(config.read_text().replace("WanTransformer3DModel", "UNet2DModel"))
    with pytest.raises(
        ValueError,
        match=r"config.json: expected one of CogVideoXTransformer3DModel.*, got 'UNet2DModel'",
    ):
        from_pretrained(tmp_path / "other")
    (tmp_path / "model" / "sla2_config.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"sla2_config.json: expected a JSON file, found none"
    ):
        from_pretrained(tmp_path / "model")


def test_version_1_adapters_load(wan, sla2_config, tmp_path):
    """The format as first released, written out by hand: whatever the current version, these must
    load.
    """
    from safetensors.torch import save_file

    handle = shaken(apply_sla2(wan(), sla2_config()))
    save_file(
        {k: v.detach().clone() for k, v in handle.adapter_tensors().items()},
        tmp_path / "sla2_adapter.safetensors",
    )
    content = {
        "format_version": 1,
        "sla2": {
            "head_dim": 12,
            "num_heads": 2,
            "topk": 0.3,
            "block_q": 8,
            "block_k": 5,
            "method": "sla2",
            "router": "learned",
            "per_head_router": False,
            "alpha": "position",
            "alpha_knots": 3,
            "alpha_per_head": True,
            "alpha_init": 0.8,
            "tau": 0.1,
            "smooth_k": True,
            "precision": "int8",
            "qat_backward": "paper",
            "backend": "auto",
        },
        "layers": [0, 1],
        "dense_steps": 0,
        "base_model": None,
        "model": {"class": "WanTransformer3DModel", "config": {"num_layers": 2}},
    }
    (tmp_path / "sla2_config.json").write_text(json.dumps(content))
    again = apply_adapter(wan(), tmp_path)
    assert again.config.precision == "int8"
    for name, value in handle.adapter_tensors().items():
        assert torch.equal(again.adapter_tensors()[name], value)


def test_check_of_wan_1_3b(tmp_path, capsys):
    settings = {
        "_class_name": "WanTransformer3DModel",
        "num_attention_heads": 12,
        "attention_head_dim": 128,
        "num_layers": 30,
        "text_dim": 4096,
        "ffn_dim": 8960,
    }
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(settings))
    assert main([str(tmp_path), "--topk", "0.03"]) == 0
    text = capsys.readouterr().out
    assert "32760 video tokens" in text
    assert "blocks.29.attn1" in text
    assert "256 x 512" in text
    found = inspect_model(read_config(tmp_path), topk=0.03, block_q=128, block_k=64)
    totals = found["totals"]
    assert len(found["layers"]) == 30
    assert totals["flops_before"] == pytest.approx(30 * 4 * 32760**2 * 128 * 12)
    assert 0.033 < totals["flops_after"] / totals["flops_before"] < 0.0355
    assert totals["bytes_before"] == 2 * 12 * 32760**2
    assert main([str(tmp_path), "--latents", "21x45x80", "--text-tokens", "100", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 21 * 22 * 40


@pytest.mark.parametrize("name", list(families.BUILDERS))
def test_check_of_every_family(tmp_path, capsys, name):
    """What it says would be replaced is what apply_sla2 replaces."""
    transformer, _, _ = families.build(name)
    transformer.save_config(tmp_path)
    assert (
        main([str(tmp_path), "--block-q", "8", "--block-k", "5", "--latents", "3x6x10", "--json"])
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    heads, dim = found["layers"][0]["heads"], found["layers"][0]["head_dim"]
    handle = apply_sla2(
        transformer, SLA2Config(head_dim=dim, num_heads=heads, topk=0.3, block_q=8, block_k=5)
    )
    assert [layer["name"] for layer in found["layers"]] == list(handle.names.values())
    assert found["tokens"] == (
        3 * 6 * 10 if name.startswith("ltx2") else 45
    )  # LTX-2's patches are single latents
    assert found["totals"]["parameters"] == sum(
        value.numel() for value in handle.adapter_tensors().values()
    )


def test_a_hub_id_is_fetched_by_the_names_of_its_files(wan, sla2_config, tmp_path, monkeypatch):
    asked = []

    def snapshot(name, revision, allow_patterns):
        asked.append((name, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    handle = shaken(apply_sla2(wan(), sla2_config()))
    handle.save(tmp_path)
    again = apply_adapter(wan(), "me/adapter", revision="v1")
    names = ["sla2_config.json", "sla2_adapter.safetensors", "pytorch_lora_weights.safetensors"]
    assert asked == [("me/adapter", "v1", names)]
    assert all(
        torch.equal(value, handle.adapter_tensors()[name])
        for name, value in again.adapter_tensors().items()
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}/nowhere"], "expected a folder or a hub id"),
        (["{}"], "expected transformer/config.json or config.json, found neither"),
        (["{}/unknown"], "_class_name: expected one of CogVideoXTransformer3DModel"),
        (["{}/unknown", "--latents", "3x4"], "--latents: expected FRAMESxHEIGHTxWIDTH"),
        (["{}/broken"], "config.json: expected JSON"),
    ],
)
def test_check_refuses_in_one_line(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, text in (("unknown", '{"_class_name": "UNet2DModel"}'), ("broken", "{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    assert main([part.format(tmp_path) for part in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
