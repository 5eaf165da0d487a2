"""Sparsity and FLOPs of attention, measured while a model runs."""

import pytest
import torch
from helpers import tiny_wan
from sla2_core.cost import measured_share
from sla2_core.integrations.diffusers import apply_sla2
from sla2_eval.generation.cost import CallCosts


def maps_of(handle, inputs) -> list:
    with torch.inference_mode():
        return list(handle.block_maps(lambda: handle.transformer(**inputs)).values())


def test_every_call_counts_once_and_dense_steps_as_full_attention():
    inputs = tiny_wan.inputs()
    handle = apply_sla2(tiny_wan.model(), tiny_wan.config())
    maps = maps_of(handle, inputs)
    sparsity = sum(found.sparsity for found in maps) / len(maps)
    share = sum(measured_share(found, handle.config) for found in maps) / len(maps)
    assert 0 < sparsity < 1
    handle.remove()
    handle = apply_sla2(handle.transformer, tiny_wan.config(), dense_steps=1)
    with CallCosts([handle]) as costs, torch.inference_mode():
        for level in (900.0, 500.0, 100.0, 50.0):
            handle.transformer(**inputs | {"timestep": torch.full((2,), level)})
    found = costs.summary()
    assert found["sparsity"] == pytest.approx(0.75 * sparsity)
    assert found["flops"] == pytest.approx((1 + 3 * share) / 4)
    before = costs.summary()
    handle.transformer(**inputs)  # outside the block
    assert costs.summary() == before


def test_two_models_and_two_sizes_share_one_mean():
    handles = [apply_sla2(tiny_wan.model(), tiny_wan.config(topk=topk)) for topk in (0.3, 0.6)]
    small = tiny_wan.inputs()
    large = small | {"hidden_states": torch.randn(2, 4, 5, 6, 10)}
    found = [(h, x, maps_of(h, x)) for h, x in zip(handles, (small, large))]
    with CallCosts(handles) as costs, torch.inference_mode():
        for handle, inputs, _ in found:
            handle.transformer(**inputs)
    maps = [(h.config, one) for h, _, maps in found for one in maps]
    shares = [measured_share(one, config) for config, one in maps]
    assert costs.summary() == {
        "sparsity": pytest.approx(sum(one.sparsity for _, one in maps) / len(maps)),
        "flops": pytest.approx(sum(shares) / len(shares)),
    }


def test_full_attention_has_nothing_to_say():
    with CallCosts(()) as costs:
        pass
    assert costs.summary() == {}
