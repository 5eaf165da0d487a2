"""Stage 2 as the quickstart runs it (bf16 autocast, int8, cosine decay), killed by the system and
gone on with.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys

import pytest
import torch
from helpers.processes import environment
from helpers.tiny_wan import weights
from sla2_core.integrations.diffusers import apply_sla2
from sla2_core.training.stage2.train import Stage2Config, train_stage2

SETTINGS = dict(
    steps=8,
    batch_size=4,
    learning_rate=1e-3,
    alpha_learning_rate=1e-2,
    decay="cosine",
    autocast="bfloat16",
    checkpoint_every=3,
    warmup=2,
)

TRAIN = """
import os, signal, sys
import torch
from helpers import tiny_wan
from sla2_core.integrations.diffusers import apply_sla2
from sla2_core.training.stage2.train import Stage2Config, train_stage2

def kill(step, steps, metrics):
    if step == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

data = torch.load(sys.argv[3])
torch.set_num_threads(1)
handle = apply_sla2(tiny_wan.model(), tiny_wan.config(precision="int8"))
pairs = (data["latents"], data["text"])
train_stage2(handle, pairs, Stage2Config(**data["settings"]), sys.argv[1], progress=kill)
"""


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_process_killed_at_a_random_step_gives_the_same_weights(
    wan, sla2_config, data, tmp_path, one_thread
):
    step = random.randrange(1, SETTINGS["steps"])
    whole = apply_sla2(wan(), sla2_config(precision="int8"))
    first = train_stage2(whole, data, Stage2Config(**SETTINGS), tmp_path / "whole")
    torch.save({"latents": data[0], "text": data[1], "settings": SETTINGS}, tmp_path / "data.pt")
    arguments = [str(tmp_path / "parts"), str(step), str(tmp_path / "data.pt")]
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, *arguments],
        timeout=300,
        env=environment(OMP_NUM_THREADS="1"),
    )
    assert done.returncode == -signal.SIGKILL
    parts, steps = apply_sla2(wan(), sla2_config(precision="int8")), []
    second = train_stage2(
        parts,
        data,
        Stage2Config(**SETTINGS),
        tmp_path / "parts",
        progress=lambda now, *_: steps.append(now),
    )
    assert steps[0] == step // 3 * 3 + 1, f"killed at step {step}"
    assert (first.loss, first.grad_norm) == (
        second.loss,
        second.grad_norm,
    ), f"killed at step {step}"
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(parts)[name]), f"{name}, killed at step {step}"


def test_a_checkpoint_is_one_file_and_a_half_written_one_does_not_count(
    wan, sla2_config, data, tmp_path, one_thread
):
    """Weights, optimiser and history of a step cannot come apart; what a killed process left is
    deleted later.
    """

    def kill(step, steps, metrics):
        if step == 6:
            raise KeyboardInterrupt

    whole = apply_sla2(wan(), sla2_config(precision="int8"))
    first = train_stage2(whole, data, Stage2Config(**SETTINGS), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_stage2(
            apply_sla2(wan(), sla2_config(precision="int8")),
            data,
            Stage2Config(**SETTINGS),
            tmp_path / "run",
            progress=kill,
        )
    newest = tmp_path / "run" / "checkpoint-00000006.safetensors"
    half = tmp_path / "run" / ".checkpoint-00000006.safetensors.1.partial"
    half.write_bytes(newest.read_bytes()[:5000])
    newest.unlink()  # killed while it wrote step 6
    again = apply_sla2(wan(), sla2_config(precision="int8"))
    second = train_stage2(again, data, Stage2Config(**SETTINGS), tmp_path / "run")
    assert first.loss == second.loss
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(whole).items())
    assert not half.exists()


def test_the_loss_curve_of_tensorboard_is_whole_after_a_kill(wan, sla2_config, data, tmp_path):
    pytest.importorskip(
        "tensorboard", reason="tensorboard is not installed: pip install sla2-core[train]"
    )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def kill(step, steps, metrics):
        if step == 5:
            raise KeyboardInterrupt

    config = Stage2Config(**SETTINGS, tensorboard=True)
    with pytest.raises(KeyboardInterrupt):
        train_stage2(apply_sla2(wan(), sla2_config()), data, config, tmp_path, progress=kill)
    report = train_stage2(apply_sla2(wan(), sla2_config()), data, config, tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for tag, expected in (("loss", report.loss), ("grad_norm", report.grad_norm)):
        found = events.Scalars(tag)
        assert [event.step for event in found] == list(range(1, 9))
        assert [event.value for event in found] == pytest.approx(expected, rel=1e-6)
