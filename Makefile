# The workspace's commands. Each sets up .venv from uv.lock first, and does nothing twice. Libraries are compiled to
# bytecode once: where Python may not write it ($PYTHONDONTWRITEBYTECODE), each process would compile torch again.
.PHONY: setup quickstart test test-full test-wheels lint docs gpu-check

PYTHON ?= python3
# The uv that is installed and runs, else one that pip puts into .cache/uv (--target: allowed in externally managed Pythons).
UV := $(shell uv --version >/dev/null 2>&1 && command -v uv || echo .cache/uv/bin/uv)
READY := .venv/.synced
# Two processes share the tests, file by file, each with one thread of torch's: two each would wait for one another.
# tests/conftest.py says which files go first.
PYTEST := OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

setup: $(READY)

quickstart: $(READY)
	.venv/bin/sla2 quickstart

test: $(READY)
	$(PYTEST) -m "not slow and not gpu"

test-full: $(READY)
	$(PYTEST) -m "not gpu"

# The wheels in a fresh environment for each Python: versions that uv finds or fetches, or paths.
PYTHONS ?= 3.11 3.12 3.13
test-wheels: $(READY)
	UV="$(abspath $(UV))" $(PYTHON) tools/try_wheels.py $(PYTHONS)

lint: $(READY)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/lint-imports --no-cache
	.venv/bin/mypy

# The documentation as a site, in site/. Its notice about mkdocs' future is not about this project.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

# Needs a GPU and a python3 with torch, numpy, click and CuPy; where pytest is missing, pip puts it into .cache.
gpu-check:
	$(PYTHON) tools/gpu_check.py

$(READY): uv.lock pyproject.toml $(wildcard packages/*/pyproject.toml)
	$(UV) --version >/dev/null 2>&1 || $(PYTHON) -m pip install --quiet --target .cache/uv --upgrade uv
	$(UV) sync --frozen --all-packages --compile-bytecode
	touch $@
