"""The three wheels: what is in them, and that they work where they are installed, away from the
checkout.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("sla2-kernels", "sla2-core", "sla2-eval")
# Of each package, some files that are not Python, so that a wheel of the code alone is noticed.
DATA = {
    "sla2-kernels": ("csrc/ptx.cuh", "csrc/sparse_fwd.cu", "emulator/include/cuda_names.h"),
    "sla2-core": ("py.typed",),
    "sla2-eval": (
        "report/templates/report.html",
        "tiny/weights/tiny-1k/transformer/diffusion_pytorch_model.safetensors",
        "tiny/weights/tiny-4k/transformer/diffusion_pytorch_model.safetensors",
    ),
}


def module_of(package: str) -> str:
    return package.replace("-", "_")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder of the three source distributions, and of the wheels built from those."""
    out = tmp_path_factory.mktemp("dist")
    for package in PACKAGES:
        build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out)]
        done = subprocess.run(
            [*build, str(ROOT / "packages" / package)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return out


def wheel(built: Path, package: str) -> Path:
    (found,) = built.glob(f"{module_of(package)}-*.whl")
    return found


def metadata(built: Path, package: str) -> Message:
    """The METADATA of a wheel; its payload is the README."""
    with zipfile.ZipFile(wheel(built, package)) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return message_from_bytes(archive.read(name))


def test_twine_finds_no_fault(built):
    files = [str(path) for path in sorted(built.iterdir())]
    assert len(files) == 6
    command = [sys.executable, "-m", "twine", "check", "--strict", *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_a_wheel_holds_every_file_of_its_package_and_no_other(package, built):
    source = ROOT / "packages" / package / "src"
    module = module_of(package)
    expected = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {f"{module}/{name}" for name in (*DATA[package], "py.typed")} <= expected
    with zipfile.ZipFile(wheel(built, package)) as archive:
        names = set(archive.namelist())
        information = {name for name in names if name.partition("/")[0].endswith(".dist-info")}
        (licence,) = (name for name in information if name.endswith("/licenses/LICENSE"))
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
    assert names - information == expected
    with tarfile.open(next(built.glob(f"{module}-*.tar.gz"))) as archive:
        assert [name for name in archive.getnames() if "/test" in name] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_metadata(package, built):
    found = metadata(built, package)
    assert found["License-Expression"] == "Apache-2.0"
    assert found["Author"] == "SLA2 contributors"
    assert (
        found.get_payload(decode=True) == (ROOT / "packages" / package / "README.md").read_bytes()
    )
    version = found["Version"]
    major, minor, *_ = map(int, version.split("."))
    siblings = [r for r in found.get_all("Requires-Dist") if r.startswith("sla2-")]
    siblings = [r for r in siblings if not r.startswith(f"{package}[")]  # its own extras
    bounds = f"<{major}.{minor + 1},>={major}.{minor}"
    assert all(r.endswith(bounds) for r in siblings), siblings
    assert len(siblings) == PACKAGES.index(package)


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """Runs a program of an environment in which the wheels are installed, in an empty folder.

    The libraries are those of the running environment: a .pth file leads to them, behind the
    wheels.
    """
    from installer import install
    from installer.destinations import SchemeDictionaryDestination
    from installer.sources import WheelFile

    home = tmp_path_factory.mktemp("installed")
    venv.create(home / "venv", symlinks=True)
    folders = {"base": str(home / "venv"), "platbase": str(home / "venv")}
    paths = sysconfig.get_paths("venv", folders)
    python = Path(paths["scripts"]) / "python"
    for package in PACKAGES:
        with WheelFile.open(wheel(built, package)) as source:
            install(source, SchemeDictionaryDestination(paths, str(python), "posix"), {})
    libraries = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (Path(paths["purelib"]) / "libraries.pth").write_text("\n".join(sorted(libraries)) + "\n")
    (elsewhere := home / "elsewhere").mkdir()
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "SLA2_", "COV_"))}
    env["SLA2_CACHE"] = str(home / "cache")

    def run(program: str, *arguments: str) -> str:
        command = [str(Path(paths["scripts"]) / program), *arguments]
        done = subprocess.run(command, cwd=elsewhere, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert list(elsewhere.iterdir()) == []
        return done.stdout

    return run


def test_the_commands_help_and_version(installed, built):
    assert "quickstart" in installed("sla2", "--help")
    assert metadata(built, "sla2-eval")["Version"] in installed("sla2", "--version")


def example(readme: str) -> str:
    """The README's lines on SLA2Attention, on 300 tokens instead of 4,096; they print the shape."""
    blocks = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    (code,) = (block for block in blocks if "SLA2Attention(" in block)
    assert "4096" in code
    return code.replace("4096", "300") + "print(tuple(out.shape), out.isfinite().all().item())\n"


# These two compile the CPU's kernels anew; `make test-wheels` runs the same.
@pytest.mark.slow
def test_the_readmes_lines_run_on_the_installed_packages(installed, built):
    shown = metadata(built, "sla2-core").get_payload(decode=True).decode()  # on its index page
    code = example((ROOT / "README.md").read_text()) + example(shown)
    modules = [module_of(package) for package in PACKAGES]
    code += f"import {', '.join(modules)}\n"
    code += f"print(*[m.__file__ for m in ({', '.join(modules)})], sep='\\n')"
    first, second, *files = installed("python", "-c", code).splitlines()
    assert (first, second) == ("(1, 12, 300, 128) True",) * 2
    assert all("site-packages" in file and str(ROOT) not in file for file in files)
    assert len(files) == len(PACKAGES)


@pytest.mark.slow
def test_the_doctor_finds_nothing_broken(installed):
    found = {entry["what"]: entry for entry in json.loads(installed("sla2", "doctor", "--json"))}
    assert found["backend cpu"]["status"] == "works"
    assert found["tiny model"]["status"] == "works"
