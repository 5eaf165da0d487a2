"""The baselines in a grid: each is trained by its own rule, which its row of the settings says."""

from pathlib import Path

import pytest
from sla2_eval.grid.ablation import cells
from sla2_eval.grid.settings import AblationSettings
from sla2_eval.runs.settings import SettingsError, load_settings, validate

FILE = Path(__file__).parents[3] / "experiments" / "tiny_wan" / "baselines.yaml"


def test_the_committed_grid_trains_each_baseline_by_its_own_rule():
    settings = load_settings(FILE, AblationSettings)
    found = {cell.variant.name: cell for cell in cells(settings) if cell.seed == 0}
    configs = {name: cell.attention.config() for name, cell in found.items()}
    assert configs["vmoba-97"].router == "global_threshold"
    assert (configs["vsa-90"].complement, configs["vsa-90"].alpha) == ("coarse", "sum")
    assert configs["sparge-97"].options["top_p"] == 0.03
    learners = {name for name, cell in found.items() if cell.router}
    assert learners == {"sla2-97", "sla2-90"}  # the others have no stage 1
    losses = {name: cell.variant.own_stage2(settings.stage2).loss for name, cell in found.items()}
    assert {name for name, loss in losses.items() if loss == "distill"} == {
        "sparge-97",
        "sparge-90",
    }
    assert len({cell.tuned for cell in found.values()}) == len(found)


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
