"""Stage 2 with a k% that falls, VSA's schedule."""

import pytest
import torch
from helpers.tiny_wan import weights
from sla2_core.integrations.diffusers import apply_sla2
from sla2_core.integrations.loading import apply_adapter
from sla2_core.training.stage2.train import Stage2Config, train_stage2

CONFIG = Stage2Config(steps=5, batch_size=2, topk_steps=4, checkpoint_every=2, warmup=1)


def test_topk_falls_to_the_layers_own_and_a_killed_run_goes_on_with_it(
    wan, sla2_config, data, tmp_path
):
    seen = []

    def run(folder, kill=None):
        handle = apply_sla2(wan(), sla2_config(topk=0.2))

        def progress(step, steps, metrics):
            seen.append(round(handle.config.topk, 9))
            if step == kill:
                raise KeyboardInterrupt

        try:
            report = train_stage2(handle, data, CONFIG, tmp_path / folder, progress=progress)
        finally:
            assert handle.config.topk == 0.2
        return handle, report

    whole, first = run("whole")
    assert seen == [1.0, 0.8, 0.6, 0.4, 0.2]
    assert apply_adapter(wan(), first.adapter).config.topk == 0.2
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        run("parts", kill=3)
    parts, second = run("parts")
    assert seen == [1.0, 0.8, 0.6, 0.6, 0.4, 0.2]
    assert first.loss == second.loss
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(parts).items())
    assert "topk_steps" not in Stage2Config().to_dict()  # a run of version 0.1 goes on
    with pytest.raises(ValueError, match="topk_steps: expected fewer than the 5 steps, got 5"):
        Stage2Config(steps=5, topk_steps=5)
