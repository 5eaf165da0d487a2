"""The baselines in a grid: each is trained by its own rule, which its row of the settings says."""

import pytest
from sla2_eval.grid.ablation import cells
from sla2_eval.grid.settings import AblationSettings
from sla2_eval.runs.settings import SettingsError, validate


def test_a_variant_s_own_stage_2_is_checked_and_trains_apart():
    row = {"label": "L", "family": "F", "attention": {"topk": 0.1}}

    def grid(**stage2) -> AblationSettings:
        variants = [{"name": "a", **row}, {"name": "b", **row, "stage2": stage2}]
        return validate({"variants": variants}, AblationSettings, "test")

    first, second = cells(grid(loss="distill"))
    assert first.tuned != second.tuned
    assert first.router == second.router
    assert len({cell.tuned for cell in cells(grid())}) == 1
    for given, message in (
        ({"los": "distill"}, r"variants.1 \(b\): stage2.los: expected one of steps, .*, got ano"),
        ({"seed": 3}, r"stage2.seed: expected one of"),
        ({"loss": "l2"}, r"stage2.loss: expected one of diffusion, distill, got 'l2'"),
    ):
        with pytest.raises(SettingsError, match=message):
            grid(**given)
