"""Every source file says what it is for and stays short; PTX has one header; no machine's paths are
committed.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("packages", "tests", "tools", "benchmarks", "experiments", ".ci")
TEXT = {
    ".py",
    ".md",
    ".toml",
    ".yaml",
    ".yml",
    ".json",
    ".jsonl",
    ".csv",
    ".txt",
    ".html",
    ".cu",
    ".cuh",
    ".h",
    ".cpp",
    "",
}
MACHINE_PATH = re.compile(
    r"(?<![\w.:/}\])-])/(?:" + "|".join(("work", "root", "home", "tmp", "Users")) + r")/\w"
)


def files(*suffixes: str) -> list[Path]:
    """Committed files with these suffixes (no hidden folder, bytecode or .git of a worktree)."""
    found = [
        path
        for path in ROOT.iterdir()
        if path.is_file() and path.suffix in suffixes and path.name not in ("uv.lock", ".git")
    ]
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and path.suffix in suffixes and "__pycache__" not in path.parts:
                found.append(path)
    return found


def test_every_python_file_begins_with_what_it_is_for():
    missing = [
        str(p.relative_to(ROOT))
        for p in files(".py")
        if not ast.get_docstring(ast.parse(p.read_text()))
    ]
    assert missing == []


def test_no_source_file_is_longer_than_600_lines():
    long = {
        str(p.relative_to(ROOT)): n
        for p in files(".py", ".cu", ".cuh")
        if (n := len(p.read_text().splitlines())) > 600
    }
    assert long == {}


def test_lines_of_cuda_and_c_sources_end_at_100_columns():
    """ruff holds Python's."""
    long = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in files(".cu", ".cuh", ".h", ".cpp", ".S")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > 100
    ]
    assert long == []


def test_inline_ptx_stands_in_one_header_a_target():
    headers = ("ptx.cuh", "ptx_sm90.cuh")
    kernels = [p for p in files(".cu", ".cuh", ".h") if p.name not in headers]
    assert [str(p.relative_to(ROOT)) for p in kernels if re.search(r"\basm\b", p.read_text())] == []


def test_no_machine_paths():
    found = []
    for path in files(*TEXT):
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if MACHINE_PATH.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == [], "\n".join(found)


def test_the_machine_path_pattern_sees_one():
    assert MACHINE_PATH.search("open('" + "/".join(("", "home", "me", "x.mp4")) + "')")
    assert not MACHINE_PATH.search("https://example.org/" + "home/page and runs/" + "tmp/x")
