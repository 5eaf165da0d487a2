"""Processes that tests start: what they find on their path, and two of them that work together."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def environment(**more: str) -> dict[str, str]:
    """This process's environment and `more`, with the helpers to be imported."""
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | more


def run_two(worker: str, folder: Path, **more: str) -> list[dict]:
    """Run the module helpers.`worker` as torchrun would start it for two gloo processes.

    Args:
        worker: writes rank{RANK}.json into the folder, its first argument.
        folder: gets the output of each process too, as log{RANK}.
        more: goes into the environment of both.

    Returns:
        What each wrote. Fails with the end of both logs unless both end well within 300 seconds.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(2):
        env = environment(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            OMP_NUM_THREADS="1",
            **more,
        )
        command = [sys.executable, "-m", f"helpers.{worker}", str(folder)]
        with (folder / f"log{rank}").open("w") as log:
            processes.append(
                subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
            )
    try:
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = [(folder / f"log{rank}").read_text()[-3000:] for rank in range(2)]
    assert codes == [0, 0], "\n".join(logs)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
