"""Adapters: round trip, what is refused, and that nothing half-written or half-loaded is left."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from helpers import tiny_wan
from safetensors.torch import load_file, save_file
from sla2_core.adapter import write_tensors
from sla2_core.integrations.diffusers import apply_sla2
from sla2_core.integrations.loading import apply_adapter


def shake(handle, groups=("router", "alpha", "proj")):
    torch.manual_seed(5)
    with torch.no_grad():
        for group in groups:
            for parameter in handle.parameters()[group]:
                parameter.add_(torch.randn_like(parameter))


@pytest.mark.parametrize("changes", [{}, {"alpha": "mass", "per_head_router": True}, tiny_wan.SLA])
@pytest.mark.parametrize("include_model", [False, True])
def test_round_trip(wan, inputs, sla2_config, tmp_path, changes, include_model):
    first = apply_sla2(wan(), sla2_config(**changes), base_model="me/model")
    shake(first, ("router", "alpha", "proj") + (("model",) if include_model else ()))
    first.configure(topk=0.5, precision="int8")
    first.save(tmp_path / "adapter", include_model=include_model)
    second = apply_sla2(wan(seed=9 if include_model else 0), sla2_config(**changes))
    second.load(tmp_path / "adapter")
    assert second.config == first.config
    for (name, a), b in zip(
        first.transformer.state_dict().items(), second.transformer.state_dict().values()
    ):
        assert torch.equal(a, b), name
    second.configure(topk=0.3)
    second.load(tmp_path / "adapter", keep_settings=True)
    assert second.config.topk == 0.3
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "README.md",
        "sla2_adapter.safetensors",
        "sla2_config.json",
    ]


def test_weights_trained_in_fp32_load_into_a_bf16_model(wan, sla2_config, tmp_path):
    first = apply_sla2(wan(), sla2_config())
    shake(first, ("router", "alpha", "model"))
    first.save(tmp_path, include_model=True)
    second = apply_sla2(wan(seed=9).to(torch.bfloat16), sla2_config())
    second.load(tmp_path)
    assert second.transformer.proj_out.weight.dtype == torch.bfloat16
    for name, value in first.transformer.state_dict().items():
        found = second.transformer.state_dict()[name]
        assert found.dtype == (torch.float32 if ".processor." in name else torch.bfloat16), name
        assert torch.equal(found, value.to(found.dtype)), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_q": 16}, "expected block_q=16 as applied, got 8"),
        ({"block_k": 4}, "expected block_k=4 as applied, got 5"),
        ({"alpha": "mass"}, "expected alpha='mass' as applied, got 'position'"),
        ({"alpha_knots": 4}, "expected alpha_knots=4 as applied, got 3"),
    ],
)
def test_another_geometry_is_refused(wan, sla2_config, tmp_path, changes, message):
    apply_sla2(wan(), sla2_config()).save(tmp_path)
    with pytest.raises(ValueError, match=message):
        apply_sla2(wan(), sla2_config(**changes)).load(tmp_path)


def test_a_file_that_names_no_token_order_is_of_raster_order(wan, sla2_config, tmp_path):
    apply_sla2(wan(), sla2_config(token_order="raster")).save(tmp_path)
    path = tmp_path / "sla2_config.json"
    content = json.loads(path.read_text())
    del content["sla2"]["token_order"]
    path.write_text(json.dumps(content))
    assert apply_adapter(wan(), tmp_path).config == sla2_config(token_order="raster")
    with pytest.raises(ValueError, match="expected token_order='tiles' as applied, got 'raster'"):
        apply_sla2(wan(), sla2_config()).load(tmp_path)


def test_another_model_or_other_layers_are_refused(wan, sla2_config, tmp_path):
    apply_sla2(wan(), sla2_config(), base_model="one").save(tmp_path)
    with pytest.raises(ValueError, match="expected an adapter of a model with ffn_dim=48, got 32"):
        apply_sla2(wan(ffn_dim=48), sla2_config()).load(tmp_path)
    with pytest.raises(ValueError, match=r"expected layers \[1\] as applied, got \[0, 1\]"):
        apply_sla2(wan(), sla2_config(), skip_layers=[0]).load(tmp_path)
    with pytest.raises(ValueError, match="expected an adapter of two, got one of one"):
        apply_sla2(wan(), sla2_config(), base_model="two").load(tmp_path)


@pytest.mark.parametrize(
    "damage",
    ["missing", "extra", "shape", "dtype", "truncated", "version", "json", "absent", "field"],
)
def test_damaged_files_are_refused_and_change_nothing(wan, sla2_config, tmp_path, damage):
    handle = apply_sla2(wan(), sla2_config())
    shake(handle)
    handle.save(tmp_path)
    weights, config = tmp_path / "sla2_adapter.safetensors", tmp_path / "sla2_config.json"
    tensors, content = load_file(weights), json.loads(config.read_text())
    key = "layers.1.mixing.logit"
    expected = {
        "missing": f"expected the key '{key}', found none",
        "extra": "expected no key 'layers.7.mixing.logit'",
        "shape": rf"expected shape \(2, 3\) for {key}, got \(2, 4\)",
        "dtype": f"expected torch.float32 for {key}, got torch.float16",
        "truncated": "sla2_adapter.safetensors: expected a readable safetensors file",
        "version": "sla2_config.json: expected format_version 2, got 99",
        "json": "sla2_config.json: expected JSON",
        "absent": "sla2_adapter.safetensors: expected a safetensors file, found none",
        "field": "sla2_config.json: colour: expected a field among",
    }[damage]
    if damage == "missing":
        del tensors[key]
    elif damage == "extra":
        tensors["layers.7.mixing.logit"] = torch.zeros(1)
    elif damage == "shape":
        tensors[key] = torch.zeros(2, 4)
    elif damage == "dtype":
        tensors[key] = tensors[key].half()
    elif damage == "version":
        content["format_version"] = 99
    elif damage == "field":
        content["sla2"]["colour"] = 1
    save_file(tensors, weights)
    config.write_text("{" if damage == "json" else json.dumps(content))
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-9])
    if damage == "absent":
        weights.unlink()
    other = apply_sla2(wan(), sla2_config())
    before = {name: value.clone() for name, value in other.transformer.state_dict().items()}
    with pytest.raises((ValueError, FileNotFoundError), match=expected) as raised:
        other.load(tmp_path)
    assert "\n" not in str(raised.value)
    assert all(
        torch.equal(value, before[name]) for name, value in other.transformer.state_dict().items()
    )


def test_a_failed_write_leaves_nothing(wan, sla2_config, tmp_path, monkeypatch):
    handle = apply_sla2(wan(), sla2_config())
    monkeypatch.setattr(
        "safetensors.torch.save_file", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        handle.save(tmp_path / "adapter")
    assert list((tmp_path / "adapter").iterdir()) == []


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("layers", None, "expected layer numbers at 'layers', got None"),
        ("layers", ["0"], r"expected layer numbers at 'layers', got \['0'\]"),
        ("layers", [], r"expected layer numbers at 'layers', got \[\]"),
        ("model", [], r"expected an object at 'model', got \[\]"),
        ("dense_steps", "2", "expected an integer >= 0 at 'dense_steps', got '2'"),
        ("sla2", None, "expected an object at 'sla2', got None"),
    ],
)
def test_a_configuration_of_another_form_is_refused(
    wan, sla2_config, tmp_path, key, value, message
):
    path = apply_sla2(wan(), sla2_config()).save(tmp_path) / "sla2_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    transformer = wan()
    with pytest.raises(ValueError, match=rf"sla2_config\.json: {message}"):
        apply_adapter(transformer, tmp_path)


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    (tmp_path / "plain").touch()
    write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(2)})
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_full_disk_names_the_file(tmp_path):
    code = (
        "import resource, signal, sys; from pathlib import Path; import torch; from"
        " sla2_core.adapter import write_tensors\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        " resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\ntry:"
        " write_tensors(Path(sys.argv[1]), {'x': torch.zeros(5000)})\nexcept OSError as error:"
        " print(error)"
    )
    path = tmp_path / "weights.safetensors"
    shown = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    ).stdout
    assert shown.startswith(f"{path}: expected to write it, got: ")
    assert list(tmp_path.iterdir()) == []
