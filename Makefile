# Two commands: `make demo` and `make test`. Each builds what it needs in .venv, from pinned versions.

PYTHON ?= python3
BIN := .venv/bin
# Two processes that spin on both cores slow each other down many times over.
export OMP_WAIT_POLICY = PASSIVE

.PHONY: demo test lint bench clean

demo: .venv/installed
	$(BIN)/ireasoner demo

test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

lint: .venv/installed-dev
	$(BIN)/ruff check src tests
	$(BIN)/ruff format --check src tests
	$(BIN)/pyright

bench: .venv/installed
	$(BIN)/ireasoner bench

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'ireasoner needs Python 3.11 or newer: make PYTHON=python3.11')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	touch $@

clean:
	rm -rf .venv
