"""Adapters that version 0.1 saved, before the axes had their names, load and give its outputs.

data/adapters_v1 holds five of them, made at commit 90f6bbd on the tiny Wan, each with the output of
the model it was saved from.
"""

from pathlib import Path

import pytest
import torch
from helpers import models
from safetensors.torch import load_file
from sla2_core.integrations.loading import apply_adapter

DATA = Path(__file__).parents[1] / "data" / "adapters_v1"


@pytest.mark.parametrize(
    ("name", "members"),
    [
        ("position", ("learned", "linear", "position")),
        ("mass", ("learned", "linear", "mass")),
        ("sla", ("heuristic", "projected", "sum")),
        (
            "sla_default",  # made with smooth_k=True, which SLA ignored
            ("heuristic", "projected", "sum"),
        ),
        ("sparse", ("heuristic", "linear", "one")),
    ],
)
def test_an_old_adapter_gives_the_same_output(name, members):
    torch.manual_seed(0)
    transformer = models.wan().eval()
    handle = apply_adapter(transformer, DATA / name)
    config = handle.config
    assert (config.router, config.complement, config.alpha) == members
    assert config.token_order == "raster"
    torch.manual_seed(1)
    for tensor in handle.adapter_tensors().values():
        torch.randn_like(tensor)  # what the script that made the file drew
    with torch.no_grad():
        hidden, text = torch.randn(1, 4, 3, 6, 10), torch.randn(1, 7, 8)
        out = transformer(hidden, torch.tensor([500.0]), text, return_dict=False)[0]
    expected = load_file(DATA / name / "output.safetensors")["output"]
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
