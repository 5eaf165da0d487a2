"""Launches and bytes of the operator, counted from the launches' arguments at the paper's shape."""

import pytest

from benchmarks.gpu_model import SHAPE, forward_launches, problem_of


@pytest.mark.parametrize(
    ("precision", "launches", "megabytes"),
    [("full", 14, 2261), ("int8", 16, 2368), ("int8_int8", 16, 2368), ("fp8", 16, 2368)],
)
def test_a_routed_forward_makes_so_many_launches_and_moves_so_many_bytes(
    precision, launches, megabytes
):
    p = problem_of(precision, SHAPE["n"], SHAPE["heads"])
    found = forward_launches("sm_90a", p, 1 - SHAPE["sparsity"])
    assert len(found) == launches
    assert round(sum(launch.bytes for launch in found) / 1e6) == megabytes
