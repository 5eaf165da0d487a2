"""Uses the three wheels as a stranger would, in a fresh environment for each Python: the README's
code, `sla2 --version`, and `sla2 doctor`, which runs every backend that is there.

    python tools/try_wheels.py 3.11 3.12 3.13        # versions, or paths of interpreters

Needs uv, which downloads what it has not kept: several GB. UV names another uv than the one on the
path. Ends with 1 if anything fails, a Python that cannot be had included.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
UV = os.environ.get("UV", "uv")
WHERE = "import sla2_core, platform; print(platform.python_version(), sla2_core.__file__)"


class Failed(Exception):
    """A command ended badly; the text says which, and how."""


def run(*command: object, folder: Path, **environment: str) -> str:
    """The standard output of a command, which sees no package of the checkout."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "SLA2_", "VIRTUAL"))}
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=folder, env=kept | environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()[-15:]
        raise Failed("\n".join([f"exit {done.returncode}: {' '.join(words)}", *said]))
    return done.stdout


def build(dist: Path) -> list[Path]:
    run(UV, "build", "--all-packages", "--wheel", "--out-dir", dist, ROOT, folder=ROOT)
    return sorted(dist.glob("*.whl"))


def use(python: str, wheels: list[Path], folder: Path) -> str:
    """Install the wheels for one Python and use them: what was found, in a line.

    Args:
        python: as uv takes it, a version or a path. folder: empty.

    Raises:
        Failed: a command failed, or the README's code did.
    """
    home, elsewhere = folder / "environment", folder / "elsewhere"
    elsewhere.mkdir(parents=True)
    run(UV, "venv", "--python", python, home, folder=elsewhere)
    interpreter, cache = home / "bin/python", {"SLA2_CACHE": str(folder / "cache")}
    run(UV, "pip", "install", "--python", interpreter, *wheels, folder=elsewhere)
    version, where = run(interpreter, "-c", WHERE, folder=elsewhere).split()
    if not Path(where).is_relative_to(home):
        raise Failed(f"sla2_core: expected that of {home}, got {where}")
    release = run(home / "bin/sla2", "--version", folder=elsewhere).strip()
    checks = json.loads(run(home / "bin/sla2", "doctor", "--json", folder=elsewhere, **cache))
    works = sum(check["status"] == "works" for check in checks)
    # The code of a document needs the stand-ins of the tests for published weights.
    outcomes = folder / "outcomes.json"
    worker = ROOT / "tests/helpers/worker_documents.py"
    given = cache | {"PYTHONPATH": str(ROOT / "tests")}
    run(interpreter, worker, outcomes, "README.md", folder=elsewhere, **given)
    if error := json.loads(outcomes.read_text())["README.md"]:
        raise Failed(f"the README's code:\n{error}")
    return f"Python {version}: {release}, README runs, doctor: {works} of {len(checks)} work"


def main(pythons: list[str]) -> int:
    """The exit status; one line for each Python is printed."""
    failures = 0
    with tempfile.TemporaryDirectory(prefix="sla2-wheels-") as home:
        wheels = build(Path(home) / "dist")
        for number, python in enumerate(pythons):
            try:
                print(use(python, wheels, Path(home) / str(number)), flush=True)
            except Failed as error:
                failures += 1
                print(f"Python {python}: {error}", flush=True)
    print(f"{len(pythons) - failures} passed, {failures} failed")
    return 1 if failures or not pythons else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
