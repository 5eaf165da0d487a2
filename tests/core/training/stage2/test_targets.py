"""A teacher that keeps its predictions: asked once, the same training to the bit, told apart by
what it was given."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import tiny_wan
from sla2_core.integrations.diffusers import apply_sla2
from sla2_core.training.stage2.targets import KeptTargets
from sla2_core.training.stage2.train import Stage2Config, train_stage2

CONFIG = Stage2Config(
    steps=3, batch_size=2, learning_rate=1e-3, loss="distill", autocast="bfloat16"
)


def test_two_trainings_ask_the_teacher_once_and_are_those_of_a_plain_teacher(tmp_path):
    data, calls = tiny_wan.pairs(), []

    def train(topk, name, folder):
        handle = apply_sla2(tiny_wan.model(), tiny_wan.config(topk=topk))
        teacher = handle.dense_copy()
        teacher.register_forward_hook(lambda *_: calls.append(name))
        given = teacher if folder is None else KeptTargets(teacher, folder)
        return train_stage2(handle, data, CONFIG, tmp_path / name, teacher=given).loss

    first = train(0.3, "first", tmp_path / "kept")
    assert calls == ["first"] * 3
    second = train(0.5, "second", tmp_path / "kept")
    assert "second" not in calls
    assert first == train(0.3, "plain", None)
    assert second == train(0.5, "plain-2", None)
    assert first != second


def test_other_questions_have_other_answers(tmp_path):
    teacher, given = KeptTargets(tiny_wan.model(), tmp_path), tiny_wan.inputs()
    base = teacher(**given, return_dict=False)[0]
    for name in given:
        value = given[name].clone()
        value.view(-1)[0] += 1
        assert not torch.equal(teacher(**{**given, name: value}, return_dict=False)[0], base), name
    with torch.autocast("cpu", torch.bfloat16):
        low = teacher(**given, return_dict=False)[0]
    assert low.dtype == torch.bfloat16
    assert torch.equal(teacher(**given, return_dict=False)[0], base)


def test_a_damaged_prediction_is_named(tmp_path):
    teacher, given = KeptTargets(tiny_wan.model(), tmp_path), tiny_wan.inputs()
    teacher(**given, return_dict=False)
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(b"x")
    with pytest.raises(ValueError, match=f"{path.name}: expected a readable safetensors file"):
        teacher(**given, return_dict=False)


def test_nothing_is_asked_where_the_loss_has_no_teacher(tmp_path):
    handle = apply_sla2(tiny_wan.model(), tiny_wan.config())
    config = dataclasses.replace(CONFIG, loss="diffusion", steps=1)
    teacher = KeptTargets(handle.dense_copy(), tmp_path / "kept")
    train_stage2(handle, tiny_wan.pairs(), config, tmp_path / "run", teacher=teacher)
    assert not list((tmp_path / "kept").iterdir())


def test_draws_come_again_and_the_teacher_is_asked_for_them_alone(tmp_path):
    """With a learning rate that moves no weight, a step's loss tells its draw."""

    def losses(draws):
        handle = apply_sla2(tiny_wan.model(), tiny_wan.config())
        teacher = KeptTargets(handle.dense_copy(), tmp_path / str(draws))
        config = dataclasses.replace(
            CONFIG, steps=5, draws=draws, learning_rate=1e-30, alpha_learning_rate=0
        )
        run = tmp_path / f"run-{draws}"
        return train_stage2(handle, tiny_wan.pairs(), config, run, teacher=teacher).loss

    again, anew = losses(2), losses(None)
    assert again == [anew[0], anew[1], anew[0], anew[1], anew[0]]
    assert len(set(anew)) == 5
    assert len(list((tmp_path / "2").iterdir())) == 2
    assert "draws" not in Stage2Config().to_dict()
    with pytest.raises(ValueError, match="draws: expected an integer >= 1, got 0"):
        Stage2Config(draws=0)
