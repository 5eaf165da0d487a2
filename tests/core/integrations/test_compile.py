"""torch.compile of a model with SLA2: one graph, forward and backward, switching and configuring afterwards."""

from __future__ import annotations

import pytest
import torch
from sla2_core.integrations.diffusers import apply_sla2


@pytest.mark.parametrize(
    "backend",
    ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("changes", [{"alpha": "mass", "precision": "int8"}, {"method": "sla"}], ids=["sla2", "sla"])
def test_one_graph_forward_and_backward(wan, inputs, sla2_config, backend, changes):
    torch._dynamo.reset()
    transformer = wan(num_layers=1)
    apply_sla2(transformer, sla2_config(**changes))
    compiled = torch.compile(transformer, backend=backend, fullgraph=True)
    results = []
    for model in (transformer, compiled):
        transformer.zero_grad()
        out = model(**inputs(), return_dict=False)[0]
        out.square().mean().backward()
        results.append(
            (out.detach(), {n: p.grad.clone() for n, p in transformer.named_parameters() if p.grad is not None})
        )
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


def test_the_operator_is_well_formed(sla2_config):
    """torch's own check: schema, fake shapes, autograd registration, and tracing with symbolic shapes."""
    from sla2_core import build_attention
    from sla2_core.integrations.compiled import config_text, register

    register()
    config = sla2_config(alpha="mass")
    parameters = list(build_attention(config).parameters())
    q, k, v = (torch.randn(1, 45, 2, 12, requires_grad=True) for _ in range(3))
    torch.library.opcheck(
        torch.ops.sla2.routed_attention, (q, k, v, parameters, torch.tensor([43]), config_text(config), 4)
    )
