"""Which files begin. `make test` gives whole files to two processes, in the order of collection."""

from pathlib import Path

# What takes longest goes first, so that the small files fill the end of both processes. The first
# file compiles the CPU kernels, while the other process has files that do not use them: each would
# compile them for itself otherwise.
FIRST = (
    "core/test_functional.py",
    "kernels/test_gate.py",
    "kernels/test_compile.py",
    "core/test_limits.py",
    "core/backends/test_cuda_ops.py",
    "policy/test_one_file_an_idea.py",
    "core/integrations/test_two_processes.py",
    "eval/scoring/test_scoring_faults.py",
    "eval/scoring/test_metric_models.py",
    "policy/test_documents.py",
    "kernels/test_kernels_states.py",
    "kernels/test_kernels_hopper.py",
    "core/integrations/test_cuda_kernels.py",
    "core/integrations/test_compile.py",
    "eval/scoring/test_scoring.py",
    "core/training/stage2/test_stage2.py",
    "eval/grid/test_source.py",
    "kernels/test_kernels_matched.py",
)


def pytest_collection_modifyitems(items):
    places = {Path(__file__).parent / name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))
