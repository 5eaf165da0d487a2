"""Tasks and grids on Ray: a GPU each (pretended ones), workers that die, a driver that dies, and a
cluster's address.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from sla2_eval.parallel import pool as pools
from sla2_eval.parallel.processes import ProcessPool, ThisProcess
from sla2_eval.parallel.ray_pool import RayPool
from sla2_eval.parallel.tasks import Task, TasksLost

PATIENCE = 900  # seconds for what takes 60 where nothing else runs
JOBS = '''
"""Jobs of the tests."""
import os, time
from pathlib import Path

def meet(folder, name, other, report):
    """Wait for the other job to have started; the GPU this one was given."""
    (Path(folder) / name).touch()
    end = time.time() + 300
    while not (Path(folder) / other).exists():
        assert time.time() < end
        time.sleep(0.05)
    report(name, 1, 1)
    return os.environ["CUDA_VISIBLE_DEVICES"], os.environ["OMP_NUM_THREADS"], os.getcwd()

def die(report):
    os._exit(9)

def die_once(path, report):
    if not os.path.exists(path):
        open(path, "w").close()
        os._exit(9)
    return "the second time"

def fail(report):
    raise ValueError("expected better\\nthan this")

def free(report):
    return "ran"
'''


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sla2_ray_jobs.py").write_text(JOBS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hook"), prepend=os.pathsep)
    return "sla2_ray_jobs"


@pytest.mark.parametrize(
    ("count", "gpus", "address", "kind"),
    [
        (3, 0, None, ProcessPool),
        (3, 1, None, ProcessPool),
        (0, 1, None, ThisProcess),
        (3, 2, None, RayPool),
        (3, 0, "auto", RayPool),
    ],
)
def test_ray_runs_where_there_are_several_gpus_or_a_cluster(
    monkeypatch, count, gpus, address, kind
):
    monkeypatch.setattr(pools, "local_gpus", lambda: gpus)
    pool = pools.open_pool(count, address)
    assert type(pool) is kind
    if kind is not RayPool:
        assert pool.free() == max(1, count)


@pytest.mark.slow
@pytest.mark.timeout(2 * PATIENCE)
def test_ray_tasks_have_a_gpu_each_and_survive_their_workers(jobs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen, said = [], []
    with RayPool(None, gpus=2, report=lambda *event: seen.append(event), say=said.append) as pool:
        assert pool.about == "Ray tasks of one GPU each, 2 at a time"
        arguments = {"folder": str(tmp_path)}
        found = pool.run(
            {
                "a": Task(f"{jobs}:meet", {**arguments, "name": "x", "other": "y"}),
                "b": Task(f"{jobs}:meet", {**arguments, "name": "y", "other": "x"}),
                "c": Task(f"{jobs}:free", {}, ("a",)),
            }
        )
        assert sorted(gpu for gpu, _, _ in (found["a"], found["b"])) == ["0", "1"]
        assert {rest for _, *rest in (found["a"], found["b"]) for rest in [tuple(rest)]} == {
            ("1", str(tmp_path))
        }
        assert found["c"] == "ran"
        assert sorted(seen) == [("x", 1, 1), ("y", 1, 1)]

        with pytest.raises(TasksLost) as caught:
            pool.run(
                {
                    "poison": Task(f"{jobs}:die", {}),
                    "unlucky": Task(f"{jobs}:die_once", {"path": str(tmp_path / "died")}),
                    "after": Task(f"{jobs}:free", {}, ("poison",)),
                }
            )
        assert caught.value.results == {"unlucky": "the second time"}
        assert caught.value.lost["after"] == "needs poison, whose worker died"
        assert caught.value.lost["poison"].startswith("its worker died 2 times (")
        assert len(said) == 3
        assert not any("\n" in line for line in said)

        with pytest.raises(ValueError, match=r"^expected better\nthan this$"):
            pool.run({"failing": Task(f"{jobs}:fail", {})})


LOSING = """
import os, signal, sys, threading
import ray
from sla2_eval.parallel.ray_pool import RayPool
from sla2_eval.parallel.tasks import ClusterLost, Task
with RayPool(None, workers=1) as pool:
    node = ray._private.worker._global_node
    found = [p.process.pid for k, v in node.all_processes.items() for p in v if k in sys.argv[1:]]
    assert found
    pool.submit("first", Task("sla2_ray_jobs:free", {}))
    print(pool.wait())
    pool.submit("second", Task("sla2_ray_jobs:meet", dict(folder="/", name="tmp", other="none")))
    threading.Timer(2, lambda: [os.kill(pid, signal.SIGKILL) for pid in found]).start()
    try:
        pool.wait()
    except ClusterLost as error:
        print(error)
"""


@pytest.mark.slow
@pytest.mark.timeout(PATIENCE)
@pytest.mark.parametrize("what", [("gcs_server",), ("gcs_server", "raylet"), ("raylet",)])
def test_a_lost_head_node_ends_in_one_line(jobs, tmp_path, what):
    command = [sys.executable, "-c", LOSING, *what]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    first, *_, last = done.stdout.splitlines()  # Ray itself tells of a raylet's end
    assert first == "('first', 'ran')"
    assert last.startswith("ray: expected the cluster at this machine to go on, got no answer")
    assert done.returncode == 0, done.stderr


DRIVER = """
import sys
from sla2_eval.grid import ablation
from sla2_eval.grid.settings import AblationSettings
from sla2_eval.parallel import pool
from sla2_eval.runs.settings import load_settings
gpus = int(sys.argv[3])
pool.local_gpus = lambda: gpus
result = ablation.run_grid(load_settings(sys.argv[1], AblationSettings), sys.argv[2])
print(result.failed, result.lost)
"""


def _start(folder: Path, out: str, gpus: int) -> subprocess.Popen:
    command = [sys.executable, "-c", DRIVER, "grid.yaml", out, str(gpus)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _finish(process: subprocess.Popen) -> str:
    said, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    return said


@pytest.mark.slow
@pytest.mark.timeout(4 * PATIENCE)
def test_a_grid_on_two_gpus_is_resumed_to_the_results_of_one_process(small_grid, tmp_path):
    trained, other = small_grid["variants"]
    other |= {"finetune": False, "attention": {"topk": 0.1, "router": "heuristic", "alpha": "one"}}
    settings = {**small_grid, "variants": [trained, other], "workers": 0}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(settings))
    first = _start(tmp_path, "ray", gpus=2)
    end = time.monotonic() + PATIENCE
    while not list((tmp_path / "ray").glob("work/stage2/*/checkpoint*")) and time.monotonic() < end:
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    time.sleep(3)  # its cluster ends with it
    done = {p: p.stat().st_mtime_ns for p in (tmp_path / "ray" / "videos" / "full").glob("*.mp4")}
    assert not (tmp_path / "ray" / "report").exists()
    assert _finish(_start(tmp_path, "ray", gpus=2)) == "0 {}\n"
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert _finish(_start(tmp_path, "here", gpus=1)) == "0 {}\n"
    for name in ("full", "a", "b"):
        ray, here = (tmp_path / run / "scores" / name / "results.json" for run in ("ray", "here"))
        assert ray.read_bytes() == here.read_bytes(), name
    notes = json.loads((tmp_path / "ray" / "run.json").read_text())["notes"]
    assert notes[-1].endswith("Ray tasks of one GPU each, 2 at a time")


@pytest.fixture
def cluster(tmp_path):
    """The address of a Ray cluster of two CPUs, started and ended as a process of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("ray")),
        "start",
        "--head",
        "--block",
        "--port",
        str(port),
        "--num-cpus",
        "2",
        "--node-ip-address",
        "127.0.0.1",
        "--include-dashboard",
        "false",
        "--disable-usage-stats",
    ]
    with (tmp_path / "ray.log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, cwd=tmp_path.parent
        )
    try:
        end = time.monotonic() + PATIENCE
        while (
            "runtime started" not in (tmp_path / "ray.log").read_text() and time.monotonic() < end
        ):
            assert process.poll() is None, (tmp_path / "ray.log").read_text()
            time.sleep(0.2)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.slow
@pytest.mark.timeout(3 * PATIENCE)
def test_score_and_ablate_share_a_cluster_by_its_address(
    cluster, make_folder, small_grid, tmp_path
):
    make_folder("a", 3, height=32, width=32)
    (tmp_path / "grid.yaml").write_text(
        yaml.safe_dump({**small_grid, "variants": small_grid["variants"][:1]})
    )
    sla2 = str(Path(sys.executable).with_name("sla2"))
    score = [sla2, "score", "--videos", "a", "--metrics", "temporal_flickering", "--json"]
    for arguments in (
        [*score, "--out", "one"],
        [*score, "--out", "cluster", "--num-workers", "2", "--ray-address", cluster],
        [sla2, "ablate", "--config", "grid.yaml", "--out", "grid", "--ray-address", cluster],
    ):
        done = subprocess.run(
            arguments, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "cluster" / "results.json").read_bytes() == (
        tmp_path / "one" / "results.json"
    ).read_bytes()
    run = json.loads((tmp_path / "grid" / "run.json").read_text())
    assert run["notes"][-1].endswith("Ray tasks of one CPU each, 2 at a time")
    assert (tmp_path / "grid" / "report" / "index.html").is_file()
    assert (
        json.loads((tmp_path / "grid" / "scores" / "a" / "results.json").read_text())["metrics"][
            "psnr"
        ]["mean"]
        > 0
    )
