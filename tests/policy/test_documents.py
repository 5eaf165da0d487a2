"""The code of the documents and the notebook runs as printed, and every page is on the site."""

import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from helpers import processes, worker_documents

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs/notebook.ipynb"
# tests/kernels/test_readme.py runs its code and checks what that gives.
OTHERS = {"packages/sla2-kernels/README.md"}
PAGES = sorted(
    str(path.relative_to(ROOT))
    for part in ("*.md", "docs/*.md", "experiments/*/*.md", "packages/**/*.md")
    for path in ROOT.glob(part)
)
WITH_CODE = [page for page in PAGES if "\n```python\n" in (ROOT / page).read_text()]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """{document: traceback or None}, all run in one process of their own."""
    out = tmp_path_factory.mktemp("documents") / "outcomes.json"
    documents = [page for page in WITH_CODE if page not in OTHERS]
    command = [sys.executable, worker_documents.__file__, str(out), *documents]
    env = processes.environment()
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("document", [page for page in WITH_CODE if page not in OTHERS])
def test_the_code_of_a_document_runs(document, outcomes):
    assert outcomes[document] is None, outcomes[document]


def test_python_stands_in_fenced_blocks():
    """What is only indented would not be run."""
    found = [
        f"{page}:{number}"
        for page in PAGES
        for number, line in enumerate((ROOT / page).read_text().splitlines(), 1)
        if re.match(r" {4}(from \w[\w.]* import|import \w+)", line)
    ]
    assert found == []


def test_every_page_is_in_the_nav_of_the_site():
    from tools.docs_site import documents

    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    left_out = {page for page in PAGES if page.startswith("packages/sla2-core/")}  # as the README
    left_out |= {page for page in PAGES if "/results/" in page}
    pages = {page.removeprefix("docs/") for page in PAGES}
    assert set(documents(nav)) == pages - left_out


def test_the_notebook_is_kept_without_what_it_printed():
    cells = [cell for cell in nbformat.read(NOTEBOOK, 4).cells if cell.cell_type == "code"]
    assert len(cells) > 5
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    from nbclient import NotebookClient

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, 4)
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, resources=where).execute()
    printed = notebook.cells[-1].outputs[-1].text.strip()
    assert "A random pipeline" in Path(printed).read_text()
