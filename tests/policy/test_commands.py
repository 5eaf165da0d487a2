"""The commands that documents print: those of `sla2` parse as they stand there, the files, tests,
make targets, modules and extras that others name exist, and the cheap ones run.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from sla2_eval.cli.main import sla2

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for part in ("*.md", "docs/*.md", "experiments/*/*.md", "packages/**/*.md")
    for path in ROOT.glob(part)
    if path.name != "CHANGELOG.md"  # it names what once was
)
MODULE = "-m sla2_eval.cli.main"  # how accelerate starts `sla2`
PROGRAMS = ("sla2", "pytest", "make", "python", "accelerate")
OURS = ("experiments/", "tests/", "benchmarks/", "packages/", "tools/")


def blocks(text: str) -> list[str]:
    """The lines of shell blocks: indented by four, or in fences without a language or of bash."""
    lines, language = [], None
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith("```"):
            language = line[3:] if language is None else None
        elif language in ("", "bash") or (language is None and line.startswith("    ")):
            lines.append(line.strip())
    return lines


def spans(text: str) -> list[str]:
    """What stands between backticks in a paragraph."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    prose = "\n".join(line for line in prose.splitlines() if not line.startswith("    "))
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def commands(of) -> list[tuple[str, str]]:
    """(page, command) of the programs above, from blocks or from spans."""
    found = []
    for page in PAGES:
        for line in of(page.read_text()):
            line = line.removeprefix(".venv/bin/")
            if line.split(" ")[0] in PROGRAMS and " " in line:
                found.append((str(page.relative_to(ROOT)), line))
    return found


def words_of(line: str) -> list[str]:
    """The words of a command, after accelerate's own where it starts `sla2`."""
    before, module, after = line.partition(MODULE)
    return shlex.split("sla2 " + after if module else before, comments=True)


BLOCKS, SPANS = commands(blocks), commands(spans)
PRINTED = [(page, line) for page, line in BLOCKS if words_of(line)[0] == "sla2"]
MENTIONED = [(page, line) for page, line in SPANS if words_of(line)[0] == "sla2"]


def alternatives(line: str) -> list[list[str]]:
    """What follows `sla2`: `sla2 train router | finetune` stands for two commands."""
    first, *others = [part.split("\0") for part in "\0".join(words_of(line)[1:]).split("\0|\0")]
    return [first, *([*first[:-1], *other] for other in others)]


def command_of(words: list[str]) -> tuple[click.Command, list[str]]:
    """The click command that `sla2 WORDS` calls, and its own words."""
    command: click.Command = sla2
    while isinstance(command, click.Group):
        while words and words[0].startswith("-"):
            words = words[1:]  # --debug, --help
        if not words or words[0].isupper():
            break  # a placeholder
        found = command.get_command(click.Context(command), words[0])
        assert found is not None, f"{command.name}: no command {words[0]!r}"
        command, words = found, words[1:]
    return command, words


def names_of(command: click.Command) -> set[str]:
    return {name for option in command.get_params(click.Context(command)) for name in option.opts}


def test_documents_print_commands():
    assert len(PRINTED) > 30
    assert len(MENTIONED) > 30


@pytest.mark.parametrize(("page", "line"), PRINTED)
def test_a_printed_command_parses(page, line):
    for words in alternatives(line):
        command, own = command_of(words)
        command.make_context(command.name, own)


@pytest.mark.parametrize(("page", "line"), MENTIONED)
def test_a_mentioned_command_has_these_options(page, line):
    for words in alternatives(line):
        command, own = command_of(words)
        options = {word.split("=")[0] for word in own if word.startswith("--")}
        assert options <= names_of(command) | names_of(sla2) | {"--help"}


@pytest.mark.parametrize(("page", "line"), BLOCKS + SPANS)
def test_what_a_command_names_exists(page, line):
    words = shlex.split(line, comments=True)
    for word in words:
        if word.startswith(OURS) and "$" not in word:
            assert (ROOT / word).exists() or (ROOT / Path(page).parent / word).exists(), word
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
        assert words[1] in targets
    if words[0] == "python" and words[1] == "-m":
        assert importlib.util.find_spec(words[2]) is not None
    if words[0] == "pytest" and "-k" in words:
        wanted = words[words.index("-k") + 1]
        assert any(wanted in (ROOT / word).read_text() for word in words if word.endswith(".py"))


def test_extras_that_are_named_exist():
    known = {}
    for name in ("sla2-kernels", "sla2-core", "sla2-eval"):
        project = tomllib.loads((ROOT / f"packages/{name}/pyproject.toml").read_text())["project"]
        known[name] = set(project["optional-dependencies"])
    for page in PAGES:
        for name, extras in re.findall(r"(sla2-\w+)\[([\w,]+)\]", page.read_text()):
            assert set(extras.split(",")) <= known[name], f"{page.name}: {name}[{extras}]"


@pytest.mark.parametrize("line", ["sla2 score --list", "sla2 bench --model"])
def test_a_cheap_command_runs(line, tmp_path, monkeypatch):
    assert line in {" ".join(words_of(printed)) for _, printed in PRINTED}
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(sla2, line.split()[1:], obj={})
    assert done.exit_code == 0, done.output
    assert len(done.output.splitlines()) > 5
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_commands_by_hand_of_the_quickstart_run(tmp_path):
    """As a shell runs them, with `sla2` and `python` those of this environment."""
    page = (ROOT / "docs/quickstart.md").read_text()
    (script,) = re.findall(r"^```bash\n(.*?)^```", page, flags=re.M | re.S)
    (tools := tmp_path / "tools").mkdir()
    for name, module in (("python", ""), ("sla2", " -m sla2_eval.cli.main")):
        (tools / name).write_text(f'#!/bin/sh\nexec {sys.executable}{module} "$@"\n')
        (tools / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-e", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs/scores/results.json").is_file()
    assert (tmp_path / "runs/scores/report/index.html").is_file()
