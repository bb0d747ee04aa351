# Everything a user or a contributor types. Needs Python 3.11 or newer, git and make; the rest is set up in .venv.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.stylepipe-setup
JOBS   ?= 2

# `make demo` trains on drawn faces. DEMO_FLAGS replaces the settings, DEMO_ARGS adds to them (make demo DEMO_ARGS="--kimg 40").
DEMO_OUT   ?= runs/demo
DEMO_FLAGS ?= --res 64 --network.channel-base 2048 --network.channel-max 64 --batch-size 16 --loss.r1-gamma 1 --kimg 24 --grid-kimg 4 \
              --mirror --metrics-kimg 8 --metrics-images 1000 --tracker none --out $(DEMO_OUT)
DEMO_ARGS  ?=

# A CPU build of torch is a tenth of the CUDA build's download, and torchvision (which tests of metrics need) is to be of the same
# build. PIP_TORCH= (empty) takes what PyPI offers.
CPU_ONLY  := $(shell command -v nvidia-smi >/dev/null 2>&1 || echo yes)
PIP_TORCH ?= $(if $(CPU_ONLY),--extra-index-url https://download.pytorch.org/whl/cpu)

# `make gpu-check GPU_PYTHON=python3` uses a Python that has torch, pytest and stylepipe already, and sets up nothing: no network.
GPU_PYTHON ?=
GPU_RUN    := $(or $(GPU_PYTHON),$(BIN)/python)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint types gpu-check clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Create .venv with the pinned packages and stylepipe itself (done by every other target as well)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "stylepipe needs Python 3.11 or newer; '$(PYTHON)' is not ($$($(PYTHON) --version 2>&1 | head -n 1)): name another, as in make setup PYTHON=python3.12" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import torch; from importlib.metadata import version; version("torchvision")' 2>/dev/null || \
	  $(BIN)/pip install --quiet --no-deps --retries 0 -c constraints.txt $(PIP_TORCH) torch torchvision
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP) ## Train a small face model on drawn faces, a few minutes on any machine, and name the picture it made
	$(BIN)/accelerate launch $(if $(CPU_ONLY),--cpu) --num_processes 1 --num_machines 1 --mixed_precision no \
	  --dynamo_backend no --num_cpu_threads_per_process 1 launch/train.py $(DEMO_FLAGS) $(DEMO_ARGS)
	$(BIN)/stylepipe report $(DEMO_OUT)
	@echo "Look at $$(ls $(DEMO_OUT)/grids/[0-9]*.png | tail -n 1), or open $(DEMO_OUT)/report.html in a browser"

test: lint ## Lint, then the quick tests with coverage
	$(BIN)/pytest -m "not slow and not gpu" -n $(JOBS) --cov --cov-report=term

test-all: lint ## Lint, then every test (those marked gpu are skipped without a CUDA device); adds NVRTC to .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[nvrtc]'
	$(BIN)/pytest -n $(JOBS) --cov --cov-report=term

lint: types ## Check style, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check

# mypy reads files, not import hooks: give it the tree that an install makes.
types: $(STAMP)
	@rm -rf build/types && mkdir -p build/types/stylepipe
	@ln -s $(CURDIR)/stylepipe/* $(CURDIR)/kernels $(CURDIR)/datasets build/types/stylepipe/
	$(BIN)/mypy build/types/stylepipe launch/*.py

# Compiles into a cache of its own, so that the seconds are those of a first time. nvcc may be missing (NVRTC comes with torch),
# and what doctor finds stops nothing. Each part has a limit; together they stay under 8 minutes.
gpu-check: export STYLEPIPE_KERNEL_CACHE := $(CURDIR)/build/gpu-check/kernels
gpu-check: $(if $(GPU_PYTHON),,$(STAMP)) ## All that needs a CUDA device: builds, tests, sanitizers, benchmarks of ops and steps; under 8 minutes
	rm -rf build/gpu-check && mkdir -p build/gpu-check
	timeout 30 $(GPU_RUN) -m stylepipe kernels build --compiler nvrtc
	-timeout 30 $(GPU_RUN) -m stylepipe kernels build --compiler nvcc
	-timeout 15 $(GPU_RUN) -m stylepipe doctor
	timeout 230 $(GPU_RUN) -m pytest tests/gpu
	timeout 70 $(GPU_RUN) -m stylepipe bench ops --json build/gpu-check/ops.json
	timeout 25 $(GPU_RUN) -m stylepipe bench ops --dtype float32 --no-compile --res 256 1024 --batch-size 8 --json build/gpu-check/ops-float32.json
	timeout 20 $(GPU_RUN) -m stylepipe bench bytes --json build/gpu-check/bytes.json
	timeout 25 $(GPU_RUN) -m stylepipe bench step --res 256 --preset paper256 --batch-gpu 32 --json build/gpu-check/step-256.json
	timeout 35 $(GPU_RUN) -m stylepipe bench step --res 1024 --preset stylegan2 --batch-gpu 16 --json build/gpu-check/step-1024.json

clean: ## Remove what the targets made, .venv and the demo's run included; other runs stay
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .coverage .coverage.* $(DEMO_OUT)
	find . -name __pycache__ -prune -exec rm -rf {} +
