"""The token order of a model: full attention stays what it was, every family's tokens stand in that
order between its ends, and what cannot have it is refused.
"""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from helpers import families, models, tiny_wan
from sla2_core.integrations.diffusers import apply_sla2
from sla2_core.integrations.family import family_of
from sla2_core.order.base import coordinates_of
from sla2_core.registry import ORDERS

NAMES = list(families.BUILDERS)
GRIDS = {"flux": (1, 5, 9)}  # of the tiny models; the others' is
GRID = (3, 3, 5)
TILES = {"token_order": "tiles", "options": {"tile": (2, 2, 2)}}


def applied(name, family=None, **changes):
    """(handle, predict) of a tiny model; predict(transformer) runs its batch."""
    transformer, sample, _ = families.build(name)
    batch = families.batch(sample)
    family = family or family_of(transformer)
    known = {"alpha": "mass", **TILES, **changes}
    handle = apply_sla2(transformer, families.config(transformer, **known))
    return handle, lambda model=transformer: family.predict(model, *batch)


def outcome(handle, predict) -> list[torch.Tensor]:
    """The output and every gradient of its mean square."""
    out = predict()
    out.square().mean().backward()
    named = handle.transformer.named_parameters()
    return [out.detach(), *(p.grad for _, p in named if p.grad is not None)]


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=3e-6, rtol=1e-4)


def in_processors(monkeypatch, name):
    """Leave the order to the processors of a family."""
    from sla2_core.integrations import family

    transformer, _, _ = families.build(name)
    plain = dataclasses.replace(family_of(transformer), token_flow=None)
    monkeypatch.setitem(family._FAMILIES, family.class_name(transformer), plain)


@pytest.mark.parametrize("name", NAMES)
def test_full_attention_is_the_same_in_every_order_with_its_gradients(name):
    expected = outcome(*applied(name, topk=1.0, token_order="raster", options={}))
    assert_same(outcome(*applied(name, topk=1.0)), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_ordered_once_is_one_ordered_in_every_layer(name, monkeypatch):
    """Sparse, so that another order of tokens in any layer would select other blocks."""
    found = outcome(*applied(name))
    raster = outcome(*applied(name, token_order="raster", options={}))
    assert (found[0] - raster[0]).abs().max() > 1e-3
    seen = []
    monkeypatch.setattr(torch, "argsort", lambda x, real=torch.argsort: seen.append(x) or real(x))
    outcome(*applied(name))
    assert len(seen) == 2  # the order, and its inverse: once in the forward pass
    in_processors(monkeypatch, name)
    assert_same(outcome(*applied(name)), found)
    assert len(seen) == 2 + 1 + 2  # the inverse in each of two layers


@pytest.mark.parametrize("name", ["wan", "flux"])
def test_layers_without_sla2_work_on_the_ordered_tokens(name, monkeypatch):
    def run():
        transformer, sample, _ = families.build(name)
        family, batch = family_of(transformer), families.batch(sample)
        apply_sla2(transformer, families.config(transformer, **TILES), skip_layers=[0])
        with torch.no_grad():
            return [family.predict(transformer, *batch)]

    found = run()
    in_processors(monkeypatch, name)
    assert_same(run(), found)


def test_arguments_keep_their_places_for_hooks_of_others():
    handle, _ = applied("wan")
    latents, timestep, text = tiny_wan.inputs().values()
    seen = []
    handle.transformer.register_forward_pre_hook(lambda model, args: seen.append(args))
    with torch.no_grad():
        outputs = [
            handle.transformer(latents, timestep, encoder_hidden_states=text)[0],
            handle.transformer(
                hidden_states=latents, timestep=timestep, encoder_hidden_states=text
            )[0],
        ]
    assert torch.equal(*outputs)
    assert [len(args) for args in seen] == [2, 0]
    assert seen[0][1] is timestep


@pytest.mark.parametrize("name", ["wan", "hunyuan_video", "cogvideox_2b", "flux", "ltx2"])
def test_captured_tokens_stand_in_the_order(name):
    recorded = {}
    for order in ("raster", "tiles"):
        options = {} if order == "raster" else TILES["options"]
        handle, predict = applied(name, token_order=order, options=options)
        seen = recorded.setdefault(order, [])
        with torch.no_grad(), handle.recording(lambda layer, *qkv, seen=seen: seen.append(qkv)):
            predict()
    places = ORDERS.make(tiny_wan.config(**TILES)).permutation(GRIDS.get(name, GRID))
    for found, raster in zip(recorded["tiles"], recorded["raster"], strict=True):
        assert found[3] == raster[3] == (0 if name in ("wan", "ltx2") else families.TEXT)
        text = torch.arange(45, 45 + found[3])
        for x, plain in zip(found[:3], raster[:3]):
            expected = plain[:, :, torch.cat([places, text])]
            torch.testing.assert_close(x, expected, atol=3e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["wan", "flux", "hunyuan_video15", "cogvideox_5b"])
def test_without_sla2_nothing_is_moved_and_copies_and_removed_models_have_no_hooks(name):
    transformer, sample, _ = families.build(name)
    family, batch = family_of(transformer), families.batch(sample)
    with torch.no_grad():
        expected = family.predict(transformer, *batch)
        before = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in transformer.modules()]
        handle = apply_sla2(transformer, families.config(transformer, **TILES), dense_steps=1)
        routed = family.predict(transformer, *families.batch(sample))  # the first step: dense
        assert torch.equal(routed, expected)
        with handle.disabled():
            assert torch.equal(family.predict(transformer, *batch), expected)
        twin = handle.dense_copy()
        assert torch.equal(family.predict(twin, *batch), expected)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in twin.modules())
        later = copy.deepcopy(transformer)  # with SLA2, its hooks and their state
        latents, sigma, conditions = batch
        moved = [family.predict(m, latents, sigma / 2, conditions) for m in (transformer, later)]
        assert torch.equal(*moved)
        handle.remove()
        assert torch.equal(family.predict(transformer, *batch), expected)
    after = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in transformer.modules()]
    assert after == before


@pytest.mark.parametrize("name", ["wan", "cogvideox_5b"])
def test_gradient_checkpointing_sees_the_order_that_the_forward_pass_had(name, monkeypatch):
    expected = outcome(*applied(name))
    for flow in (True, False):
        if not flow:
            in_processors(monkeypatch, name)
        handle, predict = applied(name)
        handle.transformer.train()
        handle.transformer.enable_gradient_checkpointing()
        assert_same(outcome(handle, predict), expected)


def test_lora_at_both_ends_of_a_model_sees_the_same_tokens():
    from peft import LoraConfig

    found = []
    for changes in ({"token_order": "raster", "options": {}}, {}):
        handle, predict = applied("wan", topk=1.0, **changes)
        targets = ["patch_embedding", "proj_out", "to_q"]
        torch.manual_seed(3)
        handle.transformer.add_adapter(
            LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        )
        with torch.no_grad():
            found.append([predict()])
    assert_same(*found)


def variant(name):
    """(transformer, run) of a model with what only some checkpoints have."""
    torch.manual_seed(0)
    if name == "a timestep for each token of Wan":
        model, given = models.wan(), tiny_wan.inputs()
        given["timestep"] = 900 * torch.rand(2, 45)
    elif name in ("a timestep for each token of LTX-2", "tokens of keyframes in LTX-2"):
        model, sample, _ = families.build("ltx2")
        family, (latents, sigma, conditions) = family_of(model), families.batch(sample)
        clean = {"audio_timestep": torch.zeros(2), "sigma": sigma, "audio_sigma": torch.zeros(2)}
        sizes = {n: int(conditions.pop(n)[0]) for n in ("num_frames", "height", "width")}
        conditions["audio_num_frames"] = int(conditions["audio_num_frames"][0])
        given = {"hidden_states": latents, "timestep": 900 * torch.rand(2, 45)}
        given |= clean | sizes | conditions
        if "keyframes" in name:
            given["hidden_states"] = torch.cat([latents, torch.randn(2, 15, 4)], dim=1)
            given["timestep"] = 900 * torch.rand(2, 60)
            own = model.rope.prepare_video_coords(2, *sizes.values(), latents.device)
            given["video_coords"] = torch.cat([own, own[:, :, -15:] + 0.5], dim=2)
        assert family.grid(model, (), given) == GRID
    elif name == "residuals of Flux's ControlNet":
        model, sample, _ = families.build("flux")
        latents, sigma, given = families.batch(sample)
        given |= {key: given[key][0] for key in ("txt_ids", "img_ids")}
        given |= {"hidden_states": latents, "timestep": sigma, "guidance": torch.ones(2)}
        for kind in ("block", "single_block"):
            given[f"controlnet_{kind}_samples"] = [torch.randn(2, 45, 24)]
    elif name == "patches of two frames in CogVideoX 1.5":
        model = models.cogvideox(patch_size_t=2, sample_width=10, sample_height=6)
        angle = torch.randn(30, 8).repeat_interleave(2, 1)
        given = {"image_rotary_emb": (angle.cos(), angle.sin()), "timestep": torch.tensor([3, 9])}
        given |= {"hidden_states": torch.randn(2, 4, 4, 6, 10)}
        given |= {"encoder_hidden_states": torch.randn(2, families.TEXT, 8)}
    else:
        model = models.hunyuan_video(image_condition_type="token_replace")
        _, sample, _ = families.build("hunyuan_video")
        latents, sigma, given = families.batch(sample)
        given |= {"hidden_states": latents, "timestep": sigma, "guidance": torch.ones(2)}
    return model.eval(), lambda model: model(**given, return_dict=False)[0]


@pytest.mark.parametrize(
    ("name", "once"),
    [
        ("a timestep for each token of Wan", True),
        ("a timestep for each token of LTX-2", True),
        ("tokens of keyframes in LTX-2", True),
        ("residuals of Flux's ControlNet", True),
        ("patches of two frames in CogVideoX 1.5", True),
        ("the first frame of HunyuanVideo's image to video", False),
    ],
)
def test_what_belongs_to_single_tokens_moves_with_them(name, once, monkeypatch):
    model, run = variant(name)
    with torch.no_grad():
        expected = run(model)
        handle = apply_sla2(model, families.config(model, topk=1.0, alpha="one", **TILES))
        seen = []
        real = torch.argsort
        monkeypatch.setattr(torch, "argsort", lambda x: seen.append(x) or real(x))
        torch.testing.assert_close(run(model), expected, atol=3e-6, rtol=1e-4)
    assert len(seen) == (2 if once else 1 + len(handle.layers))


def test_a_model_of_unknown_grid_is_refused_and_left_as_it_was(monkeypatch):
    from sla2_core.integrations import family

    transformer, sample, _ = families.build("ltx2")
    own = transformer.transformer_blocks[0].attn1.processor
    config = families.config(transformer, **TILES)
    unknown = dataclasses.replace(family_of(transformer), grid=None)
    with monkeypatch.context() as patch:
        patch.setitem(family._FAMILIES, "LTX2VideoTransformer3DModel", unknown)
        with pytest.raises(
            ValueError, match=r"token_order: expected 'raster' for ltx2, whose grid .* got 'tiles'"
        ):
            apply_sla2(transformer, config)
    assert transformer.transformer_blocks[0].attn1.processor is own
    apply_sla2(transformer, config)
    latents, sigma, conditions = families.batch(sample)
    with pytest.raises(
        ValueError, match=r"num_frames, height, width: expected a grid of the 45 tokens .*\[3, 3, 4"
    ):
        family_of(transformer).predict(
            transformer, latents, sigma, conditions | {"width": torch.tensor([4, 4])}
        )


def test_an_adapter_of_another_order_is_refused(tmp_path):
    handle, _ = applied("wan")
    handle.save(tmp_path)
    for changes, expected in (
        ({"token_order": "raster", "options": {}}, "token_order='raster' as applied, got 'tiles'"),
        ({"options": {"tile": (4, 4, 4)}}, r"options.tile=\(4, 4, 4\) as applied, got \(2, 2, 2\)"),
    ):
        other, _ = applied("wan", **changes)
        with pytest.raises(ValueError, match=f"sla2_config.json: expected {expected}") as raised:
            other.load(tmp_path)
        assert "\n" not in str(raised.value)


def test_flux_reads_coordinates_and_refuses_an_order_that_does_not():
    from helpers import toys

    transformer, _, _ = families.build("flux")
    with pytest.raises(ValueError, match=r"expected 'raster' for flux, .* got 'toy-order'"):
        apply_sla2(transformer, families.config(transformer, token_order=toys.Backwards.name))
    found = coordinates_of((1, 5, 9), torch.device("cpu"))
    family = family_of(transformer)
    assert torch.equal(family.coordinates(transformer, (), {"img_ids": found.float()[None]}), found)
