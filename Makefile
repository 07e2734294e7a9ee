# make setup | demo | test | format | clean      (PYTHON=python3.12 make setup  chooses the interpreter)

OLD := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(or $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c '$(OLD)' 2>/dev/null && echo $$p && break; done),python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp

.DEFAULT_GOAL := setup
.PHONY: setup demo test format clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c '$(OLD)' 2>/dev/null || { \
		echo "fewstep needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1 | tail -n 1)."; \
		echo "Install a newer Python, or name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12"; exit 1; }
	@echo "Setting up $(VENV) (the first time takes some minutes)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@# for tests alone, and without the packages it asks for: what the tests need of them is in the extra dev
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps torchcfm -c constraints.txt || \
		echo "torchcfm could not be installed: the tests that need it will be skipped"
	@touch $@

demo: setup
	@$(BIN)/fewstep demo --out runs/demo

test: setup
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check . || { echo "formatting differs: run make format"; exit 1; }
	@$(BIN)/mypy --no-error-summary
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

format: setup
	@$(BIN)/ruff check --quiet --fix . || true
	@$(BIN)/ruff format --quiet .

clean:
	@rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
