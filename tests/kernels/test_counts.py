"""Launches, bytes and memory of the operator, counted from the launches' arguments."""

import pytest
from sla2_kernels import forward as operator
from sla2_kernels import hopper, prepare
from sla2_kernels.launch import Pointer

from benchmarks.gpu_model import (
    BACKWARD_SPARSITY,
    SHAPE,
    backward_launches,
    forward_launches,
    moved,
    problem_of,
)
from benchmarks.host import module, stubbed


# By mma.sync, and on Hopper, where K and V are written in tiles besides; in low bit instead. States
# are in 8 bit there.
@pytest.mark.parametrize(
    ("arch", "launches", "full", "low"),
    [("sm_89", 8, 1452, 1358), ("sm_90a", 8, 1654, 1358)],
)
@pytest.mark.parametrize("precision", ["full", "int8", "int8_int8", "fp8"])
def test_a_routed_forward_makes_so_many_launches_and_moves_so_many_bytes(
    arch, launches, full, low, precision
):
    p = problem_of(precision, SHAPE["n"], SHAPE["heads"])
    found = forward_launches(arch, p, 1 - SHAPE["sparsity"])
    megabytes = round(sum(launch.bytes for launch in found) / 1e6)
    assert (len(found), megabytes) == (launches, full if precision == "full" else low)


# In low bit K and V are also written in 8 bit, on Hopper in 16 bit as tiles.
@pytest.mark.parametrize(
    ("arch", "precision", "launches", "expected"),
    [
        ("sm_80", "full", 6, 748),
        ("sm_80", "int8_int8", 7, 956),
        ("sm_90a", "full", 6, 952),
        ("sm_90a", "int8_int8", 7, 959),
    ],
)
def test_with_the_pooled_complement(arch, precision, launches, expected):
    p = problem_of(precision, SHAPE["n"], SHAPE["heads"])
    found = forward_launches(arch, p, 1 - SHAPE["sparsity"], pooled=True)
    megabytes = round(sum(launch.bytes for launch in found) / 1e6)
    assert (len(found), megabytes) == (launches, expected)


# On Hopper Q, K, V and dO are written in tiles, too.
@pytest.mark.parametrize(
    ("arch", "complement", "launches", "expected"),
    [
        ("sm_89", "linear", 11, 3855),
        ("sm_89", "pooled", 11, 2698),
        ("sm_90a", "linear", 13, 4661),
        ("sm_90a", "pooled", 13, 3503),
    ],
)
def test_a_backward(arch, complement, launches, expected):
    p = problem_of("full", SHAPE["n"], SHAPE["heads"])
    topk = 1 - BACKWARD_SPARSITY
    found = backward_launches(arch, p, topk, complement == "pooled")
    sizes = [moved(launch, p, round(topk * p.t_n)) for launch in found]
    assert (len(found), round(sum(sizes) / 1e6)) == (launches, expected)
    # What lies ready for columns that many rows select.
    ready = {launch.spec.entry: launch.bytes - size for launch, size in zip(found, sizes)}
    assert sorted({round(size / 1e6) for size in ready.values()}) == [0, 135, 236]


@pytest.mark.parametrize("complement", ["linear", "pooled"])
def test_the_module_makes_the_launches_that_are_counted(complement, monkeypatch):
    p = problem_of("full", 256, 2)
    counted = forward_launches("sm_90a", p, 0.5, complement == "pooled")
    ran = []
    real = operator.run_kernel
    for caller in (operator, prepare, hopper):
        monkeypatch.setattr(caller, "run_kernel", lambda *args: ran.append(args[2]) or real(*args))
    with stubbed():
        module(complement=complement)()
    assert ran == [launch.spec.entry for launch in counted]


@pytest.mark.parametrize(("arch", "gigabytes"), [("sm_89", 80), ("sm_90a", 96)])
def test_a_million_tokens_at_40_heads_fit(arch, gigabytes):
    found = forward_launches(arch, problem_of("full", 1_000_000, 40), 1 - SHAPE["sparsity"])
    pointers = [x for launch in found for x in launch.arguments if isinstance(x, Pointer)]
    held = {x.address: x.owner.nbytes for x in pointers if x.address}
    assert 0.85 * gigabytes < sum(held.values()) / 1e9 < gigabytes  # an H200 has 141
    scores = {launch.arguments[3].owner.nbytes for launch in found if "scores" in launch.spec.entry}
    assert max(scores) <= operator.SCORE_BYTES
