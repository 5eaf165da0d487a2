"""The pooled complement in a model: training-free in one line, trained by both stages, in adapters
and under torch.compile.
"""

import pytest
import torch
from helpers import models, tiny_wan
from sla2_core import training_free
from sla2_core.integrations.diffusers import apply_sla2
from sla2_core.integrations.loading import apply_adapter
from sla2_core.training.capture import capture
from sla2_core.training.stage1 import Stage1Config, load_stage1, train_stage1
from sla2_core.training.stage2 import Stage2Config, train_stage2

SIZES = {"block_q": 8, "block_k": 5}


def test_training_free_in_one_line_fits_any_model():
    for transformer in (tiny_wan.model(), models.flux()):
        handle = apply_sla2(transformer, training_free())
        assert handle.config.topk == 0.15
        assert list(handle.adapter_tensors()) == []
        handle.remove()
    full = transformer = tiny_wan.model()
    expected = full(**tiny_wan.inputs())[0]
    errors = []
    for topk in (1.0, 0.5, 0.15):
        handle = apply_sla2(transformer, training_free(topk=topk, **SIZES))
        errors.append((transformer(**tiny_wan.inputs())[0] - expected).abs().max())
        handle.remove()
    assert errors[0] < 1e-5 < errors[1] < errors[2] < 0.2
    with pytest.raises(ValueError, match="topkk: expected a field among head_dim"):
        apply_sla2(transformer, training_free(topkk=0.1))
    with pytest.raises(ValueError, match="head_dim: expected 12 as in the model, got 64"):
        apply_sla2(transformer, training_free(head_dim=64))


@pytest.mark.parametrize("name", ["pooled", "training_free"])
def test_a_model_goes_through_both_stages_adapter_and_compile(name, tmp_path):
    torch._dynamo.reset()
    transformer = tiny_wan.model()
    handle = apply_sla2(transformer, {"variant": name, "topk": 0.3, **SIZES})
    captures = capture(
        handle, lambda i: transformer(**tiny_wan.inputs(seed=i)), tmp_path / "c", samples=3
    )
    stage1 = Stage1Config(topk=(0.3, 0.5), steps=6, eval_every=3, rows=None)
    report = train_stage1(handle, captures, stage1, tmp_path / "stage1")
    learned = name == "pooled"
    tensors = handle.adapter_tensors()
    found = {n.split(".", 2)[2] for n in tensors}
    names = {"router.weight_q", "router.weight_k", "complement.bias"}
    assert found == (names if learned else set())
    if learned:
        assert report.held_out[-1][1] < report.held_out[0][1]
        for key, value in tensors.items():
            start = torch.eye(12) if "router" in key else torch.zeros(2)
            assert (value - start).abs().amax() > 1e-4, key
        other = apply_sla2(tiny_wan.model(), {"variant": name, "topk": 0.5, **SIZES})
        load_stage1(other, tmp_path / "stage1")
        pair = [h.adapter_tensors()["layers.0.complement.bias"] for h in (handle, other)]
        assert not torch.equal(*pair)  # one b for each k%, as of alpha
    before = {n: p.detach().clone() for n, p in tensors.items()}
    stage2 = Stage2Config(steps=1, batch_size=2, learning_rate=1e-3, checkpoint_every=1)
    made = train_stage2(handle, tiny_wan.pairs(), stage2, tmp_path / "stage2")
    for key, value in handle.adapter_tensors().items():
        assert torch.equal(value, before[key]) == ("router" in key), key
    again = tiny_wan.model(seed=5)
    assert apply_adapter(again, made.adapter).config == handle.config
    with torch.no_grad():
        expected = transformer.eval()(**tiny_wan.inputs())[0]
        assert torch.equal(again(**tiny_wan.inputs())[0], expected)
        compiled = torch.compile(again, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(**tiny_wan.inputs())[0], expected)
