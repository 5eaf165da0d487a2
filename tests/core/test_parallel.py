"""SLA2Attention in training on two processes: plain data parallelism, and FSDP2 in bf16."""

import pytest
import torch
from helpers import processes


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    return processes.run_two("worker_parallel", folder)[0]


@pytest.mark.parametrize("alpha", ["position", "mass"])
def test_ddp_takes_several_steps_with_the_default_settings(found, alpha):
    assert len(found[f"ddp {alpha}"]) == 3
    assert all(0 < loss < 10 for loss in found[f"ddp {alpha}"])


def test_fsdp2_hands_over_bf16_parameters_and_they_are_computed_with_in_fp32(found):
    assert found["fsdp2 dtypes"] == ["scores torch.float32", "torch.bfloat16"]
    # Weights in bf16 round; the steps are those of data parallelism all the same.
    torch.testing.assert_close(found["fsdp2"], found["ddp mass"], rtol=0.05, atol=1e-3)


def test_sharded_apart_router_and_alpha_stay_in_fp32_beside_a_bf16_model(found):
    assert found["fsdp2 apart dtypes"] == ["scores torch.float32", "torch.float32"]
    torch.testing.assert_close(found["fsdp2 apart"], found["ddp mass"], rtol=0.05, atol=1e-3)
