"""Runs one kernel of planted.cu in a process of its own, for test_sanitizers.py: `python sanitized.py CASE`."""

import sys
from pathlib import Path

import numpy as np
from sla2_kernels.emulator.emulate import EmulatorError
from sla2_kernels.launch import Pointer, launch, load
from sla2_kernels.specs import KernelSpec


def run(entry, *args, shared=2048, grid=1):
    source = str(Path(__file__).with_name("planted.cu"))
    spec = KernelSpec(source=source, entry=entry, arch="sm_89", threads=64, shared_bytes=shared)
    args = [Pointer.of(a) if isinstance(a, np.ndarray) else np.int32(a) for a in args]
    launch(load(spec, "emulator"), (grid,), (64,), shared, args)


def main(case):
    values, out = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
    if case == "right":
        for entry in ("neighbour", "warp_neighbour"):
            run(entry, values, out, 1)
        run("past_the_end", out, 64, 0, shared=256)
        run("stages", np.zeros(512, np.float32), np.zeros(192, np.float32))
    elif case.startswith("past"):
        run("past_the_end", out, 64, int(case[-1]), shared=256, grid=2)
    elif case == "skips_shuffle":
        try:
            run("skips_shuffle", out, 5)
        except EmulatorError as error:
            print(error)
    else:
        run(case, values, out, 0)
    print("finished")


main(sys.argv[1])
