"""NVRTC without a GPU: the gate over every kernel and architecture, the cache's key, and what may
go wrong with a cache.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from sla2_kernels import artifacts, compile
from sla2_kernels.compile import compile_kernel, kernel_key, parse_log, parse_warnings
from sla2_kernels.gate import gate
from sla2_kernels.kernels import DTYPES, all_specs, supports
from sla2_kernels.specs import ARCHITECTURES, CSRC, KernelSpec

KERNEL = """#include "scale.cuh"
extern "C" __global__ void __launch_bounds__(64) scale(const float* in, float* out) {
    __shared__ float shared[64];
    shared[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = FACTOR * shared[63 - threadIdx.x];
}
"""


@pytest.fixture
def spec(tmp_path, monkeypatch):
    """A small kernel with a header of its own, and an empty cache."""
    monkeypatch.setenv("SLA2_CACHE", str(tmp_path / "cache"))
    (tmp_path / "scale.cu").write_text(KERNEL)
    (tmp_path / "scale.cuh").write_text("#define FACTOR 2.0f\n")
    return KernelSpec(source=str(tmp_path / "scale.cu"), entry="scale", arch="sm_80", threads=64)


def files(suffix):
    return sorted(artifacts.folder().glob(f"*{suffix}"))


# What every run compiles, beside what test_gate.py looks at; `make test-full` compiles all.
QUICK = ("sm_90a", "bfloat16")


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [
        pair if pair == QUICK else pytest.param(*pair, marks=pytest.mark.slow)
        for pair in itertools.product(ARCHITECTURES, DTYPES)
    ],
)
def test_every_kernel_compiles_within_its_limits(arch, dtype):
    specs = [spec for spec in all_specs(arch) if f" {dtype}" in spec.label]
    everywhere = set(CSRC.glob("*.cu"))
    if not supports(arch, "fp8"):
        everywhere -= {CSRC / "keys_low.cu", CSRC / "linear_low.cu"}
    expected = everywhere | (set(CSRC.glob("sm90/*.cu")) if arch == "sm_90a" else set())
    assert {spec.path for spec in specs} == expected
    with ThreadPoolExecutor(2) as pool:
        problems = [
            line
            for spec, built in zip(specs, pool.map(compile_kernel, specs))
            for line in gate(spec, built)
        ]
    assert problems == [], "\n".join(problems)


def test_every_entry_of_the_sources_has_a_spec():
    from sla2_kernels.sources import entries_of

    written = {
        name for path in CSRC.rglob("*.cu") for name in entries_of({path.name: path.read_text()})
    }
    assert written == {spec.entry for spec in all_specs("sm_90a")}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"threads": 1024, "blocks_per_sm": 16}, "registers, expected at most 0"),
        ({"threads": 1024, "blocks_per_sm": 2}, "1 blocks of 1024 threads fit on a"),
        ({"shared_bytes": 200_000}, "bytes of shared memory"),
    ],
)
def test_the_gate_sees_what_is_too_much(spec, change, words):
    tight = replace(spec, arch="sm_86", **change)
    assert words in " ".join(gate(tight, compile_kernel(tight)))
    assert gate(spec, compile_kernel(spec)) == []


def test_the_gate_sees_what_ptxas_says_of_lost_performance(spec):
    log = (
        "ptxas info    : 0 bytes gmem\nptxas info    : (C7514) Potential Performance Loss:"
        " wgmma.mma_async instructions are serialized\nptxas info    : (C1234) other\n"
    )
    (warning,) = parse_warnings(log)
    built = replace(compile_kernel(spec), warnings=(warning,))
    assert gate(spec, built) == [f"scale sm_80: {warning}"]
    assert "(C7514) Potential Performance Loss: wgmma" in warning


def test_the_gate_sees_spills(spec):
    log = (
        "ptxas info    : 0 bytes gmem\nptxas info    : Compiling entry function 'scale' for"
        " 'sm_80'\nptxas info    : Function properties for scale\n    48 bytes stack frame, 44"
        " bytes spill stores, 40 bytes spill loads\nptxas info    : Used 32 registers, used 1"
        " barriers, 48 bytes cumulative stack size, 256 bytes smem\n"
    )
    resources = parse_log(log)["scale"]
    assert (resources.registers, resources.spill_stores, resources.spill_loads) == (32, 44, 40)
    assert (resources.stack, resources.shared) == (48, 256)
    built = compile.Compiled(Path("none"), "", {"scale": resources})
    assert "spills 44 + 40 bytes, expected none" in gate(spec, built)[0]
    with pytest.raises(RuntimeError, match="expected a report of registers"):
        parse_log("nothing to see")


def test_numbers_of_ptxas_arrive(spec):
    used = compile_kernel(spec).kernels["scale"]
    assert used.shared == 256
    assert 4 <= used.registers <= 32
    assert used.spill_stores == used.spill_loads == 0


def test_an_edited_header_changes_the_key_and_the_cubin(spec):
    first = compile_kernel(spec)
    assert kernel_key(spec) == first.key
    spec.path.with_name("scale.cuh").write_text("#define FACTOR 3.0f\n")
    second = compile_kernel(spec)
    assert first.key != second.key
    assert first.path.read_bytes() != second.path.read_bytes()
    spec.path.with_name("scale.cuh").write_text("#define FACTOR 2.0f\n")
    assert kernel_key(spec) == first.key


def test_macros_architecture_and_nvrtc_are_in_the_key(spec, monkeypatch):
    keys = {kernel_key(spec)}
    for change in ({"arch": "sm_90a"}, {"macros": (("FACTOR", 4),)}):
        keys.add(
            kernel_key(
                KernelSpec(
                    source=spec.source, entry="scale", threads=64, **{"arch": "sm_80"} | change
                )
            )
        )
    monkeypatch.setattr(compile, "nvrtc_version", lambda path: "99.0")
    keys.add(kernel_key(spec))
    monkeypatch.setattr(compile, "SCHEMA", "another")
    keys.add(kernel_key(spec))
    assert len(keys) == 5


def test_a_second_call_reads_what_the_first_wrote(spec, monkeypatch):
    first = compile_kernel(spec)
    monkeypatch.setattr(compile, "_nvrtc", None)
    assert compile_kernel(spec) == first
    assert artifacts.contents() | {"bytes": 0} == {
        "folder": str(artifacts.folder()),
        "artifacts": 1,
        "bytes": 0,
        "damaged": 0,
        "writable": True,
    }


@pytest.mark.parametrize(
    "damage", ["truncated", "another byte", "no digest", "notes are no JSON", "notes are gone"]
)
def test_a_damaged_entry_is_set_aside_and_rebuilt(spec, damage):
    first = compile_kernel(spec)
    data, notes = first.path.read_bytes(), first.path.with_name(first.path.name + ".json")
    if damage == "truncated":
        first.path.write_bytes(data[: len(data) // 2])
    elif damage == "another byte":
        first.path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "no digest":
        notes.write_text(json.dumps({"notes": {}}))
    elif damage == "notes are no JSON":
        notes.write_text("{")
    else:
        notes.unlink()
    again = compile_kernel(spec)
    assert again.path.read_bytes() == data
    assert again.kernels == first.kernels
    assert bool(files(".bad")) == (damage != "notes are gone")


def python(code, **env):
    env = os.environ | {"OMP_NUM_THREADS": "1"} | env
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


COUNT = """
import os, sys
from sla2_kernels import compile
from sla2_kernels.specs import KernelSpec
real = compile._nvrtc
def counted(*args):
    with open(sys.argv[1] if len(sys.argv) > 1 else {log!r}, "a") as file:
        file.write("compiled\\n")
    return real(*args)
compile._nvrtc = counted
spec = KernelSpec(source={source!r}, entry="scale", arch="sm_80", threads=64)
built = compile.compile_kernel(spec)
print(len(built.path.read_bytes()))
"""


def test_eight_processes_compile_once(spec, tmp_path):
    log = tmp_path / "compiled.txt"
    running = [python(COUNT.format(log=str(log), source=spec.source)) for _ in range(8)]
    sizes = [process.communicate()[0].strip() for process in running]
    assert all(process.returncode == 0 for process in running), sizes
    assert len(set(sizes)) == 1
    assert log.read_text() == "compiled\n"
    assert len(files(".cubin")) == 1


def test_a_kill_in_mid_write_leaves_nothing_that_counts(spec, tmp_path):
    code = """
import os, time
from sla2_kernels import artifacts, compile
from sla2_kernels.specs import KernelSpec
def stuck(descriptor):
    print("writing", flush=True)
    time.sleep(600)
os.fsync = stuck
compile.compile_kernel(KernelSpec(source={source!r}, entry="scale", arch="sm_80", threads=64))
"""
    process = python(code.format(source=spec.source))
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(files(".tmp")) == 1
    assert files(".cubin") == []
    start = time.monotonic()
    built = compile_kernel(spec)
    assert time.monotonic() - start < 30  # the dead process's lock is free
    assert built.path.parent == artifacts.folder()
    assert files(".tmp") == []


@pytest.mark.parametrize(
    "kind", ["folder cannot be made", "lock cannot be taken", "file cannot be written"]
)
def test_a_read_only_cache_is_a_warning_and_no_error(spec, monkeypatch, kind, tmp_path):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "read-only")

    if kind == "folder cannot be made":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("SLA2_CACHE", str(tmp_path / "file" / "cache"))
    elif kind == "lock cannot be taken":
        monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    else:
        real, cache = artifacts._write, artifacts.folder()
        monkeypatch.setattr(
            artifacts,
            "_write",
            lambda path, data: (refuse if path.parent == cache else real)(path, data),
        )
    with pytest.warns(RuntimeWarning, match=r"expected a folder that can be written and locked"):
        built = compile_kernel(spec)
    assert built.kernels["scale"].registers > 0
    assert not built.path.is_relative_to(tmp_path)
    with pytest.warns(RuntimeWarning):
        assert compile_kernel(spec).path == built.path
    assert files(".cubin") == []


def test_a_filled_read_only_folder_is_read_without_a_lock(spec, monkeypatch):
    built = compile_kernel(spec)
    monkeypatch.setattr("filelock.FileLock.acquire", lambda *a, **k: pytest.fail("took a lock"))
    assert compile_kernel(spec).path == built.path


def test_errors_are_one_line(spec, monkeypatch, tmp_path):
    spec.path.write_text(KERNEL.replace("FACTOR *", "NOTHING *"))
    with pytest.raises(
        RuntimeError, match=r'NVRTC \d+\.\d+: scale\.cu: .*"NOTHING" is undefined'
    ) as caught:
        compile_kernel(spec)
    assert "\n" not in str(caught.value)
    spec.path.write_text('#include "nowhere.cuh"\n')
    with pytest.raises(
        FileNotFoundError, match=r"scale\.cu: includes 'nowhere\.cuh', which is neither"
    ):
        compile_kernel(spec)
    with pytest.raises(ValueError, match=r"arch: expected one of sm_80, sm_86, .*, got 'sm_75'"):
        all_specs("sm_75")
    spec.path.write_text(KERNEL)
    monkeypatch.setenv("SLA2_NVRTC", str(tmp_path / "nothing.so"))
    with pytest.raises(RuntimeError, match="SLA2_NVRTC: expected the NVRTC library, got"):
        compile_kernel(spec)
    monkeypatch.delenv("SLA2_NVRTC")
    monkeypatch.setattr(compile, "_candidates", list)
    with pytest.raises(
        RuntimeError, match=r"NVRTC is not installed; pip install 'sla2-kernels\[cuda13\]'"
    ):
        compile_kernel(spec)


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (
            (
                "cu13/lib/libnvrtc.so.13",
                "cu13/lib/libnvrtc-builtins.so.13.2",
                "cu13/lib/libnvrtc.alt.so.13",
            ),
            ["libnvrtc.so.13"],
        ),
        (
            ("cuda_nvrtc/lib/libnvrtc.so.12", "cuda_nvrtc/lib/libnvrtc-builtins.so.12.8"),
            ["libnvrtc.so.12"],
        ),
        (
            ("cuda_nvrtc/lib/libnvrtc.so.12", "cu13/lib/libnvrtc.so.13"),
            ["libnvrtc.so.13", "libnvrtc.so.12"],
        ),
    ],
    ids=["cuda13", "cuda12", "both"],
)
def test_nvrtc_is_found_in_either_wheel(layout, expected, tmp_path, monkeypatch):
    for name in layout:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    monkeypatch.setattr(compile, "_nvidia_roots", lambda: [str(tmp_path)])
    for name in ("CUDA_PATH", "CUDA_HOME", "SLA2_NVRTC"):
        monkeypatch.delenv(name, raising=False)
    paths = [path for path in compile._candidates() if path.is_relative_to(tmp_path)]
    assert [path.name for path in paths] == expected
    monkeypatch.setattr(compile, "_candidates", lambda: paths[::-1])  # whatever folder comes first
    monkeypatch.setattr(compile, "_driver_major", lambda: 99)
    assert compile.find_nvrtc().name == expected[0]
    monkeypatch.setattr(
        compile, "_driver_major", lambda: 12
    )  # a driver of CUDA 12 does not load what 13 built
    assert compile.find_nvrtc().name == expected[-1]


def test_nvrtc_gets_the_builtins_that_lie_beside_it(tmp_path, monkeypatch):
    for name in ("libnvrtc.so.13", "libnvrtc-builtins.so.13.0", "libnvrtc-builtins.alt.so.13.0"):
        (tmp_path / name).write_text("")
    opened = []

    class Library:
        def __init__(self, path):
            opened.append(Path(path).name)
            self.nvrtcGetErrorString = lambda: None

    monkeypatch.setattr(compile.ctypes, "CDLL", Library)
    compile._library.__wrapped__(tmp_path / "libnvrtc.so.13")
    assert opened == ["libnvrtc-builtins.so.13.0", "libnvrtc.so.13"]
