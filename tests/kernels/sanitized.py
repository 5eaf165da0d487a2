"""Runs one family of kernels, or one planted fault, for test_sanitizers.py: `python sanitized.py
CASE`.

In a process of its own and without torch, whose start and memory the sanitizers slow down. Shapes
are the smallest that have several warps, a short last block on both axes and padding keys.
"""

import sys
from pathlib import Path

import numpy as np
from sla2_kernels import backward as operator_backward
from sla2_kernels import hopper
from sla2_kernels.backward import backward, transpose_map
from sla2_kernels.emulator.emulate import EmulatorError, poisoned
from sla2_kernels.forward import (
    Forward,
    Linear,
    Pooled,
    linear_sums,
    masked_sum,
    pooled_forward,
    route,
    sparse_forward,
)
from sla2_kernels.launch import Pointer, launch, load
from sla2_kernels.prepare import Prepared, keys, pool
from sla2_kernels.problem import NULL, Alpha, AlphaRule, Device, Map, Problem, Strided
from sla2_kernels.specs import KernelSpec

TYPES = {
    "float32": np.float32,
    "int32": np.int32,
    "uint32": np.uint32,
    "uint8": np.uint8,
    "bfloat16": np.uint16,
}
DRAW = np.random.default_rng(0)
N, LENGTH, WIDTH, BLOCK_Q, BLOCK_K = 70, 66, 64, 64, 32
T_M, T_N = 2, 3


def allocate(shape, dtype):
    return Pointer.of(poisoned(shape, TYPES[dtype]))


def floats(*shape):
    """fp32 in [0.5, 1)."""
    return Pointer.of(DRAW.uniform(0.5, 1.0, shape).astype(np.float32))


def halves(*shape):
    """bfloat16 in [0.5, 1)."""
    return Pointer.of((floats(*shape).owner.view(np.uint32) >> 16).astype(np.uint16))


def rows():
    """Q, V or O of one head."""
    return Strided.of(halves(1, N, WIDTH), 1, N, WIDTH)


def octets(*shape):
    """Small int8 values, which are finite as FP8 too."""
    return Pointer.of(DRAW.integers(0, 100, shape).astype(np.uint8))


def ints(*values):
    """int32, of one head."""
    return Pointer.of(np.array([values], np.int32))


def problem(precision="full", head_dim=WIDTH):
    lengths = Pointer.of(np.array([LENGTH], np.int32))
    return Problem(
        batch=1,
        heads=1,
        n_q=N,
        n_k=N,
        head_dim=head_dim,
        block_q=BLOCK_Q,
        block_k=BLOCK_K,
        precision=precision,
        kv_lengths=lengths,
    )


def block_map(second=(1, -1)):
    """Row block 0 selects key blocks 0 and 2, row block 1 selects 1, or `second`."""
    indices = np.array([[[[0, 2], second]]], np.int32)
    counts = (indices >= 0).sum(-1, dtype=np.int32)
    return Map(Pointer.of(indices), Pointer.of(counts), 2)


def written(*pointers):
    """Fail unless every value is finite: what a kernel leaves out is still NaN."""
    for pointer in pointers:
        array = pointer.owner
        finite = np.isfinite(array) if array.dtype == np.float32 else (array & 0x7F80) != 0x7F80
        assert finite.all(), f"{(~finite).sum()} of {array.size} values are not finite"


DEVICE = Device(allocate=allocate, target="emulator", arch="sm_90a")
ALPHA = Alpha(floats(1, 1, T_M), (0, 0, 1))


def run_prepared():
    inputs = (Strided.of(halves(1, 1, N, 48), 1, N, 48) for _ in range(3))
    of = problem("int8", 48)
    made = keys(DEVICE, of, pool(DEVICE, of, *inputs, pooled=True), save=True)
    written(made.k, made.pooled_q, made.pooled_k, made.q_scale, made.k_scale, made.v_scale)
    written(made.states)
    made = keys(DEVICE, of, made)
    weights = made.state_weights.owner
    assert weights.shape == (1, 64)
    assert (np.sort(weights[0, :32])[::-1][:T_N] > 0).all()
    assert np.count_nonzero(weights) == T_N


def run_route():
    weight = floats(1, WIDTH, WIDTH)
    found, _, scores = route(
        DEVICE, problem(), floats(1, T_M, WIDTH), floats(1, T_N, WIDTH), weight, weight, 1, 0.5
    )
    written(scores)
    assert found.counts.owner.tolist() == [[[2, 2]]]
    means = floats(1, T_M, WIDTH), floats(1, T_N, WIDTH)
    rule = AlphaRule(floats(1), floats(1))
    found, alpha, scores = route(DEVICE, problem(), *means, NULL, NULL, 1, 0.5, 1, alpha=rule)
    written(scores, alpha.values, found.rest_inverse)
    assert found.indices.owner.tolist() == [[[[0, 1, 2], [0, 1, 2]]]]
    bits = Pointer.of(np.array([[[3], [1 << 16]]], np.uint32))
    columns = transpose_map(DEVICE, problem(), bits, 2)
    assert columns.offsets.owner.tolist() == [[0, 1, 2, 3]]
    assert columns.rows.owner[0, :3].tolist() == [0, 1, 0]


def run_states():
    states = halves(1, T_N, WIDTH * (WIDTH + 1))
    made = Prepared(q=None, k=None, v=None, states=states)
    found = linear_sums(DEVICE, problem(), made, block_map())
    written(found.state, found.norm, found.rest_inverse)
    found = linear_sums(DEVICE, problem("int8"), states_in_8_bit(T_N), block_map())
    written(found.state, found.norm)


def states_in_8_bit(blocks):
    return Prepared(
        q=None,
        k=None,
        v=None,
        v_scale=floats(1, WIDTH),
        states=octets(1, blocks, WIDTH * (WIDTH + 2)),
        state_weights=octets(1, 64),
    )


def states(second=1 << 16):
    """Of block_map(); `second`: the bits of row block 1."""
    rest = Pointer.of(np.array([[1.0, 0.5]], np.float32))
    bits = Pointer.of(np.array([[[3], [second]]], np.uint32))
    state, norm = halves(1, T_M, WIDTH, WIDTH), floats(1, T_M, WIDTH)
    return Linear(bits=bits, rest_inverse=rest, state=state, norm=norm)


def run_forward():
    made = Prepared(q=rows(), k=rows(), v=rows(), mean=floats(1, WIDTH))
    written(*sparse_forward(DEVICE, problem(), made, block_map(), states(), ALPHA, True))


def run_pooled():
    bits = Pointer.of(np.array([[[3], [1 << 16]]], np.uint32))
    pooled = Pooled(halves(1, T_N, WIDTH), halves(1, T_N, WIDTH), bits, ALPHA)
    made = Prepared(q=rows(), k=rows(), v=rows(), mean=floats(1, WIDTH))
    written(*pooled_forward(DEVICE, problem(), made, block_map(), pooled))
    low = Prepared(
        q=rows(),
        k=NULL,
        v=NULL,
        k_bytes=octets(1, N, WIDTH),
        v_bytes=octets(1, T_N, WIDTH, BLOCK_K),
        q_scale=floats(1, T_M),
        k_scale=floats(1, T_N),
        v_scale=floats(1, WIDTH),
    )
    written(*pooled_forward(DEVICE, problem("int8"), low, block_map(), pooled))
    inputs = [Strided.of(halves(1, 1, N, 48), 1, N, 48) for _ in range(3)]
    made = pool(DEVICE, problem(head_dim=48), *inputs, means=True)
    written(made.key_means, made.value_means)
    whole = Problem(batch=1, heads=1, n_q=N, n_k=N, head_dim=48, kv_lengths=problem().kv_lengths)
    made = pool(DEVICE, whole, *inputs, means=True, tiles=True)
    written(made.value_mean_tiles, made.k_tiles, made.v_tiles)


def run_low_bit():
    made = Prepared(
        q=rows(),
        k=NULL,
        v=NULL,
        k_bytes=octets(1, N, WIDTH),
        v_bytes=octets(1, T_N, WIDTH, BLOCK_K),
        q_scale=floats(1, T_M),
        k_scale=floats(1, T_N),
        v_scale=floats(1, WIDTH),
    )
    written(*sparse_forward(DEVICE, problem("int8"), made, block_map(), states(), ALPHA, True))


def run_sliced():
    """A column that both row blocks select, cut into two slices."""
    operator_backward.LEAST_ROWS = 1
    run_backward(second=(0, 1), linear=states(1 | 1 << 16))


def run_backward(precision="full", pooled=None, second=(1, -1), linear=None, **low_bit):
    q, k, v, out, out_sparse, grad = (rows() for _ in range(6))
    saved = Forward(
        out=out,
        lse=Pointer.of(np.full((1, 1, N), 40.0, np.float32)),
        block_map=block_map(second),
        alpha=ALPHA,
        linear=None if pooled else linear or states(),
        made=Prepared(q=q, k=k, v=v, **low_bit),
        out_sparse=out_sparse,
        smooth_k=True,
        pooled=pooled,
    )
    found = backward(
        DEVICE, problem(precision), saved, grad, qat_backward="matched" if low_bit else "paper"
    )
    written(found.d_q, found.d_k, found.d_v, found.d_alpha)


def run_matched():
    small = Pointer.of(np.full((1, T_M), 1e-4, np.float32))
    run_backward(
        "int8",
        k_bytes=octets(1, N, WIDTH),
        q_scale=small,
        k_scale=floats(1, T_N),
        v_scale=floats(1, WIDTH),
    )


def run_pooled_backward():
    bits = Pointer.of(np.array([[[1 | 1 << 1], [1 << 16]]], np.uint32))
    run_backward(pooled=Pooled(halves(1, T_N, WIDTH), halves(1, T_N, WIDTH), bits, ALPHA))


def run_hopper():
    n, t_m, t_n = 140, 2, 3
    problem = Problem(batch=1, heads=1, n_q=n, n_k=n, head_dim=WIDTH)
    q, k, v, out = (Strided.of(halves(1, n, WIDTH), 1, n, WIDTH) for _ in range(4))
    out_sparse, lse = allocate((1, n, WIDTH), "bfloat16"), allocate((1, n), "float32")
    state, norm = halves(1, t_m, WIDTH, WIDTH), floats(1, t_m, WIDTH)
    bits, inverse = Pointer.of(np.array([[[3], [1 << 16]]], np.uint32)), floats(1, t_m)
    sums = masked_sum(DEVICE, problem, bits, halves(1, t_n, WIDTH * (WIDTH + 1)), inverse, t_m, t_n)
    written(*sums)
    tiles = hopper.pack(DEVICE, problem, k, v)
    assert tiles[0].owner.shape == (1, t_n, 64, WIDTH)
    hopper.sparse_forward(
        DEVICE, problem, q, *tiles, block_map(), state, norm, ALPHA, out, out_sparse, lse, blocks=1
    )
    written(*tiles, out, out_sparse, lse)
    means, lse = [halves(1, 1, 64, WIDTH) for _ in range(2)], allocate((1, n), "float32")
    given = *tiles, floats(1, WIDTH), block_map(), *means, bits, ALPHA, out, lse
    hopper.pooled_forward(DEVICE, problem, q, *given, blocks=1)
    written(out, lse)
    found = floats(1, n, WIDTH), allocate((1, n, WIDTH), "bfloat16")
    d_q = allocate((1, n, WIDTH), "bfloat16")
    rows = (x.pointer for x in (q, k, v, out))
    lse = Pointer.of(np.full((1, n), 40.0, np.float32))
    by_token = hopper.Rest(floats(1, n, WIDTH), found[0], floats(1, n, WIDTH))
    by_block = hopper.Rest(NULL, floats(1, t_n, WIDTH), floats(1, t_n, WIDTH), by_block=True)
    given = *rows, lse, floats(1, n), block_map()
    # Columns of one row each; then of which the first has both, in a slice each.
    uncut = ints(0, 1, 2, 3), ints(0, 1, 0), np.int64(3), NULL, NULL, np.int32(0)
    cut = ints(0, 2, 3, 3), ints(0, 1, 0), np.int64(3), ints(0, 2, 2, 2), ints(0, 0), np.int32(2)
    for columns in (uncut, cut):
        slices = int(columns[-1])
        key_sum = allocate((1, t_n + slices, WIDTH), "float32")
        sliced = allocate((1, slices, 2, 64, WIDTH), "float32")
        for rest in (by_token, by_block):
            args = *given, columns, inverse, ALPHA, rest, d_q, *found, key_sum, sliced
            hopper.sparse_backward(DEVICE, problem, *args, blocks=1)
            written(d_q, key_sum)
            for x in found:
                written(Pointer.of(x.owner[:, 64 if slices else 0 :]))
        if slices:
            written(sliced)


def run_hopper_low():
    n, t_m, t_n = 140, 2, 3
    problem = Problem(batch=1, heads=1, n_q=n, n_k=n, head_dim=WIDTH, precision="int8")
    q, out = (Strided.of(halves(1, n, WIDTH), 1, n, WIDTH) for _ in range(2))
    out_sparse, lse = allocate((1, n, WIDTH), "bfloat16"), allocate((1, n), "float32")
    state, norm = halves(1, t_m, WIDTH, WIDTH), floats(1, t_m, WIDTH)
    tiles = hopper.pack_low(DEVICE, problem, octets(1, n, WIDTH), octets(1, t_n, WIDTH, 64))
    scales = floats(1, t_m), floats(1, t_n), floats(1, WIDTH)
    low = hopper.LowBit(*scales)
    sums = linear_sums(DEVICE, problem, states_in_8_bit(t_n), block_map())
    written(sums.state, sums.norm)
    rest = state, norm, ALPHA, out, out_sparse, lse
    hopper.sparse_forward(DEVICE, problem, q, *tiles, block_map(), *rest, low=low, blocks=1)
    written(out, out_sparse, lse)
    bits = Pointer.of(np.array([[[3], [1 << 16]]], np.uint32))
    means, lse = [halves(1, 1, 64, WIDTH) for _ in range(2)], allocate((1, n), "float32")
    given = *tiles, NULL, block_map(), *means, bits, ALPHA, out, lse
    hopper.pooled_forward(DEVICE, problem, q, *given, low=low, blocks=1)
    written(out, lse)


KERNELS = {
    "prepared": run_prepared,
    "route": run_route,
    "states": run_states,
    "forward": run_forward,
    "low_bit": run_low_bit,
    "pooled": run_pooled,
    "backward": run_backward,
    "sliced": run_sliced,
    "matched": run_matched,
    "pooled_backward": run_pooled_backward,
    "hopper": run_hopper,
    "hopper_low": run_hopper_low,
}


def planted(entry, *args, shared=2048, grid=1):
    source = str(Path(__file__).with_name("planted.cu"))
    spec = KernelSpec(source=source, entry=entry, arch="sm_89", threads=64, shared_bytes=shared)
    args = [Pointer.of(a) if isinstance(a, np.ndarray) else np.int32(a) for a in args]
    launch(load(spec, "emulator"), (grid,), (64,), shared, args)


def main(case):
    values, out = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
    if case in KERNELS:
        KERNELS[case]()
    elif case == "right":
        for entry in ("neighbour", "warp_neighbour", "copied_neighbour"):
            planted(entry, values, out, 1)
        planted("past_the_end", out, 64, 0, shared=256)
        planted("stages", np.zeros(512, np.float32), np.zeros(192, np.float32))
    elif case.startswith("past"):
        planted("past_the_end", out, 64, int(case[-1]), shared=256, grid=2)
    elif case == "skips_shuffle":
        try:
            planted("skips_shuffle", out, 5)
        except EmulatorError as error:
            print(error)
    else:
        planted(case, values, out, 0)
    print("finished")


if __name__ == "__main__":
    main(sys.argv[1])
