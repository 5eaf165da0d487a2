"""Worker processes: order by needs, the first error, a worker that dies once or always, and a
parent that dies.
"""

import os
import signal
import subprocess
import sys
import time

import pytest
from sla2_eval.parallel.processes import Task, TasksLost, Workers

JOBS = '''
"""Jobs of the tests."""
import os, time

def join(path, text, report):
    report(text, 1, 1)
    with open(path, "a") as file:
        file.write(text)
    return text

def fail(report):
    raise ValueError("expected better")

def die(report):
    os._exit(9)

def die_once(path, report):
    if not os.path.exists(path):
        open(path, "w").close()
        os.kill(os.getpid(), 9)
    return "the second time"

class Odd(Exception):
    def __init__(self, number, report):
        super().__init__(f"odd {number}")

def fail_oddly(report):
    raise Odd(3, report)

def note_pid_and_sleep(path, report):
    with open(path, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(120)
'''


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    (tmp_path / "sla2_test_jobs.py").write_text(JOBS)
    monkeypatch.syspath_prepend(tmp_path)
    yield "sla2_test_jobs"
    sys.modules.pop("sla2_test_jobs", None)


@pytest.mark.parametrize("count", [0, 2])
def test_tasks_wait_for_what_they_need(count, jobs, tmp_path):
    path, seen = tmp_path / "log", []
    tasks = {
        name: Task(f"{jobs}:join", {"path": str(path), "text": name}, needs)
        for name, needs in {"c": ("a", "b"), "b": ("a",), "a": ()}.items()
    }
    with Workers(count, report=lambda *event: seen.append(event)) as workers:
        assert workers.run(tasks) == {"a": "a", "b": "b", "c": "c"}
    assert path.read_text() == "abc"
    assert sorted(seen) == [("a", 1, 1), ("b", 1, 1), ("c", 1, 1)]


def test_needs_that_cannot_be_met():
    with Workers(0) as workers, pytest.raises(ValueError, match="'a' waiting for ever"):
        workers.run({"a": Task("m:f", {}, ("b",)), "b": Task("m:f", {}, ("a",))})


def test_errors_of_workers(jobs):
    with pytest.raises(ValueError, match="expected better"), Workers(1) as workers:
        workers.run({"failing": Task(f"{jobs}:fail", {})})
    with pytest.raises(RuntimeError, match="Odd: odd 3"), Workers(1) as workers:
        workers.run({"unpicklable": Task(f"{jobs}:fail_oddly", {})})


def test_a_task_whose_worker_dies_is_tried_twice_and_costs_only_what_needs_it(jobs, tmp_path):
    path, said = str(tmp_path / "log"), []
    tasks = {
        "poison": Task(f"{jobs}:die", {}),
        "unlucky": Task(f"{jobs}:die_once", {"path": str(tmp_path / "died")}),
        "a": Task(f"{jobs}:join", {"path": path, "text": "a"}, ("poison",)),
        "b": Task(f"{jobs}:join", {"path": path, "text": "b"}, ("a",)),
        "c": Task(f"{jobs}:join", {"path": path, "text": "c"}, ("unlucky",)),
    }
    with pytest.raises(
        TasksLost, match=r"^poison: its worker died 2 times \(exit code 9\); run again"
    ) as caught:
        with Workers(2, say=said.append) as workers:
            workers.run(tasks)
    assert caught.value.results == {"unlucky": "the second time", "c": "c"}
    assert caught.value.lost == {
        "poison": "its worker died 2 times (exit code 9)",
        "a": "needs poison, whose worker died",
        "b": "needs poison, whose worker died",
    }
    assert sorted(said) == [
        "poison: its worker died (exit code 9); trying it once more",
        "poison: its worker died 2 times (exit code 9); going on without it",
        "unlucky: its worker died (signal SIGKILL); trying it once more",
    ]


def test_workers_end_with_their_parent(jobs, tmp_path):
    pid_file = tmp_path / "pid"
    script = (
        "from sla2_eval.parallel.processes import Task, Workers\nif __name__ == '__main__':\n   "
        " with Workers(1) as workers:\n        workers.run({'a':"
        f" Task('{jobs}:note_pid_and_sleep', {{'path': {str(pid_file)!r}}})}})\n"
    )
    (tmp_path / "parent.py").write_text(script)
    parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py")])
    try:
        deadline = time.monotonic() + 120
        while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < deadline:
            time.sleep(0.1)
        worker = int(pid_file.read_text())
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker outlived its parent")
