# Everything runs in .venv, made from constraints.txt. `make help` lists the targets.
PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
AIC := $(BIN)/aicompress
BUILD := build

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test check format lint types dist bench-memory bench-streaming clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## make .venv with everything the project needs

$(READY): constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt --editable '.[dev]'
	@touch $@

test: $(READY) ## run the tests
	$(BIN)/python -m pytest -n 2

check: format lint types test ## what CI runs: format, lint, types, tests

format: $(READY)
	$(BIN)/ruff format --check .

lint: $(READY)
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

dist: $(READY) ## build the wheel
	$(BIN)/python -m build --wheel --outdir dist .

bench-memory: $(READY) ## peak memory of a calibrated step on a model of a billion parameters
	$(BIN)/python scripts/bench_memory.py --folder $(BUILD)/bench

bench-streaming: $(READY) ## time 4-bit quantization of a large model against cp
	$(BIN)/python scripts/bench_streaming.py --folder $(BUILD)/bench

clean: ## remove what make made, but not .venv
	rm -rf $(BUILD) dist .pytest_cache .mypy_cache .ruff_cache

include scripts/demo.mk
