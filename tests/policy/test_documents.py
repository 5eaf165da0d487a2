"""The code of the documents runs as printed, each document in a process of its own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import processes

ROOT = Path(__file__).parents[2]


def code_of(document: str) -> list[str]:
    """Its Python blocks, in order."""
    text = (ROOT / document).read_text()
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize(
    ("document", "count"),
    [
        ("docs/integrating.md", 7),
        ("docs/extending.md", 3),
        ("docs/training.md", 1),
        ("docs/complements.md", 1),
    ],
)
def test_the_code_of_a_document_runs(document, count, tmp_path):
    blocks = code_of(document)
    assert len(blocks) == count
    script = tmp_path / "document.py"
    script.write_text("\n".join(blocks))
    command = [sys.executable, str(script)]
    env = processes.environment()
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{document}: {done.stderr[-2000:]}"


def test_the_readme_s_lines_on_one_s_own_model_run():
    names: dict = {}
    exec(compile(code_of("README.md")[0].replace("4096", "400"), "README.md", "exec"), names)
    assert names["out"].shape == (1, 12, 400, 128)
