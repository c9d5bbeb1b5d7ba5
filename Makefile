# Everything runs in .venv, made from constraints.txt. `make help` lists the targets.
# Distributions build Python with profile-guided optimization; as pyenv builds it, everything here takes a quarter longer.
PYTHON ?= $(shell for each in /usr/bin/python3 python3; do \
  $$each -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$each && exit; done; \
  echo python3)
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
AIC := $(BIN)/aicompress
BUILD := build
PEERS := $(BUILD)/bench-venv/.ready
BENCH ?=
DEEP ?=
SWEEP ?=

# Compiled modules are kept: without them every command of the demo would compile the package anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-fast coverage check format lint types dist clean
.PHONY: bench-peers bench-quantize bench-prune bench-streaming bench-memory bench-mnist bench-startup bench-loaded bench-drawn
.PHONY: bench-methods bench-factorize bench-distill bench-pack deep-compression records

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## make .venv with everything the project needs

$(READY): constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV) || $(PYTHON) -m venv --clear $(VENV)  # one of another Python is made anew
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt --editable '.[dev]'
	@touch $@

test: $(READY) ## run the tests
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-fast: $(READY) ## run the tests that run no model and start no process: less than a minute
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

coverage: $(READY) ## run the tests and print which lines none of them runs
	$(BIN)/python -m pytest -n 2 --dist worksteal --cov=aicompress --cov-report=term-missing:skip-covered

check: format lint types test ## what CI runs: format, lint, types, tests

format: $(READY)
	$(BIN)/ruff format --check .

lint: $(READY)
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

dist: $(READY) ## build the wheel
	$(BIN)/python -m build --wheel --outdir dist .

bench-peers: $(PEERS) ## make the venv of the peers that the benchmarks compare with

$(PEERS): scripts/bench/requirements.txt
	$(PYTHON) -m venv $(BUILD)/bench-venv
	$(BUILD)/bench-venv/bin/python -m pip install --quiet $(PIP_ARGS) $$(grep '^torch==' $<)
	$(BUILD)/bench-venv/bin/python -m pip install --quiet $(PIP_ARGS) --requirement $<
	@touch $@

# BENCH holds options, e.g. BENCH="--model M --calibration C.txt --text T.txt --minutes 9"; --help lists them.
bench-quantize: $(READY) $(PEERS) ## quantization beside llm-compressor, HQQ, quanto, auto-round, onnxruntime
	$(BIN)/python -m scripts.bench.quantize --folder $(BUILD)/bench $(BENCH)

bench-prune: $(READY) $(PEERS) ## pruning beside llm-compressor, torch and torch-pruning
	$(BIN)/python -m scripts.bench.prune --folder $(BUILD)/bench $(BENCH)

bench-streaming: $(READY) $(PEERS) ## time 4-bit quantization of a large model against cp
	$(BIN)/python -m scripts.bench.quantize --folder $(BUILD)/bench --parts streaming --skip-long $(BENCH)

bench-mnist: $(READY) ## channels and neurons pruned by weight and by gradient: BENCH="--data mnist.npz"
	$(BIN)/python -m scripts.bench.mnist --folder $(BUILD)/bench/mnist $(BENCH)

bench-drawn: $(READY) ## calibration on drawn tokens against real text: BENCH="--model M --calibration C.txt --text T.txt"
	$(BIN)/python -m scripts.bench.drawn --folder $(BUILD)/bench $(BENCH)

bench-methods: $(READY) ## every method for single weights on one model: BENCH="--model M --calibration C.txt --text T.txt"
	$(BIN)/python -m scripts.bench.methods --folder $(BUILD)/bench $(BENCH)

bench-factorize: $(READY) ## low rank beside plain and whitened SVD: BENCH="--model M --calibration C.txt --text T.txt"
	$(BIN)/python -m scripts.bench.factorize --folder $(BUILD)/bench $(BENCH)

bench-distill: $(READY) ## students, healing and stored outputs: BENCH="--model M --train C.txt --text T.txt --minutes 20 --seeds 3"
	$(BIN)/python -m scripts.bench.distill --folder $(BUILD)/bench $(BENCH)

bench-startup: $(READY) ## time of a step on a small input against that of its imports
	$(BIN)/python -m scripts.bench.startup --folder $(BUILD)/bench $(BENCH)

bench-loaded: $(READY) ## time of compressed models of three sizes against dense ones, by number of tokens
	$(BIN)/python -m scripts.bench.loaded --folder $(BUILD)/bench $(BENCH)

bench-pack: $(READY) ## size and speed of pack and unpack beside zstd and a copy: BENCH="--model M"
	$(BIN)/python -m scripts.bench.pack --folder $(BUILD)/bench $(BENCH)

bench-memory: $(READY) ## peak memory of a calibrated step on a model of a billion parameters
	$(BIN)/python -m scripts.bench.memory --folder $(BUILD)/bench

# LeNet-300-100 takes some 3 minutes of one processor a seed, LeNet-5 some 8 where other work shares it: three seeds of both
# take half an hour. A step whose output is there is not run again. DEEP="--data mnist.npz --network lenet-300-100 --seeds 1"
# runs a part.
deep-compression: $(READY) ## the chain of Deep Compression on two LeNets beside the paper: DEEP="--data mnist.npz"
	$(BIN)/python -m scripts.reproduce_deep_compression --folder $(BUILD)/lenet $(DEEP)

# As long, and 3 minutes more a seed; what `make deep-compression` has made is not made again. Encoders take 3 to 6 minutes.
records: $(READY) ## the smallest networks for an error: DEEP="--data mnist.npz", DEEP="--encoder M --pairs P.tsv" or both
	$(BIN)/python -m scripts.lenet.records --folder $(BUILD)/lenet $(DEEP)

# 50 to 60 minutes of one processor for all types, half of it for the structural steps (SWEEP="--steps quantize magnitude
# svd" leaves them out); SWEEP="--minutes 10" goes on with the types that are left, SWEEP=--again with faults, too.
sweep: $(READY) ## every model type of transformers through quantize, prune, factorize, verify and load
	$(BIN)/python -m scripts.sweep --folder $(BUILD)/sweep $(SWEEP)

clean: ## remove what make made, but not .venv
	rm -rf $(BUILD) dist .pytest_cache .mypy_cache .ruff_cache

include scripts/demo.mk
