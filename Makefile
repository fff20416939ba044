# make demo    load a checkpoint over a local Ray from disk and from S3, and prove every slice
# make check   lint, types and the quick tests
# make test    lint, types and the test suite, but for oracles and slow tests
# make test-slow  the slow tests: more ranks, replicas and nodes over Ray
# make test-oracles  every model family against other people's loaders
# make test-vllm  what vLLM's own loaders and engine make of it, in an environment of its own (3.8 GB)
# make bench   side by side with other ways to load; BENCH_ARGS=--write-docs writes docs/bench
# make bench-all  besides, the benchmarks of single questions
# make simulate  cold starts on up to 1,024 nodes, simulated and checked with small loads: docs/cold_starts.md
# make gpu-check  what this project does on a GPU of this machine: right, how fast, and next to whom
# make docs    pages that are made from the sources
# make clean   what the above left, but for the sources
#
# Needs Linux, Python 3.11 or newer and pip. Everything goes into $(VENV); versions are those of constraints.txt.
# Other package sources, such as torch without CUDA: make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
VENV_VLLM ?= .venv-vllm
PIP_ARGS ?=
DEMO_ARGS ?=
GPU_CHECK_ARGS ?=
BENCH_ARGS ?=
PYTEST_ARGS ?=

# Without Ray, S3 servers and processes of their own.
QUICK_TESTS := $(addprefix tests/,capture checkpoint planning sharding slices staging test_architecture.py test_errors.py \
	test_settings.py)

BIN := $(VENV)/bin
# What is imported is compiled then; most of what is installed never is.
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile $(PIP_ARGS) -c constraints.txt

# Hundreds of processes import this package and its libraries: none should compile them anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo lint check test test-slow test-oracles test-vllm bench bench-all simulate gpu-check azurite docs clean

demo: $(VENV)/.demo-installed
	$(BIN)/ray-streamer demo $(DEMO_ARGS)

lint: $(VENV)/.test-installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright --pythonpath $(BIN)/python

check: lint
	$(BIN)/python -m pytest -m "not oracle and not slow" $(QUICK_TESTS) $(PYTEST_ARGS)

# Many tests wait for others to fail or to come, so three processes keep two cores busy.
test: lint
	$(BIN)/python -m pytest -n 3 -m "not oracle and not slow" $(PYTEST_ARGS)

# With Ray Serve and the dashboard, which make every start of Ray slower.
test-slow: $(VENV)/.test-installed $(VENV)/.serve-installed $(VENV)/.report-installed
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

test-oracles: $(VENV)/.test-installed
	$(BIN)/python -m pytest -m oracle $(PYTEST_ARGS)

test-vllm: $(VENV_VLLM)/.installed
	$(VENV_VLLM)/bin/python -m pytest tests/vllm $(PYTEST_ARGS)

bench: $(VENV)/.test-installed $(VENV)/.bench-installed
	$(BIN)/python benchmarks/compare.py $(BENCH_ARGS)

bench-all: bench
	$(BIN)/python benchmarks/plan_deepseek.py
	$(BIN)/python benchmarks/plan_from_headers.py
	$(BIN)/python benchmarks/s3_clients.py
	$(BIN)/python benchmarks/request_counts.py
	$(BIN)/python benchmarks/body_path.py
	$(BIN)/python benchmarks/faults.py
	$(BIN)/python benchmarks/s3_shape.py
	$(BIN)/python benchmarks/other_stores.py
	$(BIN)/python benchmarks/transformers_tp.py
	$(BIN)/python benchmarks/verdict.py

simulate: $(VENV)/.test-installed $(VENV)/.bench-installed
	$(BIN)/python benchmarks/simulate.py --measure --write-docs docs

# Installs nothing: a GPU machine has its own torch, and may have no way to the package index.
gpu-check:
	PYTHONPATH=. $(or $(wildcard $(BIN)/python),python3) benchmarks/gpu_check $(GPU_CHECK_ARGS)

# Azure's emulator, for the tests of its contract.
azurite:
	npm install --no-save --no-audit --no-fund azurite

docs: $(VENV)/.test-installed
	$(BIN)/python docs/write_settings.py
	$(BIN)/python docs/write_families.py
	$(BIN)/python docs/write_stores.py
	$(BIN)/python docs/write_architecture.py
	$(BIN)/python benchmarks/plan_layouts.py > docs/plans.md

# Debian's python3 makes an environment without pip unless python3-venv is installed; its own pip then fills it.
$(BIN)/python:
	@echo "making $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) \
		&& $(PYTHON) -m pip --python $(VENV)/bin/python install --quiet pip; }

# The stamp is newer than what decides the installation, so that nothing is installed twice.
$(VENV)/.%-installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV)"
	$(INSTALL) --editable ".[$*]"
	@touch $@

$(VENV_VLLM)/.installed: pyproject.toml constraints-vllm.txt tests/vllm/make_environment.py
	@echo "installing vLLM into $(VENV_VLLM)"
	$(PYTHON) tests/vllm/make_environment.py $(VENV_VLLM) constraints-vllm.txt $(PIP_ARGS)
	@touch $@

clean:
	rm -rf $(VENV) $(VENV_VLLM) .demo build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
