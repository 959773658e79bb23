# `make demo`: from a clone to a trained, evaluated model. `make test`: the tests. `make lint`: style
# and types. `make bench`: the benchmarks, a quarter of an hour. `make slow`: what takes longer.
# `make suite`: all 25 evaluations on phantoms in their layouts.
# A file in .venv marks each finished installation, so that it is not repeated.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Small tests run better side by side than with threads.
JOBS ?= 2
BUILD := pyproject.toml setup.py $(shell find csrc -type f)

.PHONY: demo test lint bench slow suite clean

demo: $(VENV)/installed-train
	$(BIN)/python -m medfast.train --method local --fused-loss

# The demo runs by itself: it takes all cores, and its time is asked.
test: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "not demo"
	$(BIN)/python -m pytest -m demo

bench: $(VENV)/installed-test
	$(BIN)/python -m pytest --benchmark-only
	$(BIN)/python -m benchmarks.errors
	$(BIN)/python -m benchmarks.loaders

suite: $(VENV)/installed-test
	$(BIN)/python -m benchmarks.suite

slow: $(VENV)/installed-test suite
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
