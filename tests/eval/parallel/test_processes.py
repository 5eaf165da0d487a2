"""The pool of processes: order by needs, the first error, a worker that dies once, always or
between two tasks, and a parent that dies.
"""

import os
import signal
import subprocess
import sys
import time

import pytest
from sla2_eval.parallel.processes import ProcessPool, ThisProcess
from sla2_eval.parallel.tasks import Task, TasksLost, WorkerDied

JOBS = '''
"""Jobs of the tests."""
import os, sys, time

calls = 0

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

def count_calls(report):
    global calls
    calls += 1
    print("not among the results")
    return os.getpid(), calls

def leave(report):
    sys.exit("enough of this")

def threads(report):
    import torch
    return torch.get_num_threads()

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

    def report(*event):
        seen.append(event)

    pool = ProcessPool(count, report=report) if count else ThisProcess(report=report)
    assert pool.free() == max(1, count)
    with pool:
        assert pool.run(tasks) == {"a": "a", "b": "b", "c": "c"}
    assert path.read_text() == "abc"
    assert sorted(seen) == [("a", 1, 1), ("b", 1, 1), ("c", 1, 1)]


def test_needs_that_cannot_be_met():
    with ThisProcess() as pool, pytest.raises(ValueError, match="'a' waiting for ever"):
        pool.run({"a": Task("m:f", {}, ("b",)), "b": Task("m:f", {}, ("a",))})


def test_errors_of_workers(jobs):
    with pytest.raises(ValueError, match="expected better"), ProcessPool(1) as pool:
        pool.run({"failing": Task(f"{jobs}:fail", {})})
    with pytest.raises(RuntimeError, match="Odd: odd 3"), ProcessPool(1) as pool:
        pool.run({"unpicklable": Task(f"{jobs}:fail_oddly", {})})


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
        with ProcessPool(2, say=said.append) as pool:
            pool.run(tasks)
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


def outcome(pool, task: Task) -> object:
    pool.submit("task", task)
    return pool.wait()[1]


def test_a_worker_keeps_its_modules_between_tasks_and_prints_nothing_among_results(jobs, capfd):
    with ProcessPool(1) as pool:
        pid, calls = outcome(pool, Task(f"{jobs}:count_calls", {}))
        assert outcome(pool, Task(f"{jobs}:count_calls", {})) == (pid, calls + 1)
    assert pid != os.getpid()
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", 2 * "not among the results\n")


def test_a_worker_killed_between_two_tasks_is_replaced(jobs):
    with ProcessPool(1) as pool:
        pid, _ = outcome(pool, Task(f"{jobs}:count_calls", {}))
        os.kill(pid, signal.SIGKILL)
        found = outcome(pool, Task(f"{jobs}:count_calls", {}))
        if isinstance(found, WorkerDied):  # it was given the task before it was known to be dead
            assert str(found) == "signal SIGKILL"
            found = outcome(pool, Task(f"{jobs}:count_calls", {}))
        other, calls = found
    assert other != pid
    assert calls == 1


def test_a_task_that_exits_ends_its_worker_and_says_why(jobs, capfd):
    with ProcessPool(1) as pool:
        assert str(outcome(pool, Task(f"{jobs}:leave", {}))) == "exit code 1"
    assert capfd.readouterr().err == "enough of this\n"


@pytest.mark.slow
def test_a_worker_computes_on_one_thread_and_this_process_keeps_its_own(jobs):
    before = dict(os.environ)
    with ProcessPool(1) as pool:
        assert outcome(pool, Task(f"{jobs}:threads", {})) == 1
        assert dict(os.environ) == before


def test_a_script_without_a_guard_is_not_run_again_in_its_workers(jobs, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from sla2_eval.parallel.processes import ProcessPool\n"
        "from sla2_eval.parallel.tasks import Task\n"
        "print('once', flush=True)\n"
        "with ProcessPool(1) as pool:\n"
        f"    print(pool.run({{'a': Task('{jobs}:count_calls', {{}})}})['a'][1])\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.stdout == "once\n1\n", done.stderr


def test_running_tasks_are_ended_with_the_block(jobs, tmp_path):
    pid_file = tmp_path / "pid"
    with ProcessPool(1) as pool:
        pool.submit("long", Task(f"{jobs}:note_pid_and_sleep", {"path": str(pid_file)}))
        deadline = time.monotonic() + 120
        while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


def test_workers_end_with_their_parent(jobs, tmp_path):
    pid_file = tmp_path / "pid"
    script = (
        "from sla2_eval.parallel.processes import ProcessPool\n"
        "from sla2_eval.parallel.tasks import Task\n"
        "with ProcessPool(1) as pool:\n"
        f"    pool.run({{'a': Task('{jobs}:note_pid_and_sleep', {{'path': {str(pid_file)!r}}})}})\n"
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
