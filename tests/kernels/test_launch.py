"""Launching: arguments, streams and devices as CuPy gets them (a stand-in for it), and what a
machine without a GPU says.
"""

import sys
import types
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from sla2_kernels import launch as module
from sla2_kernels.launch import Pointer, launch, load, require_cuda
from sla2_kernels.specs import ARCHITECTURES, KernelSpec, architecture_of

PLANTED = str(Path(__file__).with_name("planted.cu"))


class FakeFunction:
    def __init__(self, log, entry):
        self.log, self.entry, self.max_dynamic_shared_size_bytes = log, entry, None

    def __call__(self, grid, block, args, shared_mem):
        self.log.append(
            (
                "launch",
                self.entry,
                grid,
                block,
                args,
                shared_mem,
                self.max_dynamic_shared_size_bytes,
            )
        )


@pytest.fixture(params=["CuPy 13", "CuPy 14"])
def cupy(request, monkeypatch):
    """A module that records what would go to CuPy; only 14 takes streams by the CUDA stream
    protocol.
    """
    log = []

    @contextmanager
    def entered(kind, *args):
        log.append((kind, *args))
        yield
        log.append((f"left {kind}",))

    class RawModule:
        def __init__(self, path):
            assert Path(path).read_bytes()[:4] == b"\x7fELF"
            log.append(("module",))

        def get_function(self, entry):
            return FakeFunction(log, entry)

    fake = types.ModuleType("cupy")
    fake.RawModule, fake.log = RawModule, log
    fake.cuda = types.SimpleNamespace(
        Device=lambda index: entered("device", index), Stream=types.SimpleNamespace()
    )

    class ReusableStream:
        def __init__(self, handle, device=None):
            self.handle = handle

        def __enter__(self):
            log.append(("stream", self.handle))

        def __exit__(self, *_):
            log.append(("left stream",))

    if request.param == "CuPy 14":
        fake.cuda.Stream.from_external = lambda stream: ReusableStream(stream.__cuda_stream__()[1])
    else:
        fake.cuda.ExternalStream = ReusableStream
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(module, "missing_for_cuda", lambda: None)
    module._load.cache_clear()
    module._cupy_stream.cache_clear()
    yield fake
    module._load.cache_clear()
    module._cupy_stream.cache_clear()


def planted(entry, **change):
    return KernelSpec(source=PLANTED, entry=entry, arch="sm_90a", threads=64, **change)


def test_the_gpu_gets_the_cubin_the_stream_and_exact_types(cupy):
    kernel = load(planted("neighbour", shared_bytes=100 * 1024), "cuda", device=3)
    assert cupy.log == [("device", 3), ("module",), ("left device",)]
    cupy.log.clear()
    launch(
        kernel,
        (7, 2),
        (64,),
        100 * 1024,
        [Pointer(1 << 40), Pointer(0), np.int32(5), np.float32(0.5)],
        0x1234,
    )
    assert cupy.log[:2] == [("device", 3), ("stream", 0x1234)]
    _, entry, grid, block, args, shared, allowed = cupy.log[2]
    assert (entry, grid, block, shared, allowed) == (
        "neighbour",
        (7, 2, 1),
        (64, 1, 1),
        100 * 1024,
        100 * 1024,
    )
    assert [a.dtype for a in args] == [np.uint64, np.uint64, np.int32, np.float32]
    assert [a.item() for a in args] == [1 << 40, 0, 5, 0.5]
    assert cupy.log[3:] == [("left stream",), ("left device",)]
    assert load(planted("neighbour", shared_bytes=100 * 1024), "cuda", device=3) is kernel


def test_no_stream_is_the_default_stream_and_an_empty_grid_launches_nothing(cupy):
    kernel = load(planted("neighbour"), "cuda")
    assert kernel.handle.max_dynamic_shared_size_bytes is None
    cupy.log.clear()
    launch(kernel, (0, 5), (64,), 0, [])
    assert cupy.log == []
    launch(kernel, (1,), (64,), 0, [])
    assert ("stream", 0) in cupy.log


@pytest.mark.parametrize("target", ["cuda", "emulator"])
def test_an_argument_without_a_type_is_refused(cupy, target):
    kernel = load(planted("neighbour"), target)
    with pytest.raises(
        TypeError, match="neighbour: argument 1: expected a Pointer or a numpy scalar, got 5"
    ):
        launch(kernel, (1,), (64,), 0, [Pointer(0), 5])


def test_an_unknown_target_is_refused():
    with pytest.raises(ValueError, match="target: expected one of cuda, emulator, got 'gpu'"):
        load(planted("neighbour"), "gpu")


def test_pointers_keep_their_memory_and_refuse_strides():
    array = np.zeros((4, 4), np.float32)
    pointer = Pointer.of(array)
    assert pointer.address == array.ctypes.data
    assert pointer.owner is array
    assert Pointer.of(None).address == 0
    with pytest.raises(ValueError, match="expected C-contiguous, got strides"):
        Pointer.of(array.T[1:])


@pytest.mark.parametrize(
    ("driver", "cupy_there", "nvrtc", "devices", "words"),
    [
        (
            None,
            True,
            True,
            1,
            "no NVIDIA driver (libcuda.so.1); it needs a machine with an NVIDIA GPU",
        ),
        (12080, False, True, 1, "CuPy is not installed; pip install 'sla2-kernels[cuda12]'"),
        (13000, False, True, 1, "CuPy is not installed; pip install 'sla2-kernels[cuda13]'"),
        (
            13000,
            True,
            False,
            1,
            "NVRTC is not installed; pip install 'sla2-kernels[cuda13]' (or [cuda12])",
        ),
        (13000, True, True, 0, "the CUDA runtime finds no GPU"),
        (
            13000,
            True,
            True,
            "error",
            "the CUDA runtime finds no GPU (cudaErrorNoDevice: no device)",
        ),
        (13000, True, True, 1, None),
    ],
)
def test_what_is_missing_is_told_in_one_line(
    monkeypatch, driver, cupy_there, nvrtc, devices, words
):
    class CUDARuntimeError(Exception):
        pass

    def count():
        if devices == "error":
            raise CUDARuntimeError("cudaErrorNoDevice:\nno device")
        return devices

    fake = types.ModuleType("cupy")
    fake.cuda = types.SimpleNamespace(
        runtime=types.SimpleNamespace(getDeviceCount=count, CUDARuntimeError=CUDARuntimeError)
    )
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(module, "_driver_version", lambda: driver)
    real = module.importlib.util.find_spec
    there = {"cupy": object() if cupy_there else None}
    monkeypatch.setattr(
        module.importlib.util,
        "find_spec",
        lambda name: there[name] if name in there else real(name),
    )
    if not nvrtc:
        monkeypatch.setattr("sla2_kernels.compile._candidates", list)
        monkeypatch.delenv("SLA2_NVRTC", raising=False)
    if words is None:
        require_cuda()
        return
    with pytest.raises(RuntimeError) as caught:
        require_cuda()
    message = str(caught.value)
    assert message.startswith(f"backend='cuda': {words}")
    assert "\n" not in message


def test_architectures_of_capabilities():
    pairs = [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)]
    expected = [
        "sm_80",
        "sm_86",
        "sm_86",
        "sm_89",
        "sm_90a",
        "sm_100a",
        "sm_100",
        "sm_120a",
        "sm_120",
    ]
    assert [architecture_of(*pair) for pair in pairs] == expected
    with pytest.raises(
        RuntimeError, match=r"expected a GPU of compute capability 8\.0, .*, got 7\.5"
    ):
        architecture_of(7, 5)


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "blocks"),
    [
        ("sm_80", 128, 255, 0, 2),
        ("sm_80", 256, 128, 80 * 1024, 2),
        ("sm_90a", 128, 168, 65536, 3),
        ("sm_86", 1024, 32, 0, 1),
        ("sm_120a", 32, 16, 0, 24),
    ],
    ids=["registers", "shared-80", "shared-90", "threads", "blocks"],
)
def test_resident_blocks(arch, threads, registers, shared, blocks):
    assert ARCHITECTURES[arch].resident_blocks(threads, registers, shared) == blocks


def test_a_spec_names_itself_and_its_macros():
    spec = planted(
        "neighbour", macros=(("SLA2_HEAD_DIM", 64), ("SLA2_DTYPE", 1), ("SLA2_PRECISION", 2))
    )
    assert spec.label == "neighbour d64 bfloat16 int8_int8"
    assert spec.definitions == (
        "-DSLA2_ARCH=90",
        "-DSLA2_DTYPE=1",
        "-DSLA2_HEAD_DIM=64",
        "-DSLA2_PRECISION=2",
    )
