"""sla2 compile: its table, its JSON, and what it refuses."""

import json

import pytest
from sla2_eval.cli.main import main
from sla2_kernels import kernels
from sla2_kernels.specs import KernelSpec

KERNEL = (
    'extern "C" __global__ void __launch_bounds__(64) copy(const float* a, float* b) {'
    " b[threadIdx.x] = a[threadIdx.x]; }"
)


@pytest.fixture
def one_kernel(tmp_path, monkeypatch):
    (tmp_path / "copy.cu").write_text(KERNEL)
    monkeypatch.setenv("SLA2_CACHE", str(tmp_path / "cache"))

    def use(**change):
        settings = {"source": str(tmp_path / "copy.cu"), "entry": "copy", "threads": 64} | change
        monkeypatch.setattr(kernels, "all_specs", lambda arch: [KernelSpec(arch=arch, **settings)])

    use()
    return use


def test_a_table_of_every_kernel(one_kernel, capsys):
    assert main(["compile", "--arch", "sm_80", "--arch", "sm_120a"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["kernel", "arch", "threads", "registers"]
    assert [line.split()[1] for line in lines[1:]] == ["sm_80", "sm_120a"]


def test_json_holds_occupancy_and_the_cubin(one_kernel, capsys):
    assert main(["compile", "--arch", "sm_90a", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["occupancy"] == 1.0
    assert row["blocks_per_sm"] == 32
    assert row["spills"] == 0
    assert row["cubin"].endswith(".cubin")
    assert row["problems"] == []


def test_a_kernel_over_its_ceiling_ends_with_1(one_kernel, monkeypatch, capsys):
    monkeypatch.setattr(KernelSpec, "max_registers", 1)
    assert main(["compile", "--arch", "sm_90a"]) == 1
    assert "registers, expected at most 1" in capsys.readouterr().err


def test_an_unknown_architecture_ends_with_2(capsys):
    assert main(["compile", "--arch", "sm_75"]) == 2
    assert "--arch: expected one of sm_80, " in capsys.readouterr().err
