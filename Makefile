# All commands, from a fresh clone with Python 3.11+ and make. Each command sets up first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export TZ := UTC

.PHONY: demo test test-newest fuzz check audit lint format types imports up bench chaos clean

demo: $(READY)
	$(BIN)/warmscale demo

# The tests of a file stay in the same process, because they share a database, an API and Ray. Files run
# in the order of their names: the long files of tests/flow come first. By default pytest-xdist would
# run files with few tests last.
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# The suite against the newest version of every dependency, in a virtual environment of its own. The
# second installation lifts the upper bounds of pyproject.toml; pip prints a conflict and goes on.
NEWEST := .venv-newest
test-newest:
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/pip install --quiet --upgrade --upgrade-strategy eager --editable ".[dev]"
	$(NEWEST)/bin/pip install --quiet --upgrade --upgrade-strategy eager optuna "ray[train]"
	$(NEWEST)/bin/pip list
	$(NEWEST)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# schemathesis on a live service, with CASES cases for each call and phase: 200 take 7 to 15 minutes.
CASES ?= 200
fuzz: $(READY)
	WARMSCALE_FUZZ_EXAMPLES=$(CASES) $(BIN)/python -m pytest -q -s tests/service/test_openapi.py -k does_not_say

check: lint types imports

# Fails on a known vulnerability. If the advisories cannot be reached, it prints that and passes.
audit: $(READY)
	$(BIN)/python .ci/audit.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY)
	$(BIN)/pyright

imports: $(READY)
	$(BIN)/lint-imports

up: $(READY)
	$(BIN)/warmscale up

bench: $(READY)
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

SEED ?= 1
MINUTES ?= 20
chaos: $(READY)
	$(BIN)/python -m benchmarks.chaos --seed $(SEED) --minutes $(MINUTES) --append benchmarks/chaos.md

# torch is installed first and pinned: pip then chooses a small CPU build if the index offers it.
# An installed torch (of a GPU machine) is kept.
$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) $(NEWEST) .pytest_cache .ruff_cache .import_linter_cache .hypothesis
