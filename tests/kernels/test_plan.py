"""Plans: the launches of a call, made again for other tensors."""

import numpy as np
import pytest
import torch
from helpers.problems import DEVICE, allocate, pointer
from sla2_kernels.forward import routed_forward
from sla2_kernels.plan import make_plan
from sla2_kernels.problem import AlphaRule, Problem, Strided

HEADS = 2


def problem(lengths, d, n):
    return Problem(
        batch=1,
        heads=HEADS,
        n_q=n,
        n_k=n,
        head_dim=d,
        block_q=32,
        block_k=32,
        precision="int8",
        kv_lengths=lengths,
    )


def launches_of(d, n):
    """A routed forward as make_plan() takes it, and what comes of it."""

    def launches(device, given):
        q, k, v, weight, lengths, offset = given
        qkv = (Strided.of(x, HEADS, n, d) for x in (q, k, v))
        rule = AlphaRule(offset, knots=3)
        found = routed_forward(
            device, problem(lengths, d, n), *qkv, weight, weight, 1, 0.3, None, rule
        )
        return found.out.pointer, found.block_map.indices, found.alpha.values

    return launches


def tensors(d, n, seed, shift=0, lengths=None):
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(3, HEADS * n * d + shift, generator=generator).bfloat16()
    qkv = [x[shift:] for x in flat.clone().unbind()]
    weight = torch.randn(1, d, d, generator=generator)
    length = None if lengths is None else torch.tensor([lengths], dtype=torch.int32)
    return [*qkv, weight, length, torch.randn(1, 3, generator=generator)]


def misaligned(given):
    return [None if x is None else x.data_ptr() % 16 for x in given]


# Channels that are padded, an address that is not the allocator's, keys that do not count.
@pytest.mark.parametrize(
    ("d", "shift", "lengths"), [(64, 0, None), (40, 0, 70), (64, 1, 90)], ids=str
)
def test_a_plan_gives_what_its_call_gives_for_any_tensors(d, shift, lengths):
    n = 111
    first = tensors(d, n, 0, shift, lengths)
    plan = make_plan(DEVICE, misaligned(first), launches_of(d, n))
    for seed in (0, 1):
        given = tensors(d, n, seed, shift, lengths and lengths - seed)
        assert misaligned(given) == misaligned(first)
        pointers = [pointer(x) for x in given]
        wanted = launches_of(d, n)(DEVICE, pointers)
        found = plan.run(DEVICE, [x.address for x in pointers])
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted):
            assert torch.equal(one.owner.flatten(), other.owner.flatten())


def test_what_launches_share_is_one_allocation_and_lies_apart():
    asked = []

    def noting(shape, dtype):
        asked.append((shape, dtype))
        return allocate(shape, dtype)

    d, n = 64, 111
    given = tensors(d, n, 0)
    plan = make_plan(DEVICE, misaligned(given), launches_of(d, n))
    device = type(DEVICE)(allocate=noting, target=DEVICE.target, arch=DEVICE.arch)
    plan.run(device, [pointer(x).address for x in given])
    assert asked == [*plan.outputs, ((plan.shared,), "uint8")]
    last = len(given) + len(plan.outputs)
    starts = {p.offset for step in plan.steps for p in step.places if p.base == last}
    assert len(starts) > 5
    assert all(start % 512 == 0 for start in starts)
    assert max(starts) < plan.shared


def test_nothing_is_launched_while_a_plan_is_made(monkeypatch):
    monkeypatch.setattr("sla2_kernels.plan.launch", lambda *_: pytest.fail("launched"))
    given = tensors(64, 63, 0)
    plan = make_plan(DEVICE, misaligned(given), launches_of(64, 63))
    assert all(isinstance(x, np.generic) for step in plan.steps for x in step.arguments)
