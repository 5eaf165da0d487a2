"""The numba kernels alone: matrix products of every edge, exp2, rounding, routing, the cache
folder, fork.
"""

import multiprocessing
import os
import subprocess
import sys

import numpy as np
import pytest
from sla2_kernels.cpu import build, elementwise, quantize, route, softtopk
from sla2_kernels.cpu.tiles import gemm


@build.kernel
def product(a, turned, b, c, accumulate, lo, hi):
    for _ in range(lo, hi):
        rows, columns = (1, a.shape[1]) if turned else (a.shape[1], 1)
        gemm(
            a,
            0,
            rows,
            columns,
            b,
            0,
            b.shape[1],
            c,
            0,
            c.shape[1],
            c.shape[0],
            c.shape[1],
            b.shape[0],
            accumulate,
        )


@build.kernel
def powers(x, out, lo, hi):
    for i in range(lo, hi):
        out[i] = elementwise.exp2(x[i])


@build.kernel
def roundings(x, out, lo, hi):
    for r in range(lo, hi):
        elementwise.round_e4m3(x, r, x.shape[1])
        elementwise.round_int8(out, r, x.shape[1])


@pytest.mark.parametrize(
    ("m", "n", "depth"), [(8, 16, 1), (16, 48, 7), (24, 80, 33), (128, 128, 64)]
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("turned", [False, True])
def test_products(m, n, depth, dtype, turned):
    rng = np.random.default_rng(0)
    a, b = (
        rng.standard_normal((m, depth)).astype(dtype),
        rng.standard_normal((depth, n)).astype(dtype),
    )
    c = np.full((m, n), np.nan, dtype)  # fully overwritten
    left = np.ascontiguousarray(a.T) if turned else a
    build.run(product, 1, 1, left, turned, b, c, 0)
    np.testing.assert_allclose(c, a @ b, rtol=0, atol=200 * np.finfo(dtype).eps)
    build.run(product, 1, 1, left, turned, b, c, 1)
    np.testing.assert_allclose(c, 2 * (a @ b), rtol=0, atol=400 * np.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exp2(dtype):
    x = np.concatenate(
        [np.linspace(-125, 120, 5001), [0, -0.5, 0.5, -np.inf, -1e9, np.nan]]
    ).astype(dtype)
    out = np.empty_like(x)
    build.run(powers, len(x), 2, x, out)
    np.testing.assert_allclose(
        out, np.exp2(x.astype(np.float64)), rtol=2 * np.finfo(dtype).eps, atol=0
    )
    assert np.isnan(out[-1])
    assert out[-2] == 0
    assert out[-3] == 0


def test_rounding_of_probabilities_is_the_format():
    torch = pytest.importorskip("torch")
    formats = pytest.importorskip("sla2_core.formats")
    x = np.concatenate([np.linspace(0, 1, 4001), 2.0 ** -np.arange(30.0), [0.0, np.nan]])[None]
    fp8, int8 = x.copy(), x.copy()
    build.run(roundings, 1, 1, fp8, int8)
    for found, name in ((fp8, "fp8"), (int8, "int8_int8")):
        form = formats.format_of(name)
        expected = form.round_probabilities(torch.from_numpy(x), 8).numpy()
        np.testing.assert_allclose(
            found, expected, rtol=1e-15, atol=0
        )  # steps are 1e-3: never a neighbour


def test_top_k_breaks_ties_to_the_lower_index_and_ascends():
    scores = np.array([[[1, 3, 3, 0, 3, 2]], [[0, 0, 0, 0, 0, np.nan]]], np.float32)
    assert route.top_k(scores, 3).tolist() == [[[1, 2, 4]], [[0, 1, 5]]]
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 9, (2, 33, 57)).astype(np.float32)
    expected = np.sort(np.argsort(-scores, axis=-1, kind="stable")[..., :13], axis=-1)
    np.testing.assert_array_equal(route.top_k(scores, 13, threads=2), expected)
    np.testing.assert_array_equal(route.top_k(scores, 57)[0, 0], np.arange(57))


def test_transposed_map():
    indices = np.array([[[0, 2], [2, -1], [0, 1]]], np.int32)
    queries, counts = route.transposed_map(indices, np.array([[2, 1, 2]], np.int32), 4)
    assert queries.tolist() == [[[0, 2], [2, -1], [0, 1], [-1, -1]]]
    assert counts.tolist() == [[2, 1, 2, 0]]


CHILD = """
import json, numpy as np
from sla2_kernels.cpu import build, route
route.top_k(np.zeros((1, 2, 3), np.float32), 1)
print(json.dumps(build.compile_seconds()))
"""


FULL_DISK = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
"""


def child(folder, code=CHILD):
    env = os.environ | {"SLA2_CACHE": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_compiled_code_is_cached_and_a_folder_that_cannot_be_written_is_no_error(
    tmp_path,
):
    child(tmp_path)
    kept = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.nbc")}
    assert kept
    child(tmp_path)
    assert kept == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.nbc")}
    (tmp_path / "file").touch()
    child(tmp_path / "file" / "folder")


@pytest.mark.slow  # compiles every kernel anew
def test_a_full_disk_is_no_error_and_a_damaged_entry_is_made_anew(tmp_path):
    child(tmp_path, FULL_DISK + CHILD)
    child(tmp_path)
    for suffix in ("nbi", "nbc"):
        (entry,) = tmp_path.rglob(f"*.{suffix}")
        entry.write_bytes(entry.read_bytes()[:100])
        child(tmp_path)
        assert entry.stat().st_size > 100


def _in_child(queue):
    queue.put(route.top_k(np.arange(12, dtype=np.float32).reshape(1, 4, 3), 1, threads=2).tolist())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process")
def test_threads_work_after_a_fork():
    expected = route.top_k(np.arange(12, dtype=np.float32).reshape(1, 4, 3), 1, threads=2).tolist()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_in_child, args=(queue,))
    process.start()
    assert queue.get(timeout=300) == expected
    process.join()


@pytest.mark.parametrize("fmt", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_low_bit_copies_are_the_plain_definition_to_the_bit(fmt, dtype):
    torch = pytest.importorskip("torch")
    from sla2_core.formats import format_of
    from sla2_core.formats.elements import fake_quantize

    x = torch.randn(
        2, 1, 111, 24, dtype=getattr(torch, dtype), generator=torch.Generator().manual_seed(0)
    )
    x[0, 0, :16] = 0  # a block of zeros
    x[0, 0, 16:32] *= (
        torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps
    )  # scales below what the dtype holds
    x[1, 0, 40, 3], x[1, 0, 70, 5] = float("nan"), float("inf")
    lengths = torch.tensor([111, 90])
    valid = (torch.arange(111) < lengths[:, None])[:, None, :, None]
    for plain, found in (
        (
            format_of(fmt).round_blocks(x.masked_fill(~valid, 0), 16),
            quantize.quantize_blocks(x[:, 0].numpy(), lengths.numpy(), 16, fmt),
        ),
        (
            fake_quantize(x.masked_fill(~valid, 0), fmt, 2),
            quantize.quantize_channels(x[:, 0].numpy(), lengths.numpy(), fmt, 2),
        ),
    ):
        assert torch.isfinite(plain[0, 0, :32]).all()
        np.testing.assert_array_equal(
            found, plain[:, 0].masked_fill(~valid[:, 0], 0).numpy()
        )  # padding is 0, never NaN


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_soft_top_k_agrees_with_bisection(dtype):
    torch = pytest.importorskip("torch")
    from sla2_core.routing.softtopk import _bisect

    x = (
        torch.randn(40, 63, dtype=getattr(torch, dtype), generator=torch.Generator().manual_seed(0))
        * 20
    )
    x[3, :60], x[4, 7], x[5] = -torch.inf, float("nan"), 2.0
    k = torch.full((40, 1), 2.5, dtype=x.dtype)
    k[6:9, 0] = torch.tensor([1.0, 62.0, 63.0])
    k[3] = 3
    found = torch.from_numpy(softtopk.soft_top_k(x.numpy(), k[:, 0].numpy()))
    torch.testing.assert_close(
        found, _bisect(x, k), rtol=0, atol=2e-5 if dtype == "float32" else 1e-12, equal_nan=True
    )
