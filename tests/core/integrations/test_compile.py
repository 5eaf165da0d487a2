"""torch.compile of a model with SLA2: one graph, forward and backward, switching and configuring
afterwards.
"""

from __future__ import annotations

import pytest
import torch
from helpers import families, tiny_wan
from sla2_core.integrations.diffusers import apply_sla2
from sla2_core.integrations.family import family_of
from sla2_core.integrations.loading import apply_adapter


def outcome(transformer, run) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The output of run() and the gradients of its mean square."""
    transformer.zero_grad()
    out = run()
    out.square().mean().backward()
    return out.detach(), {
        n: p.grad.clone() for n, p in transformer.named_parameters() if p.grad is not None
    }


QUICK = ("cogvideox_5b", "flux")  # Wan has tests of its own below


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in families.BUILDERS
    ],
)
def test_every_family_is_one_graph_forward_and_backward(name):
    torch._dynamo.reset()
    transformer, sample, _ = families.build(name)
    family = family_of(transformer)
    apply_sla2(transformer, families.config(transformer, alpha="mass", precision="int8"))
    given = families.batch(sample)
    expected = outcome(transformer, lambda: family.predict(transformer, *given))
    if (
        name == "hunyuan_video15"
    ):  # the model branches on its image embeddings: its blocks are one graph each
        compiled = transformer
        transformer.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    else:
        compiled = torch.compile(transformer, backend="aot_eager", fullgraph=True)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    found = outcome(transformer, lambda: family.predict(compiled, *given))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
    torch.testing.assert_close(found[0], expected[0], atol=2e-6, rtol=1e-5)
    for key, grad in found[1].items():  # a graph gives zeros where eager gives none
        torch.testing.assert_close(
            grad, expected[1].get(key, torch.zeros_like(grad)), atol=1e-6, rtol=1e-4, msg=key
        )
    assert set(expected[1]) <= set(found[1])


@pytest.mark.parametrize(
    "backend",
    ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.timeout(1800)])],
)
@pytest.mark.parametrize(
    "changes", [{"alpha": "mass", "precision": "int8"}, tiny_wan.SLA], ids=["sla2", "sla"]
)
def test_one_graph_forward_and_backward(wan, inputs, sla2_config, backend, changes):
    torch._dynamo.reset()
    transformer = wan(num_layers=1)
    apply_sla2(transformer, sla2_config(**changes))
    compiled = torch.compile(transformer, backend=backend, fullgraph=True)
    results = [
        outcome(transformer, lambda model=model: model(**inputs(), return_dict=False)[0])
        for model in (transformer, compiled)
    ]
    torch.testing.assert_close(results[1][0], results[0][0], atol=2e-6, rtol=1e-5)
    assert set(results[1][1]) == set(results[0][1])
    for name, grad in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], grad, atol=1e-6, rtol=1e-4, msg=name)


def test_configure_and_disable_act_on_a_compiled_model(wan, inputs, sla2_config):
    torch._dynamo.reset()
    transformer = wan(num_layers=1)
    handle = apply_sla2(transformer, sla2_config())
    compiled = torch.compile(transformer, backend="eager", fullgraph=True)

    def difference():
        with torch.no_grad():
            a, b = (model(**inputs(), return_dict=False)[0] for model in (transformer, compiled))
        assert torch.equal(a, b)
        return a

    first = difference()
    for topk in (0.6, 0.45):
        handle.configure(topk=topk)
        assert not torch.equal(difference(), first)
    handle.configure(topk=0.3)
    assert torch.equal(difference(), first)
    with handle.disabled():
        assert not torch.equal(difference(), first)


def test_a_model_compiled_before_has_the_adapter_of_a_plain_one(wan, inputs, sla2_config, tmp_path):
    torch._dynamo.reset()
    compiled = torch.compile(wan(), backend="aot_eager")
    handle = apply_sla2(compiled, sla2_config())
    handle.save(tmp_path, include_model=True)
    plain = wan(seed=9)
    apply_adapter(plain, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(**inputs())[0], plain(**inputs())[0], atol=2e-6, rtol=1e-5
        )


def test_dense_steps_go_with_compiled_blocks(wan, inputs, sla2_config):
    torch._dynamo.reset()
    plain, compiled = wan(), wan()
    for transformer in (plain, compiled):
        apply_sla2(transformer, sla2_config(), dense_steps=1)
    compiled.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    outputs = []
    with torch.no_grad():
        for timestep in (900.0, 500.0, 900.0):
            given = inputs() | {"timestep": torch.full((2,), timestep)}
            outputs.append(compiled(**given)[0])
            torch.testing.assert_close(outputs[-1], plain(**given)[0], atol=2e-6, rtol=1e-5)
    assert torch.equal(outputs[0], outputs[2])
