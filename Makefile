# `make quickstart` and `make test` are all that a newcomer needs; both install what they use.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out/quickstart
STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev

.PHONY: quickstart install test test-slow test-browser test-sweeps lint format clean

quickstart: $(STAMP)
	$(BIN)/crate-ray quickstart --out $(OUT)

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11; use: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable . --constraint constraints.txt
	@touch $@

$(DEV_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --editable ".[dev]" --constraint constraints.txt
	@touch $@

test: $(DEV_STAMP) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2
	$(BIN)/python -m pytest -m "ray and not slow"

test-slow: $(DEV_STAMP)
	$(BIN)/python -m pytest -m "slow and not browser" --timeout 1800

test-sweeps: $(DEV_STAMP)
	$(BIN)/python -m pytest -m "ray and slow" tests/ray/test_shipped_sweeps_run.py

test-browser: $(DEV_STAMP)
	$(BIN)/python -m pytest -m browser --timeout 600

lint: $(DEV_STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(DEV_STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
