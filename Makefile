# make test | lint | format | bench | chaos | demo | clean. Needs nothing but Python 3.11 or newer with its venv
# module: everything else goes into .venv. Another interpreter: make test PYTHON=/path/to/python

# The newest interpreter that can make a virtual environment (Debian packages ensurepip apart).
CAN_VENV = import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
ifndef PYTHON
PYTHON := $(shell for python in python3.13 python3.12 python3.11 python3; do \
	"$$python" -c '$(CAN_VENV)' 2>/dev/null && { echo "$$python"; break; }; done)
endif

VENV := .venv
BIN := $(VENV)/bin
# In CI the log is read later, not watched.
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

.PHONY: test lint format bench chaos demo clean
.DEFAULT_GOAL := test

test: lint
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

lint: $(VENV)/dev-installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(VENV)/dev-installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# make chaos ARGS="--database mysql --seconds 1200"
chaos: $(VENV)/dev-installed
	$(BIN)/python -m tests.chaos $(ARGS)

# Every question, which takes hours; one of them: .venv/bin/python -m benchmarks.limit
bench: $(VENV)/dev-installed
	$(BIN)/python -m benchmarks --write $(ARGS)

demo: $(VENV)/demo-installed
	$(BIN)/python examples/quickstart/demo.py $(ARGS)

clean:
	rm -rf .venv .venv-oldest build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp for each set of dependencies: pip runs again only when pyproject.toml has changed.
$(VENV)/%-installed: pyproject.toml | $(BIN)/python
	$(PIP) install --editable . --group $*
	@touch $@

# Dependency groups need pip 25.1; the one bundled with Python is often older.
$(BIN)/python:
	@"$(PYTHON)" -c '$(CAN_VENV)' 2>/dev/null || { \
		echo 'No Python 3.11 or newer with venv and ensurepip was found.' >&2; \
		echo 'On Debian and Ubuntu: apt-get install python3 python3-venv' >&2; \
		echo 'Or name an interpreter: make PYTHON=/path/to/python3.12' >&2; \
		exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	$(PIP) install --upgrade 'pip>=25.1' || { rm -rf $(VENV); exit 1; }
