"""The model of GPU times against hand-computed cases, and what it says at the paper's shape."""

import json
from dataclasses import replace

import pytest
from sla2_kernels.record import Recorder

from benchmarks import gpu_model, sass_figures
from benchmarks.gpu_model import GPUS, SHAPE, Work, issue_slots, seconds, work_of

H100 = GPUS["H100"]


def test_the_sparse_forward_by_hand():
    p = gpu_model.problem_of("full", 32760, 12)
    work = work_of("sla2_sparse_fwd", p, 15, 12 * 256)
    # A tile's two products: 4 x 128 x 64 x 128 FLOPs; 12 x 256 rows select 15 blocks each.
    assert work.looped == 4 * 128 * 64 * 128 * 12 * 256 * 15
    assert work.half - work.looped == 2 * 12 * 32760 * 128 * 128
    # 1,170 instructions a trip in each of 4 warps: chapter 7's slots a tile and scheduler.
    figures = {"instructions": 2170, "loop": 1170, "rare": 0}
    slots = issue_slots(figures, replace(work, trips=15), 4 * 12 * 256)
    assert slots == 4 * 12 * 256 * (1000 + 15 * 1170)
    parts = seconds(H100, 604e6, slots, work)
    assert parts["memory"] == pytest.approx(604e6 / 3.0e12)
    assert parts["issue"] == pytest.approx(12 * 256 * 18550 / (132 * 1.7e9))
    # 349 tiles an SM of 1,651 clocks each, 0.34 ms; and 13 GFLOP of phi(Q) H.
    assert parts["tensor"] == pytest.approx(0.339e-3 + 0.0226e-3, rel=0.01)


def test_the_pooled_forward_by_hand():
    p = gpu_model.problem_of("full", 32760, 12)
    work = work_of("sla2_pooled_fwd", p, 15, 12 * 256)
    tile = 4 * 128 * 64 * 128 * 12 * 256
    # 512 pooled keys are 8 tiles; there is no phi(Q) H.
    assert (work.trips, work.looped, work.half) == (8, 8 * tile, 23 * tile)
    assert (work.selected.trips, work.selected.looped) == (15, 15 * tile)
    figures = {
        "sla2_pooled_fwd full": {"instructions": 4000, "loop": 1000, "rare": 300},
        "sla2_sparse_fwd full": {"instructions": 9999, "loop": 900, "rare": 200},
    }
    slots = gpu_model.slots_of(figures, "sla2_pooled_fwd full", work, 4)
    assert slots == 4 * (4000 - 1300 - 1100 + 8 * 1000 + 15 * 900)
    low = work_of("sla2_pooled_fwd_low", replace(p, precision="int8"), 15, 12 * 256)
    assert (low.half, low.int8, low.fp8) == (8 * tile, 15 * tile / 2, 15 * tile / 2)


def test_the_sparse_forward_by_wgmma_by_hand():
    p = gpu_model.problem_of("int8", 32760, 12)
    work = work_of("sla2_sm90_sparse_fwd_low", p, 15, 132)
    # 12 x 256 query blocks over 132 blocks of threads; 14 steps of the loop besides the two halves.
    assert work.trips == 12 * 256 / 132
    figures = {"instructions": 4400, "loop": 2700, "rare": 250, "tensor": 20, "inner": [400, 6]}
    slots = issue_slots(figures, work, 132 * work.warps)
    assert slots == pytest.approx(8 * (132 * 1450 + 12 * 256 * (2700 + 13 * 400)))
    parts = seconds(H100, 0, slots, work)
    tile = 4 * 128 * 64 * 128 * 12 * 256 * 15
    clocks = tile / 8192 + 2 * 12 * 32760 * 128 * 128 / 4096
    assert parts["tensor"] == pytest.approx(clocks / (132 * 1.7e9))
    longer, shorter = parts["issue"], parts["tensor"]
    found = gpu_model.whole(parts, work)
    assert found == pytest.approx(gpu_model.LAUNCH_SECONDS + longer + 0.7 * shorter)
    by_mma_sync = gpu_model.whole(parts, replace(work, wgmma=False))
    assert by_mma_sync == pytest.approx(gpu_model.LAUNCH_SECONDS + longer + shorter)


def test_the_pooled_forward_by_wgmma_by_hand():
    p = gpu_model.problem_of("full", 32760, 12)
    work = work_of("sla2_sm90_pooled_fwd", p, 15, 132)
    tile = 4 * 128 * 64 * 128 * 12 * 256
    assert work.half == 23 * tile  # 512 pooled keys are 8 tiles
    figures = {
        "sla2_sm90_pooled_fwd full": {
            "instructions": 3800,
            "loop": 1900,
            "rare": 600,
            "tensor": 36,
            "inner": [360, 12],
        },
        "sla2_sm90_sparse_fwd full": {"instructions": 9999, "inner": [286, 12]},
    }
    slots = gpu_model.slots_of(figures, "sla2_sm90_pooled_fwd full", work, 8 * 132)
    # Of both loops one trip is in `loop`; the first selected block is scored before them.
    assert slots == pytest.approx(8 * (132 * 1300 + 12 * 256 * (1900 + 7 * 360 + 13 * 286)))


def test_the_backward_by_wgmma_multiplies_seven_times():
    p = gpu_model.problem_of("full", 32760, 12)
    launches = gpu_model.backward_launches("sm_90a", p, 0.05)
    product = 2 * 128 * 64 * 128 * 12 * 256 * 26
    found = {
        launch.spec.entry: work_of(launch.spec.entry, p, 26, launch.blocks)
        for launch in launches
        if "sparse_bwd" in launch.spec.entry
    }
    q, kv = found["sla2_sm90_sparse_bwd_q"], found["sla2_sm90_sparse_bwd_kv"]
    assert (q.half, kv.half) == (3 * product, 4 * product)
    # A step is 128 queries and 64 keys in both.
    assert q.trips * q.steps == pytest.approx(kv.trips * kv.steps)


def test_the_pooled_backward_multiplies_seven_times():
    p = gpu_model.problem_of("full", 32760, 12)
    found = {
        launch.spec.entry: work_of(launch.spec.entry, p, 26, launch.blocks)
        for launch in gpu_model.backward_launches("sm_90a", p, 0.05, pooled=True)
    }
    assert not any("linear" in entry or "masked" in entry for entry in found)
    q, kv = found["sla2_pooled_bwd_q"], found["sla2_pooled_bwd_kv"]
    product = 2 * 128 * 64 * 128 * 12 * 256 * 8  # 512 pooled keys are 8 tiles
    assert (q.half, kv.half) == (3 * product, 4 * product)
    # A block of threads takes two tiles of 64 rows, and 8 tiles of keys for each; or a tile of
    # keys, and the rows of an eleventh of 256 query blocks.
    assert (q.trips, q.steps) == (2, 8)
    assert kv.trips == pytest.approx(2 * 256 / 11)


def test_an_inner_loop_runs_until_the_flops_are_done():
    # 3 tensor instructions outside the inner loop of 2; a trip needs 11, so it runs 5 times, not 1.
    figures = {"instructions": 50, "loop": 30, "tensor": 5, "inner": [7, 2]}
    work = Work(trips=4, half=1.0, looped=11 * 4 * 6 * gpu_model.MMA_FLOPS)
    assert issue_slots(figures, work, 6) == 6 * (20 + 4 * (30 + 7 * 3))


def test_low_bit_flops_go_to_the_unit_that_multiplies_them():
    p = gpu_model.problem_of("int8", 256, 1)
    tile = 2 * 128 * 64 * 128 * 2 * 3
    assert work_of("sla2_sparse_fwd_low", p, 3, 2).int8 == tile
    assert work_of("sla2_sparse_fwd_low", p, 3, 2).fp8 == tile
    both = work_of("sla2_sparse_fwd_low", replace(p, precision="int8_int8"), 3, 2)
    assert (both.int8, both.fp8) == (2 * tile, 0)
    gpu = GPUS["RTX 5090"]
    clocks = 2 * tile / 2048 + 2 * 256 * 128 * 128 / 512
    parts = seconds(gpu, 0, 0, work_of("sla2_sparse_fwd_low", p, 3, 2))
    assert parts["tensor"] == pytest.approx(clocks / (170 * 2.4e9))


def test_bytes_are_those_of_each_tensor_once():
    recorder = Recorder("sm_90a")
    x = recorder.tensor(2, 3, 10, 64)
    y = recorder.allocate((6, 5), "float32")
    from sla2_kernels.launch import run_kernel

    p = gpu_model.problem_of("full", 10, 3)
    run_kernel(recorder.device, p, "sla2_keys", (4, 6), *x.arguments, y, x.pointer)
    (launch,) = recorder.launches
    assert (launch.blocks, launch.bytes) == (24, 2 * 3 * 10 * 64 * 2 + 6 * 5 * 4)


def test_a_launch_costs_the_longer_of_memory_and_work():
    p = gpu_model.problem_of("full", 32760, 12)
    launches = gpu_model.forward_launches("sm_90a", p, 1 - SHAPE["sparsity"])
    figures = {name: {"instructions": 100} for name in sass_figures.read()["figures"]["sm_90a"]}
    rows = {row["stage"]: row for row in gpu_model.model(H100, launches, p, 15, figures)}
    keys = rows["keys"]
    assert keys["ms"] == pytest.approx(1e3 * gpu_model.LAUNCH_SECONDS + keys["memory"])
    assert rows["sum"]["ms"] == pytest.approx(
        sum(row["ms"] for name, row in rows.items() if name != "sum")
    )
    assert rows["sum"]["launches"] == len(launches)


def test_what_a_gpu_measured_is_found(tmp_path):
    row = {"case": "SLA2 forward int8", "sparsity": 0.97, "median": 1.5}
    found = {"suite": "paper", "hardware": {"gpu": "NVIDIA H100 80GB HBM3"}, "rows": [row]}
    (tmp_path / "h100.json").write_text(json.dumps(found))
    assert gpu_model.measured("H100", "int8", tmp_path) == 1.5
    assert gpu_model.measured("H100", "full", tmp_path) is None
    assert gpu_model.measured("B200", "int8", tmp_path) is None
