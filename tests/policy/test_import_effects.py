"""Importing a package takes no heavy import it does not need, writes nothing, connects nowhere and
starts nothing.
"""

import json
import os
import subprocess
import sys

import pytest

HEAVY = {
    *(
        "cupy",
        "numba",
        "diffusers",
        "transformers",
        "accelerate",
        "peft",
        "tensorboard",
        "ray",
        "av",
        "lpips",
    ),
    *(
        "torchmetrics",
        "torchvision",
        "open_clip",
        "timm",
        "matplotlib",
        "jinja2",
        "pandas",
        "scipy",
        "skimage",
    ),
}

# Runs in a fresh interpreter; the audit hook sees what the import does beyond what torch does when
# it is imported.
PROBE = """
import json, os, sys, threading
if BASE: import torch
events = []
watched = {"subprocess.Popen", "os.system", "os.posix_spawn", "os.fork", "os.mkdir"}
watched |= {"socket.connect", "socket.bind"}
def hook(event, args):
    if event in watched:
        events.append(f"{event} {args!r}"[:200])
    elif event == "open" and isinstance(args[1], str) and args[0] != os.devnull:
        if set(args[1]) & set("wax+"):
            events.append(f"open {args[0]!r} {args[1]}")
sys.addaudithook(hook)
import MODULE
modules = sorted({name.split(".")[0] for name in sys.modules})
print(json.dumps([events, threading.active_count(), modules]))
"""


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("sla2_kernels", HEAVY | {"torch"}),
        ("sla2_core", HEAVY),
        ("sla2_eval", HEAVY | {"torch", "click", "rich", "pydantic"}),
        ("sla2_eval.cli.main", HEAVY | {"torch", "numpy", "rich", "pydantic"}),
    ],
)
def test_import_is_light_and_has_no_effect(module, forbidden, tmp_path):
    env = {
        k: v for k, v in os.environ.items() if not k.startswith(("SLA2_", "XDG_", "COV_", "PYTEST"))
    }
    env |= {"HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    code = PROBE.replace("MODULE", module).replace("BASE", str("torch" not in forbidden))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""
    events, threads, modules = json.loads(done.stdout)
    assert events == []
    assert threads == 1
    assert forbidden.isdisjoint(modules), sorted(forbidden.intersection(modules))
    assert list(tmp_path.iterdir()) == []
