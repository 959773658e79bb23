# `make demo`: from a clone to a trained, evaluated model. `make test`: the tests. `make lint`: style
# and types. `make bench`: the benchmarks, a quarter of an hour. `make slow`: what takes longer.
# A file in .venv marks each finished installation, so that it is not repeated.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUILD := pyproject.toml setup.py $(shell find csrc -type f)

.PHONY: demo test lint bench slow clean

demo: $(VENV)/installed-train
	$(BIN)/python -m medfast.train --method local --fused-loss

test: $(VENV)/installed-test
	$(BIN)/python -m pytest

bench: $(VENV)/installed-test
	$(BIN)/python -m pytest --benchmark-only
	$(BIN)/python -m benchmarks.errors
	$(BIN)/python -m benchmarks.loaders

slow: $(VENV)/installed-test
	$(BIN)/python -m pytest tests -m slow
	$(BIN)/python -m pytest --benchmark-only -m slow
	$(BIN)/python -m benchmarks.loaders --soak 20000

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed-train: $(BUILD) | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[train]'
	touch $@

$(VENV)/installed-test: $(BUILD) | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@ $(VENV)/installed-train

clean:
	rm -rf $(VENV) build *.egg-info medfast/*.so
