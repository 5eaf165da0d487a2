"""Every family's pipeline from its folder to generated latents by way of two gloo processes;
Ulysses against one process.
"""

from __future__ import annotations

import pytest
import torch
from helpers import families
from helpers import worker_families as worker
from helpers.processes import run_two
from safetensors.torch import load_file
from sla2_core.integrations.diffusers import apply_sla2
from sla2_core.integrations.loading import apply_adapter
from sla2_core.training.capture import CaptureConfig, capture
from sla2_core.training.stage1.train import Stage1Config, train_stage1


def prepare(name, folder):
    """Pipeline folder -> load -> apply -> capture from the running pipeline -> stage 1
    -> adapter.
    """
    transformer, _, _ = families.build(name)
    families.pipeline(name, transformer).save_pretrained(folder / "pipeline")
    pipe = families.load_pipeline(name, folder / "pipeline")
    handle = apply_sla2(pipe.transformer, families.config(pipe.transformer))
    captures = capture(
        handle,
        lambda i: families.generate(name, pipe, seed=i),
        folder / "captures",
        samples=2,
        config=CaptureConfig(every=2),
    )
    assert {call["sample"] for call in captures.calls} == {0, 1}
    train_stage1(
        handle, captures, Stage1Config(topk=(0.3,), steps=2, eval_every=2), folder / "stage1"
    )
    handle.save(folder / "stage1_adapter")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder after both processes ended well, with their findings."""
    folder = tmp_path_factory.mktemp("two")
    for name in families.PIPELINES:
        prepare(name, folder / name)
    return folder, run_two("worker_families", folder)


@pytest.mark.parametrize("case", ["plain", "text", "mass per head", "low bit", "sla"])
def test_ulysses_is_one_process_to_rounding_forward_and_backward(run, case):
    for found in run[1]:
        for name, difference in found["exchange"][case].items():
            assert difference < 2e-5, (case, name)


@pytest.mark.parametrize("name", ["wan", "flux"])
@pytest.mark.parametrize("parallel_first", [True, False])
def test_a_model_under_diffusers_context_parallelism(run, name, parallel_first):
    """Applied before or after enable_parallelism; every exchange saw half of the tokens."""
    for found in run[1]:
        result = found["models"][f"{name} {parallel_first}"]
        assert result["forward"] < 1e-5 < result["size"]
        assert result["tokens"] == [{"wan": 18, "flux": 25}[name]] * 6  # q, k, v of two layers


def test_what_cannot_be_exchanged_is_refused(run):
    for found in run[1]:
        assert found["refusals"] == [
            "_parallel_config: expected Ulysses alone for SLA2, got ring_degree=2",
            "_parallel_config: expected equal shards for SLA2, got ulysses_anything=True",
            "_parallel_config: expected ulysses_degree to divide 3 heads, got 2",
        ]


def test_two_processes_interrupted_and_resumed_to_the_bit(run):
    whole, resumed = (
        load_file(run[0] / "wan" / name / "checkpoint-00000002.safetensors")
        for name in ("stage2_2", "interrupted")
    )
    assert set(whole) == set(resumed)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


@pytest.mark.parametrize("name", families.PIPELINES)
def test_stage2_on_two_processes_then_load_and_generate(run, name):
    folder = run[0] / name
    worker.stage2(name, run[0])  # the same two steps in this process
    two = load_file(folder / "stage2_2" / "checkpoint-00000002.safetensors")
    one = load_file(folder / "stage2_1" / "checkpoint-00000002.safetensors")
    torch.testing.assert_close(two["loss"], one["loss"], rtol=1e-4, atol=0)
    torch.testing.assert_close(two["grad_norm"], one["grad_norm"], rtol=1e-3, atol=0)
    assert set(two) == set(one)
    results = {}
    for adapter in (None, "stage1_adapter", "stage2_1/adapter", "stage2_2/adapter"):
        pipe = families.load_pipeline(name, folder / "pipeline")
        if adapter:
            handle = apply_adapter(pipe.transformer, folder / adapter)
            assert handle.config.precision == ("full" if adapter == "stage1_adapter" else "int8")
        results[adapter] = families.generate(name, pipe)
        assert torch.isfinite(results[adapter]).all()
    torch.testing.assert_close(
        results["stage2_1/adapter"], results["stage2_2/adapter"], atol=0.05, rtol=0
    )
    for a, b in ((None, "stage1_adapter"), ("stage1_adapter", "stage2_2/adapter")):
        assert (results[a] - results[b]).abs().max() > 1e-3
