"""The environment of the original VBench: made by uv, whose every exit code counts."""

import json

import pytest
from sla2_eval.cli.main import main
from sla2_eval.scoring.vbench_environment import environment, ready_for, setup

UV = """#!/bin/sh
echo "$*" >> {log}
case "$*" in
    *{failing}*) exit 3;;
    *freeze*) echo vbench==0.1.5; grep -q no-build-isolation {log} && echo "detectron2 @ git+x";;
esac
exit 0
"""


@pytest.fixture
def uv(tmp_path, monkeypatch):
    """A function that puts a uv on the path, which notes its calls and fails at one of them."""
    monkeypatch.setenv("SLA2_CACHE", str(tmp_path / "cache"))

    def put(failing: str = "nothing"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        command, log = tmp_path / "bin" / "uv", tmp_path / "log.txt"
        command.write_text(UV.format(log=log, failing=failing))
        command.chmod(0o755)
        log.write_text("")
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
        return log

    return put


def test_setup_makes_an_environment_of_its_own(uv, capsys):
    log = uv()
    assert main(["vbench", "--setup", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {"environment": str(environment()), "packages": 2}
    ]
    calls = log.read_text().splitlines()
    assert calls[0] == f"venv --quiet --clear --python 3.11 {environment()}"
    assert "vbench==0.1.5 torch==2.5.1" in calls[1]
    assert "--no-build-isolation detectron2 @ git" in calls[3]
    assert ready_for(["color"]) == environment() / "bin" / "python"


@pytest.mark.parametrize("step", ["venv --quiet", "vbench==", "freeze"])
def test_a_step_that_fails_leaves_no_environment(uv, step):
    uv()
    setup()
    uv(failing=f'"{step}"')
    with pytest.raises(RuntimeError, match=r"vbench: uv .*: expected exit code 0, got 3"):
        setup()
    with pytest.raises(RuntimeError, match=r"expected its environment in .* got none"):
        ready_for(["human_action"])


def test_without_detectron2_the_other_dimensions_run(uv):
    uv(failing="no-build-isolation")
    with pytest.raises(RuntimeError, match=r"all dimensions but object_class, .* run without it"):
        setup()
    ready_for(["human_action"])
    with pytest.raises(RuntimeError, match=r"expected detectron2 in .* for color"):
        ready_for(["human_action", "color"])


def test_without_uv_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"expected uv on the path \(pip install uv\), got none"):
        setup()
