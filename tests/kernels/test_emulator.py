"""The emulator itself: planted faults are caught, collectives and conversions do what the PTX
manual says.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from sla2_kernels.emulator.emulate import EmulatorError, lanes, poisoned
from sla2_kernels.launch import Pointer, launch, load
from sla2_kernels.specs import KernelSpec

HERE = Path(__file__).parent
ORDERS = ("forward", "reverse", "random")


def run(source, entry, *args, threads=64, grid=1, shared=0):
    spec = KernelSpec(
        source=str(HERE / source), entry=entry, arch="sm_89", threads=threads, shared_bytes=shared
    )
    args = [
        (
            Pointer.of(a)
            if isinstance(a, np.ndarray)
            else a
            if isinstance(a, np.generic)
            else np.int32(a)
        )
        for a in args
    ]
    launch(load(spec, "emulator"), (grid,), (threads,), shared, args)


def planted(entry, *args, shared=2048):
    run("planted.cu", entry, *args, shared=shared)


def place(comment):
    """The file and line of planted.cu that ends with this comment, as messages name them."""
    lines = (HERE / "planted.cu").read_text().splitlines()
    (number,) = (n for n, line in enumerate(lines, 1) if line.endswith(f"  // {comment}"))
    return f"planted.cu:{number}"


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("entry", ["neighbour", "warp_neighbour", "copied_neighbour"])
def test_a_missing_barrier_shows_in_every_order(entry, order):
    values = np.arange(64, dtype=np.float32)
    expected = values.reshape(-1, 2)[:, ::-1].ravel() if entry == "warp_neighbour" else values[::-1]
    right, wrong = poisoned((64,), np.float32), poisoned((64,), np.float32)
    with lanes(order):
        planted(entry, values, right, 1)
        planted(entry, values, wrong, 0)
    np.testing.assert_array_equal(right, expected)
    assert np.isnan(wrong).any()


@pytest.mark.parametrize("order", ORDERS)
def test_a_copy_lands_only_at_its_wait(order):
    values = np.arange(256, dtype=np.float32)
    waited, early = poisoned((256,), np.float32), poisoned((256,), np.float32)
    with lanes(order):
        planted("copy", values, waited, 1, 16)
        planted("copy", values, early, 0, 16)
    np.testing.assert_array_equal(waited, values)
    assert np.isnan(early).all()


def test_a_copy_of_fewer_bytes_is_filled_with_zeros():
    values, out = np.ones(256, np.float32), poisoned((256,), np.float32)
    planted("copy", values, out, 1, 8)
    np.testing.assert_array_equal(out.reshape(-1, 4), np.tile([1, 1, 0, 0], (64, 1)))


def test_waiting_for_all_but_one_group_leaves_the_newest_in_flight():
    values, out = np.arange(512, dtype=np.float32), poisoned((192,), np.float32)
    planted("stages", values, out)
    np.testing.assert_array_equal(out[:64], values[:256:4])
    assert np.isnan(out[64:128]).all()
    np.testing.assert_array_equal(out[128:], values[256::4])


@pytest.mark.parametrize(
    ("entry", "args", "words"),
    [
        ("never_waits", (np.zeros(4, np.float32),), ["cp.async", "waited", "block (0,0,0)"]),
        (
            "skips_shuffle",
            (5,),
            ["divergent", "planted.cu:", "shfl_xor", "__syncthreads", "block (0,0,0)", " 5"],
        ),
        ("returns_early", (40,), ["divergent", " 40 have returned", "shfl_xor", "block (0,0,0)"]),
        (
            "two_barriers",
            (32,),
            ["divergent", place("one barrier"), place("another barrier"), "block (0,0,0)"],
        ),
        (
            "misaligned",
            (np.zeros(4, np.float32),),
            ["ldmatrix", "multiple of 16", place("a misaligned row")],
        ),
    ],
)
@pytest.mark.parametrize("order", ORDERS)
def test_a_broken_rule_is_told_with_block_threads_and_lines(entry, args, words, order):
    out = poisoned((64,), np.float32)
    arrays, numbers = (
        [a for a in args if isinstance(a, np.ndarray)],
        [a for a in args if isinstance(a, int)],
    )
    with lanes(order), pytest.raises(EmulatorError) as caught:
        planted(entry, *arrays, out, *numbers)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message
    planted(
        "neighbour", np.zeros(64, np.float32), out, 1
    )  # and the next launch is none the worse for it


def test_arguments_are_checked_against_the_kernel():
    out = np.zeros(64, np.float32)
    for args, words in [
        ([out], "expected 2 arguments, got 1"),
        ([out, np.int64(1)], "argument 1: expected an integer of 4 bytes, got int64"),
        ([out, np.float32(1)], "argument 1: expected an integer of 4 bytes, got float32"),
        ([np.uint32(0), 1], "argument 0: expected a Pointer"),
    ]:
        with pytest.raises(TypeError, match=words):
            planted("skips_shuffle", *args)
    with pytest.raises(RuntimeError, match=r"planted\.cu has no entry 'nothing'"):
        planted("nothing")
    with (
        pytest.raises(
            ValueError, match="order: expected one of forward, reverse, random, got 'up'"
        ),
        lanes("up"),
    ):
        pass


def test_blocks_run_on_several_workers_alike():
    outs = []
    for workers in (1, 3):
        out = poisoned((1000,), np.float32)
        with lanes(workers=workers):
            run("planted.cu", "past_the_end", out, 1000, 0, grid=16, shared=256)
        outs.append(out)
    np.testing.assert_array_equal(outs[0], np.full(1000, 3.0, np.float32))
    np.testing.assert_array_equal(outs[0], outs[1])


def bits(tensor):
    return tensor.contiguous().view(torch.uint8).numpy().copy()


@pytest.mark.parametrize(
    ("entry", "dtype", "width"),
    [
        ("test_mma_f16", torch.float16, 16),
        ("test_mma_bf16", torch.bfloat16, 16),
        ("test_mma_s8", torch.int8, 32),
        ("test_mma_e4m3", torch.float8_e4m3fn, 32),
    ],
)
def test_mma_multiplies_its_fragments(entry, dtype, width):
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, width, generator=draw) * 3 for rows in (16, 8))
    a, b = ((x * 20).round().to(dtype) if dtype == torch.int8 else x.to(dtype) for x in (a, b))
    c = (torch.randn(16, 8, generator=draw) * 9).to(
        torch.int32 if dtype == torch.int8 else torch.float32
    )
    found = c.clone().numpy()
    run("collectives.cu", entry, bits(a), bits(b), found, threads=32, shared=1024)
    expected = c.double() + a.double() @ b.double().T
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-5 * width)


def test_ldmatrix_transposes_each_matrix():
    values = np.arange(256, dtype=np.uint16)
    out = poisoned((128,), np.uint32)
    run("collectives.cu", "test_transpose", values, out, threads=32, shared=512)
    np.testing.assert_array_equal(
        out.view(np.uint16).reshape(4, 8, 8), values.reshape(4, 8, 8).transpose(0, 2, 1)
    )


@pytest.mark.parametrize("order", ORDERS)
def test_shuffles_and_votes(order):
    values = np.random.default_rng(0).integers(0, 60, 64).astype(np.int32)
    out = poisoned((8, 64), np.int32)
    with lanes(order):
        run("collectives.cu", "test_shuffles", values, out)
    warps, lane = values.reshape(2, 32), np.arange(32)
    odd = (warps & 1).astype(np.int64)
    expected = [
        warps[:, lane ^ 5],
        warps[:, np.where(lane >= 3, lane - 3, lane)],
        warps[:, np.where(lane < 29, lane + 3, lane)],
        np.stack([warps[w][(32 * w + lane) * 7 % 32] for w in range(2)]),
        np.repeat(warps.sum(1)[:, None], 32, 1),
        np.repeat((odd << lane).sum(1).astype(np.uint32).view(np.int32)[:, None], 32, 1),
        np.repeat(((warps == 40).any(1) + 2 * (warps < 40).all(1))[:, None], 32, 1),
        np.full((2, 32), (values & 1).sum()),
    ]
    for row, wanted in zip(out, expected):
        np.testing.assert_array_equal(row.reshape(2, 32), wanted)


def test_conversions_round_as_torch_does():
    draw = np.random.default_rng(0)
    values = draw.standard_normal(4000).astype(np.float32) * np.float32(2.0) ** draw.integers(
        -30, 20, 4000
    )
    values = values.astype(np.float32)
    values[:12] = [0.0, -0.0, np.inf, -np.inf, 448, 464, 465, 65504, 65519, 65520, 2**-25, 2**-10]
    f16, bf16, fp8 = (
        poisoned((2000,), np.uint32),
        poisoned((2000,), np.uint32),
        poisoned((2000,), np.uint16),
    )
    run("collectives.cu", "test_pack", values, f16, bf16, fp8, 2000, grid=32)
    tensor = torch.from_numpy(values)
    assert torch.equal(torch.from_numpy(f16.view(np.int16)), tensor.half().view(torch.int16))
    assert torch.equal(torch.from_numpy(bf16.view(np.int16)), tensor.bfloat16().view(torch.int16))
    saturated = tensor.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(torch.from_numpy(fp8.view(np.uint8)), saturated.view(torch.uint8))


def test_every_16_bit_value_is_widened_as_torch_does():
    f16, bf16 = poisoned((65536,), np.float32), poisoned((65536,), np.float32)
    run("collectives.cu", "test_unpack", f16, bf16, grid=1024)
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    for found, dtype in ((f16, torch.float16), (bf16, torch.bfloat16)):
        np.testing.assert_array_equal(found, every.view(dtype).float().numpy())


def test_nan_stays_nan():
    values = np.full(4, np.nan, np.float32)
    f16, bf16, fp8 = (
        poisoned((2,), np.uint32) * 0,
        poisoned((2,), np.uint32) * 0,
        poisoned((2,), np.uint16) * 0,
    )
    run("collectives.cu", "test_pack", values, f16, bf16, fp8, 2)
    assert np.isnan(f16.view(np.float16)).all()
    assert torch.from_numpy(bf16.view(np.int16)).view(torch.bfloat16).isnan().all()
    assert torch.from_numpy(fp8.view(np.uint8)).view(torch.float8_e4m3fn).isnan().all()
