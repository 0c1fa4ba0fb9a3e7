# Everything is set up with pip under constraints.txt; `make demo` and `make test` do all of it on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PYTHONUTF8 = 1
WORKERS ?= 2

.PHONY: setup demo test check format bench clean

setup: $(STAMP)

# The stamp holds what was installed, so an unchanged set-up costs nothing and a changed pin is seen.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

demo: setup
	$(BIN)/kilter demo

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_structure.py

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Kilter beside TRL: OMP threads and cores are the benchmark's own affair.
bench: setup
	$(BIN)/python bench/preferences.py --method dpo
	$(BIN)/python bench/preferences.py --method sft
	$(BIN)/python bench/preferences.py --method reward

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
