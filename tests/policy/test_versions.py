"""One version: in each package, in the citation, and at the head of the changelog's releases."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import sla2_core
import yaml

ROOT = Path(__file__).parents[2]


def test_there_is_one_version():
    projects = [ROOT / "pyproject.toml", *sorted((ROOT / "packages").glob("*/pyproject.toml"))]
    versions = {
        str(path.relative_to(ROOT)): tomllib.loads(path.read_text())["project"]["version"]
        for path in projects
    }
    assert len(versions) == 4
    versions["sla2_core.__version__"] = sla2_core.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    versions["CITATION.cff"] = citation["version"]
    releases = re.findall(r"^## \[(\d.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    versions["CHANGELOG.md"] = releases[0]
    assert len(set(versions.values())) == 1, versions
