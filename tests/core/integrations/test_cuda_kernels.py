"""The CUDA kernels, on the emulator, inside a bfloat16 model of every family: output and every
gradient as on the CPU kernels.
"""

from __future__ import annotations

import pytest
import torch
from helpers import families
from sla2_core.integrations.diffusers import apply_sla2
from sla2_core.integrations.family import family_of
from sla2_core.variants import sla

PUBLISHED = [
    pytest.param(name, True, id=f"sla-{name}", marks=() if name == "wan" else pytest.mark.slow)
    for name in families.BUILDERS
]


@pytest.mark.parametrize(
    ("name", "published"),
    [*(pytest.param(name, False, id=f"sla2-{name}") for name in families.BUILDERS), *PUBLISHED],
)
def test_output_and_gradients_are_those_of_the_cpu_kernels(name, published):
    transformer, sample, _ = families.build(name)
    family = family_of(transformer)
    config = families.config(transformer, topk=0.4, block_q=16, block_k=16)
    handle = apply_sla2(transformer, sla(config) if published else config)
    batch = families.batch(sample)
    found = []
    for backend in ("emulator", "cpu"):
        handle.configure(backend=backend)
        transformer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = family.predict(transformer, *batch)
        out.float().square().mean().backward()
        grads = {n: p.grad.clone() for n, p in transformer.named_parameters() if p.grad is not None}
        found.append({"out": out.detach()} | grads)
    assert found[0].keys() == found[1].keys()
    for key, right in found[1].items():
        error, size = (found[0][key].float() - right.float()).norm(), right.float().norm()
        assert error <= 0.1 * size + 1e-4, (
            f"{key}: {error:.3g} of {size:.3g}"
        )  # a bias of K has next to none
