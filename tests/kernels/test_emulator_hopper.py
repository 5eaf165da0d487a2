"""What the emulator knows of Hopper: wgmma's layouts against numpy, and planted faults of a
pipeline of bulk copies and products, each told with block and line.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from sla2_kernels.compile import compile_kernel
from sla2_kernels.emulator.emulate import EmulatorError, lanes, poisoned
from sla2_kernels.launch import Pointer, launch, load
from sla2_kernels.sass import code_of
from sla2_kernels.specs import KernelSpec

HERE = Path(__file__).parent
ORDERS = ("forward", "reverse", "random")
FAULTS = (HERE / "hopper_planted.cu").read_text().split("enum Fault {")[1].split("}")[0]
FAULTS = [name.strip() for name in FAULTS.split(",") if name.strip()]


def spec_of(source, entry, *, threads, shared=0):
    return KernelSpec(
        source=str(HERE / source), entry=entry, arch="sm_90a", threads=threads, shared_bytes=shared
    )


def run(source, entry, *args, threads, shared, grid=1):
    spec = spec_of(source, entry, threads=threads, shared=shared)
    made = [Pointer.of(a) if isinstance(a, np.ndarray) else np.int32(a) for a in args]
    launch(load(spec, "emulator"), (grid,), (threads,), shared, made)


def place(comment):
    """The file and line of hopper_planted.cu that ends with this comment."""
    lines = (HERE / "hopper_planted.cu").read_text().splitlines()
    (number,) = (n for n, line in enumerate(lines, 1) if line.endswith(f"  // {comment}"))
    return f"hopper_planted.cu:{number}"


def lay_out(values, major, swizzle):
    """An operand (lines, depth) as bytes in shared memory, by the canonical layouts of the PTX
    manual, and (leading, stride, step) of its descriptors; `step` leads to the second half of the
    depth.
    """
    lines, depth = values.shape
    t = 16 // values.itemsize  # elements of a chunk
    width = max(1, swizzle // 16)  # chunks of a row of the pattern
    line, k = np.meshgrid(np.arange(lines), np.arange(depth), indexing="ij")
    if major == "k":
        chunk, row, within = k // t, line, k % t
        panel = lines * 16 * width  # rows of all lines, `width` chunks of the depth
        at = row * 16 * width + chunk // width * panel + chunk % width * 16
        leading, stride, step = panel, 128 * width, 32 if width > 2 else panel * 2 // width
    else:
        chunk, row, within = line // t, k, line % t
        panel = depth * 16 * width
        at = row * 16 * width + chunk // width * panel + chunk % width * 16
        leading, stride, step = panel, 128 * width, 256 * width
        if width == 1:
            leading, stride = 128, panel
    if width > 1:  # chunk c of a 128-byte line r lies at c xor r, in as many bits as there are
        at ^= (at // 128 % width) << 4
    image = np.zeros((int(chunk.max()) // width + 1) * panel, np.uint8)
    at = at + within * values.itemsize
    for byte in range(values.itemsize):
        image[at + byte] = values.view(np.uint8).reshape(lines, depth, -1)[..., byte]
    return image, (leading, stride, step)


def fragments(a):
    """A (64, depth) in registers: (products, lanes, 4) words, as for mma.sync in each warp."""
    lane = np.arange(128)
    row = lane // 32 * 16 + lane % 32 // 4
    per = 4 // a.itemsize
    words = a.view(np.uint32).reshape(64, 2, -1)  # row, product, words of its depth
    column = lane % 4 + np.array([0, 0, 4, 4])[:, None]
    rows = row + np.array([0, 8, 0, 8])[:, None]
    assert words.shape[2] * per == a.shape[1] // 2
    return np.ascontiguousarray(words[rows, :, column].transpose(2, 1, 0))


def draw(dtype, *shape):
    generator = torch.Generator().manual_seed(sum(shape))
    values = torch.randn(shape, generator=generator) * 3
    values = (values * 20).round().clamp(-127, 127) if dtype == torch.int8 else values
    values = values.to(dtype)
    size = values.element_size()
    raw = values.view(torch.int16 if size == 2 else torch.int8).numpy()
    return values.double().numpy(), raw


DTYPES = {
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "s8": torch.int8,
    "e4m3": torch.float8_e4m3fn,
}


@pytest.mark.parametrize(
    ("entry", "n"),
    [
        ("bf16_registers_k", 64),
        ("bf16_registers_mn", 128),
        ("bf16_shared_k_k", 128),
        ("f16_registers_mn", 64),
        ("f16_shared_mn_k", 64),
        ("f16_shared_k_mn", 128),
        ("s8_registers_k", 64),
        ("s8_shared_k_k", 128),
        ("e4m3_registers_k", 128),
        ("e4m3_shared_k_k", 64),
    ],
)
@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
def test_wgmma_multiplies_what_its_descriptors_name(entry, n, swizzle):
    kind, source, *majors = entry.split("_")
    depth = 32 if kind in ("bf16", "f16") else 64
    (a, raw_a), (b, raw_b) = (draw(DTYPES[kind], rows, depth) for rows in (64, n))
    image_b, (b_leading, b_stride, b_step) = lay_out(raw_b, majors[-1], swizzle)
    image, a_args, b_at = image_b, (0, 0, 0, 0), 0
    if source == "shared":
        image_a, (leading, stride, step) = lay_out(raw_a, majors[0], swizzle)
        a_args, b_at = (0, leading, stride, step), 8192
        image = np.concatenate([image_a, np.zeros(8192 - image_a.size, np.uint8), image_b])
    out = poisoned((64, n), np.int32 if kind == "s8" else np.float32)
    sides = *a_args, b_at, b_leading, b_stride, b_step
    run(
        "hopper_products.cu",
        entry,
        image,
        image.size // 16,
        fragments(raw_a),
        out,
        *sides,
        swizzle,
        threads=128,
        shared=32768,
    )
    np.testing.assert_allclose(out, a @ b.T, rtol=1e-5, atol=1e-4)


STEPS = 6
TILES, RAW = draw(torch.bfloat16, STEPS, 64, 64)
IMAGE = np.concatenate([lay_out(tile, "k", 128)[0] for tile in RAW])
EXPECTED = np.tile(TILES[:, :, :16].sum((0, 2)), (64, 1))


def pipeline(fault="NONE", grid=1):
    out = poisoned((64 * 64 + 128,), np.float32)
    shared = 3 * 8192 + 64
    args = IMAGE, out, STEPS, FAULTS.index(fault)
    run("hopper_planted.cu", "pipeline", *args, threads=384, shared=shared, grid=grid)
    return out[:4096].reshape(64, 64), out[4096:]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("order", ORDERS)
def test_a_right_pipeline_is_right_in_every_order(order, seed):
    with lanes(order, seed=seed):
        out, _ = pipeline()
    np.testing.assert_allclose(out, EXPECTED, rtol=1e-5, atol=1e-4)


PRODUCT = "wgmma bf16 of hopper_planted.cu:"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("NO_FULL_WAIT", [place("the copy"), "still "]),
        ("WRONG_PHASE", []),
        ("EARLY_REUSE", ["more arrivals", place("the bytes")]),
        ("A_OVERWRITTEN", ["A registers", PRODUCT, "before the wait", place("the wait")]),
        ("D_OVERWRITTEN", ["accumulators", PRODUCT, "before the wait", place("the wait")]),
        ("NO_FENCE", ["without wgmma_fence"]),
        ("TOO_MANY_BYTES", ["mbarrier_wait", place("the phase"), "lacks 0 of 1", "16 bytes"]),
        ("TOO_FEW_BYTES", ["mbarrier at byte 24576", "bytes"]),
        ("NO_PROXY_FENCE", ["without fence_proxy_async", place("of written memory")]),
        ("NEVER_WAITED", [PRODUCT, "still reads", place("the copy")]),
        ("EARLY_RELEASE", [PRODUCT, "still reads", place("the copy")]),
        ("LAST_NOT_WAITED", ["returned before the wgmma of", place("of written memory")]),
        ("INIT_UNPUBLISHED", ["without fence_proxy_async since its init", place("the copy")]),
        ("SECOND_ARRIVAL", ["more arrivals", place("one arrival too many")]),
        ("STAGE_WRITTEN", ["shared memory that the wgmma", "written before the wait"]),
    ],
)
@pytest.mark.parametrize("order", ORDERS)
def test_a_fault_of_a_pipeline_is_told_with_block_and_line(fault, words, order):
    with lanes(order, seed=1), pytest.raises(EmulatorError) as caught:
        pipeline(fault)
    message = str(caught.value)
    assert all(word in message for word in [*words, "hopper_planted.cu:", "block (0,0,0)"]), message
    assert "\n" not in message


@pytest.mark.parametrize("order", ORDERS)
def test_sums_are_nan_until_the_wait_and_a_wrong_swizzle_shows(order):
    with lanes(order):
        out, early = pipeline("D_READ")
        assert np.isnan(early).all()
        np.testing.assert_allclose(out, EXPECTED, rtol=1e-5, atol=1e-4)
        out, _ = pipeline("WRONG_SWIZZLE")
    assert np.abs(out - EXPECTED).max() > 1


@pytest.mark.parametrize("order", ORDERS)
def test_named_barriers_and_registers(order):
    values = np.random.default_rng(0).integers(0, 99, 384).astype(np.float32)

    def named(fault):
        out = poisoned((32,), np.float32)
        run("hopper_planted.cu", "named", values, out, fault, threads=384, shared=2048)
        return out

    with lanes(order):
        np.testing.assert_array_equal(named(0), values.reshape(12, 32).sum(0))
        for fault, words in [
            (1, ["another count", place("arrives")]),
            (3, ["setmaxnreg.inc", "(0 registers are free)"]),
        ]:
            with pytest.raises(EmulatorError) as caught:
                named(fault)
            assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("source", "entry", "opcodes"),
    [
        ("hopper_products.cu", "bf16_registers_mn", ["HGMMA.64x128x16.F32.BF16"]),
        ("hopper_products.cu", "f16_shared_mn_k", ["HGMMA.64x64x16.F32"]),
        ("hopper_products.cu", "s8_registers_k", ["IGMMA.64x64x32.S8"]),
        ("hopper_products.cu", "e4m3_shared_k_k", ["QGMMA.64x64x32.F32.E4M3"]),
        ("hopper_planted.cu", "pipeline", ["HGMMA", "UBLKCP", "USETMAXREG", "SYNCS", "ELECT"]),
        ("hopper_planted.cu", "named", ["BAR.ARV", "BAR.SYNC", "USETMAXREG"]),
    ],
)
def test_the_same_names_are_hoppers_instructions(source, entry, opcodes):
    code = code_of(compile_kernel(spec_of(source, entry, threads=384)))[entry]
    assert [opcode for opcode in opcodes if not code.count(opcode)] == [], code.opcodes
