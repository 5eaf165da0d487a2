"""The cells of a grid: those that the committed experiments always had, and what of their settings
tells trainings apart.
"""

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from helpers.tiny_model import save
from helpers.toys import Constant
from sla2_core.config import SLA2Config
from sla2_core.formats import Scaled
from sla2_core.registry import FORMATS, MIXINGS
from sla2_eval.grid.ablation import cells, graph, sampling
from sla2_eval.grid.quickstart import settings as quickstart
from sla2_eval.grid.settings import AblationSettings, Attention
from sla2_eval.runs.settings import load_settings, validate

ROOT = Path(__file__).parents[3]
# Written by the code of version 0.1: what its settings made of these grids; the quickstart's follow
# the defaults of today. `base` holds the first cell's attention, `changes` what differs; equal
# numbers share a stage 1, or a stage 2.
BEFORE = json.loads((Path(__file__).parent / "data" / "cells.json").read_text())
SIZES = {"head_dim": 128, "num_heads": 8}


def numbered(keys: list) -> list:
    """Each different key's place of first appearance; None stays."""
    seen: dict = {}
    return [None if key is None else seen.setdefault(key, len(seen)) for key in keys]


def test_the_quickstart_shows_the_shipped_adapters_and_one_short_training(tmp_path):
    settings = quickstart("tiny")
    found = {cell.name: cell for cell in cells(settings)}
    sparsity = {name: cell.sparsity for name, cell in found.items()}
    assert sparsity == pytest.approx(
        {"sla2-97": 0.97, "sla2-95": 0.95, "sla2-90": 0.9, "sla-97": 0.97, "sla2-97-here": 0.97}
    )
    live = found.pop("sla2-97-here")
    assert live.router
    assert live.tuned
    for name, cell in found.items():
        config = cell.attention.config()
        assert (cell.router, cell.tuned) == (None, None)
        assert (config.precision, config.token_order) == ("int8", "tiles")
        assert config.complement == ("projected" if name == "sla-97" else "linear")
        training = json.loads((cell.variant.adapter / "training.json").read_text())
        assert training["settings"]["stage2"]["steps"] == 2000
    assert live.attention.config() == found["sla2-97"].attention.config()
    shown = {cell.name for cell in cells(quickstart())}
    assert shown == {"pooled-97", "pooled-90", "sla2-97", "sla-97", live.name}
    assert quickstart().model == "tiny-4k"
    tasks = list(graph(quickstart(), tmp_path))
    trained = next(number for number, name in enumerate(tasks) if name.startswith("stage2"))
    assert trained < tasks.index("videos of sla2-97 (1 of 2)")  # while others make videos
    # A model without shipped adapters trains all of its variants.
    save(tmp_path)
    assert all(cell.tuned for cell in cells(quickstart(str(tmp_path))))


def test_shipped_adapters_were_trained_by_the_files_that_they_name():
    """A grid's file that is edited after its adapters were shipped no longer makes them."""
    folder = ROOT / "packages/sla2-eval/src/sla2_eval/tiny/weights"
    logs = sorted(folder.glob("*/adapters/*/training.json"))
    assert len(logs) >= 10
    for path in logs:
        log = json.loads(path.read_text())
        file = ROOT / log["command"].split("--config ")[1].split()[0]
        now = load_settings(file, AblationSettings).model_dump(mode="json")
        now["stage2"]["shift"] = log["settings"]["stage2"]["shift"]  # else the model's
        model = log["settings"].pop("model")
        assert now["model"] == model, path
        for section, then in log["settings"].items():  # settings that came later have defaults
            assert {name: now[section][name] for name in then} == then, (path, section)
        variants = {variant["name"]: variant for variant in now["variants"]}
        variant = log["variant"]
        given = {"attention": variant["attention"], "stage2": variant.get("stage2", {})}
        assert {name: variants[variant["name"]][name] for name in given} == given, path


@pytest.mark.parametrize("name", BEFORE)
def test_the_committed_grids_have_the_cells_they_had(name):
    before = copy.deepcopy(BEFORE[name])
    path = ROOT / "experiments" / "tiny_wan" / f"{name}.yaml"
    settings = load_settings(path, AblationSettings)
    found = cells(settings)
    rows = [dict(zip(before["columns"], row)) for row in before["cells"]]
    assert [(c.name, c.seed, c.sparsity) for c in found] == [
        (row["name"], row["seed"], row["sparsity"]) for row in rows
    ]
    for cell, row in zip(found, rows):
        whole = {**before["base"], **row["changes"]}
        assert cell.attention.config() == SLA2Config.from_dict({**whole, **SIZES}), cell.name
        whole["precision"] = row["train_precision"]
        assert cell.trained.config() == SLA2Config.from_dict({**whole, **SIZES}), cell.name
    shared = [key for cell in found for key in (cell.router, cell.tuned)]
    assert numbered(shared) == numbered([k for row in rows for k in (row["stage1"], row["stage2"])])
    stage1, stage2 = asdict(settings.stage1), asdict(settings.stage2)
    assert stage1["steps"] == before["stage1"]["steps"]
    assert list(stage1["topk"]) == before["stage1"]["topk"]
    assert stage1["max_scores"] == 1 << 22
    assert before["stage2"].pop("dtype") == stage2["autocast"] == "auto"
    assert {key: stage2[key] for key in before["stage2"]} == before["stage2"]
    assert stage2["shift"] == 3.0
    assert settings.capture.samples == before["capture"]["samples"]
    assert settings.capture.seed == before["capture"]["seed"]
    sampled = asdict(sampling(settings))
    prompts, count = before["generate"].pop("prompts"), before["generate"].pop("num_prompts")
    assert {key: sampled[key] for key in before["generate"]} == before["generate"]
    assert settings.generate.num_prompts == count
    assert settings.generate.prompts == (ROOT / prompts if prompts else None)


class Untrained(Constant):
    """toy-constant, left to stage 2."""

    stages: ClassVar = ("stage2",)


class Clipped(Scaled):
    """INT8 with an option."""

    qk, pv = "int8", "int8"
    options: ClassVar = {"limit": 1.0}


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    """Members "untrained" and "clipped", until the test ends."""
    for axis in (MIXINGS, FORMATS):
        monkeypatch.setattr(axis, "_members", dict(axis._members))
    MIXINGS.register("untrained")(Untrained)
    FORMATS.register("clipped")(Clipped)


def grid(*attentions: dict, base: dict | None = None, **changes) -> list:
    """The cells of a grid with these variants."""
    variants = [
        {"name": f"v{n}", "label": "L", "family": "F", "attention": {"topk": 0.1, **own}}
        for n, own in enumerate(attentions)
    ]
    values = {"attention": base or {}, "variants": variants, **changes}
    return cells(validate(values, AblationSettings, "test"))


@pytest.mark.parametrize(
    ("one", "other", "shares"),
    [
        ({"alpha_init": 0.8}, {"alpha_init": 0.5}, False),
        ({"tau": 0.1}, {"tau": 0.2}, False),
        ({"block_k": 64}, {"block_k": 32}, False),
        ({"smooth_k": True}, {"smooth_k": False}, False),
        ({"alpha": "toy-constant"}, {"alpha": "toy-constant", "options": {"first": 0.25}}, False),
        ({"alpha": "toy-constant"}, {"alpha": "toy-constant", "options": {"first": 0.5}}, True),
        ({"precision": "clipped"}, {"precision": "clipped", "options": {"limit": 2.0}}, False),
        ({"topk": 0.1}, {"topk": 0.2}, True),
        ({"precision": "int8"}, {"precision": "int4", "qat_backward": "matched"}, True),
        ({"backend": "auto"}, {"backend": "cpu"}, True),
        ({"complement": "linear"}, {"complement": "none"}, False),
    ],
)
def test_a_stage_1_is_shared_where_nothing_that_it_depends_on_differs(one, other, shares):
    first, second = grid(one, other)
    assert (first.router == second.router) is shares
    assert first.router is not None


def test_a_stage_2_depends_on_all_but_the_backend():
    plain, elsewhere, wide, low = grid({}, {"backend": "cpu"}, {"topk": 0.2}, {"precision": "int8"})
    assert plain.tuned == elsewhere.tuned
    assert len({plain.tuned, wide.tuned, low.tuned}) == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"num_videos": 3}},
        {"capture": {"samples": 3}},
        {"stage1": {"rows": 3}},
        {"stage2": {"shift": 5.0}},
    ],
    ids=str,
)
def test_a_stage_1_depends_on_its_data_and_settings(changes):
    assert grid({})[0].router != grid({}, **changes)[0].router


def test_what_there_is_to_learn_in_stage_1_is_asked_of_the_members():
    nothing = {"router": "heuristic", "alpha": "one"}
    found = grid(
        nothing,
        {**nothing, "alpha": "toy-constant"},
        {**nothing, "alpha": "untrained"},
        {**nothing, "router": "learned"},
        {"variant": "sla"},
    )
    assert [cell.router is not None for cell in found] == [False, True, False, True, False]


def test_a_variant_beats_the_base_and_its_own_fields_beat_it():
    base = {"alpha": "mass", "smooth_k": True, "tau": 0.2, "precision": "int8"}
    cell, own = grid({"variant": "sla"}, {"variant": "sla", "smooth_k": True}, base=base)
    config = cell.attention.config()
    assert (config.alpha, config.complement, config.smooth_k) == ("sum", "projected", False)
    assert (config.tau, config.precision) == (0.2, "int8")
    assert own.attention.config().smooth_k is True


def test_a_format_takes_its_own_options_with_it():
    low = Attention(
        {
            "topk": 0.1,
            "precision": "clipped",
            "alpha": "toy-constant",
            "options": {"limit": 2, "first": 1.0},
        }
    )
    assert low.in_precision("full").config().options == {"first": 1.0, "tile": None}
    assert low.config().options == {"first": 1.0, "limit": 2, "tile": None}


def test_captures_are_made_once_for_each_token_order(monkeypatch, tmp_path):
    from sla2_core.order import Order
    from sla2_core.registry import ORDERS

    class Backwards(Order):
        """The last token first."""

        def permutation(self, grid):
            return torch.arange(grid[0] * grid[1] * grid[2]).flip(0)

    monkeypatch.setattr(ORDERS, "_members", dict(ORDERS._members))
    ORDERS.register("backwards")(Backwards)
    variants = [
        {"name": n, "label": n, "family": n, "attention": {"topk": 0.1, **own}}
        for n, own in (
            ("a", {}),
            ("b", {"token_order": "backwards"}),
            ("c", {"token_order": "backwards", "tau": 0.2}),
            ("d", {"options": {"tile": [2, 2, 4]}}),
            ("e", {"block_k": 32}),  # which gives the tile
            ("f", {"token_order": "raster"}),
            ("g", {"token_order": "raster", "block_k": 32}),
        )
    ]
    settings = validate({"variants": variants}, AblationSettings, "test")
    tasks = graph(settings, tmp_path)
    routers = {cell.name: cell.router for cell in cells(settings)}
    assert len(set(routers.values())) == len(routers)
    captures = {name: tasks[router].needs for name, router in routers.items()}
    assert captures["b"] == captures["c"]
    assert captures["f"] == captures["g"]
    assert len(set(captures.values())) == 5
    assert sum(name.startswith("captures-") for name in tasks) == 5
