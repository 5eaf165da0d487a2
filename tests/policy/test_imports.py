"""Imports run one way: between the packages, and inside each package in the order that
data runs.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Each file may import those of earlier lines. A folder stands for its files, which may import each
# other.
ORDER = {
    "sla2_kernels": (
        """
        cache
        specs
        kernels
        artifacts
        sources
        compile
        emulator
        launch
        problem
        operator
        operator_backward
        cpu
    """
    ),
    "sla2_core": (
        """
        config
        checks
        block_map
        quantize
        ops
        cuda_ops
        softtopk
        router
        mixing
        reference
        streamed
        functional
        attention
        adapter
        cost
        integrations
        training/settings
        training/cache
        training/data
        training/objectives
        training/capture
        training/soft
        training/stage1_report
        training/stage1
        training/lora
        training/stage2_state
        training/stage2
    """
    ),
    "sla2_eval": (
        """
        intervals
        progress
        store
        folders
        manifest
        video
        dataset
        encoding
        tiny
        settings
        cluster
        processes
        ray_tasks
        generation
        variants
        pipeline
        weights
        metrics
        worker
        summary
        vbench
        pools
        scoring
        report_data
        report_charts
        report
        ablation
        estimate
        quickstart
        timing
        bench_cpu
        bench_paper
        doctor
        commands
        cli
    """
    ),
}
UPSTREAM = {
    "sla2_kernels": set(),
    "sla2_core": {"sla2_kernels"},
    "sla2_eval": {"sla2_core", "sla2_kernels"},
}
SCORING = {"ray", "av", "lpips", "torchmetrics", "open_clip", "torchvision", "matplotlib", "jinja2"}
FOREIGN = {  # third-party packages that a package must not know, wherever the import stands
    "sla2_kernels": {"torch", "diffusers", "transformers", "accelerate", "peft", *SCORING},
    "sla2_core": {"cupy", "numba", *SCORING},
    "sla2_eval": {"cupy", "numba"},
}


def imports(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, absolute dotted name) of every import, at module level or inside a function; `from a
    import b` is a.b.
    """
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; name the package"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def rank(package: str, parts: tuple[str, ...]) -> int | None:
    """Line of ORDER that covers the module `parts` (longest match), None if no line does."""
    lines = ORDER[package].split()
    for length in range(len(parts), 0, -1):
        if "/".join(parts[:length]) in lines:
            return lines.index("/".join(parts[:length]))
    return None


def violations(package: str, relative: Path, source: str) -> list[str]:
    """What the file `relative` of `package` imports against the order, one line each."""
    parts = relative.with_suffix("").parts
    folder_init = parts[-1] == "__init__"
    parts = parts[:-1] if folder_init else parts
    own = rank(package, parts)
    found = []
    if parts and own is None and not folder_init:
        found.append(f"{package}/{relative}: not in ORDER; give it its place there")
    for line, name in imports(ast.parse(source)):
        top, *rest = name.split(".")
        where = f"{package}/{relative}:{line}: imports {name}"
        if top in FOREIGN[package]:
            found.append(f"{where}, which {package} must not know")
        if (
            package == "sla2_core"
            and top in ("diffusers", "transformers")
            and parts[:1] != ("integrations",)
        ):
            found.append(f"{where} outside integrations/")
        if top in ORDER and top != package and top not in UPSTREAM[package]:
            found.append(f"{where}, against eval -> core -> kernels")
        if (
            package == "sla2_eval"
            and top == "sla2_kernels"
            and rest[:1]
            and rest[0] in ("cpu", "emulator", "launch")
        ):
            found.append(f"{where}, an internal of the kernels")
        if top == package and own is not None:
            other = rank(package, tuple(rest))
            if other is not None and other > own:
                found.append(f"{where}, which comes later in ORDER")
    return found


@pytest.mark.parametrize("package", list(ORDER))
def test_imports_run_one_way(package):
    source = next(ROOT.glob(f"packages/*/src/{package}"))
    found = []
    for path in sorted(source.rglob("*.py")):
        found += violations(package, path.relative_to(source), path.read_text())
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("package", "file", "source"),
    [
        ("sla2_kernels", "specs.py", "import torch"),
        ("sla2_kernels", "launch.py", "from sla2_core import config"),
        ("sla2_core", "config.py", "def f():\n    from sla2_core.attention import SLA2Attention"),
        ("sla2_core", "attention.py", "import diffusers"),
        ("sla2_core", "ops.py", "import sla2_eval.video"),
        ("sla2_core", "training/capture.py", "from sla2_core.training.stage1 import train"),
        ("sla2_core", "surprise.py", ""),
        ("sla2_eval", "video.py", "from sla2_eval import report"),
        ("sla2_eval", "report.py", "import sla2_kernels.cpu.linear"),
    ],
)
def test_a_wrong_import_is_found(package, file, source):
    assert len(violations(package, Path(file), source)) == 1


@pytest.mark.parametrize(
    ("package", "file", "source"),
    [
        ("sla2_core", "integrations/wan.py", "import diffusers"),
        ("sla2_core", "__init__.py", "from sla2_core.attention import SLA2Attention"),
        ("sla2_eval", "commands/score.py", "from sla2_eval.scoring import score"),
        ("sla2_eval", "quickstart.py", "from sla2_core.training.stage2 import finetune"),
    ],
)
def test_a_right_import_is_not(package, file, source):
    assert violations(package, Path(file), source) == []
