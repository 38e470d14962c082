# Everything runs in .venv, which is made on first use and follows the files that describe it.
PYTHON ?= python3
# More arguments for pip, for example another index with CPU builds of torch:
# make test PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_ARGS ?=
# More arguments for the program that a target runs: make test ARGS="-k token -x"
ARGS ?=
# Processes that run tests
JOBS ?= auto
# Interpreters that `make wheels` builds for
PYTHONS ?= $(PYTHON)
# Targets of compile-check and cuda-gates: make compile-check ARCH="sm_80 sm_90"
ARCH ?= all

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --require-virtualenv
DOCS_VENV := .venv-docs
OLDEST_TRITON := 3.6.0
OLDEST_TRITON_DIR := $(VENV)/triton-$(OLDEST_TRITON)
CSRC = $(shell find csrc tests/cuda_on_host tests/cpu_kernels -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh' 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help demo test lint format bench bench-cpu cpu cuda cuda-gates accuracy-by-chance planted mutants fuzz soak coverage compile-check compile-check-oldest gpu-day docs hub dist wheels clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-21s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# This environment's torchvision is of another build of torch: tests/timm_stub.py says why.
demo: $(VENV)/.installed ## classify handwritten digits, forecast carbon dioxide; then fused against eager
	$(BIN)/python examples/train_digits.py $(ARGS)
	$(BIN)/python tests/timm_stub.py examples/forecast_patchtsmixer.py

test: $(VENV)/.installed ## each benchmark once, then the tests
	$(if $(wildcard benchmarks/bench_*.py),$(BIN)/pytest benchmarks -q)
	$(BIN)/pytest -n $(JOBS) --dist worksteal $(ARGS)

lint: $(VENV)/.installed ## ruff; clang-format for csrc
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(if $(CSRC),$(BIN)/clang-format --dry-run --Werror $(CSRC))

format: $(VENV)/.installed ## rewrite the sources as `make lint` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(CSRC),$(BIN)/clang-format -i $(CSRC))

bench: $(VENV)/.installed ## the throughput report
	$(BIN)/pytest benchmarks --benchmark $(ARGS)

bench-cpu: $(VENV)/.installed ## models on this CPU: benchmarks/results/cpu, the README's table and plot
	$(PIP) install $(PIP_ARGS) openvino
	$(BIN)/python tools/bench_cpu.py $(ARGS)

cpu: $(VENV)/.installed ## compile the CPU kernels for the tree: mixer_kernels/_cpu
	MIXER_KERNELS_BUILD_CPU=1 MIXER_KERNELS_BUILD_CUDA=0 $(BIN)/python setup.py build_ext --inplace

cuda: $(VENV)/.installed ## compile the CUDA kernels for the tree: mixer_kernels/_C
	MIXER_KERNELS_BUILD_CUDA=1 MIXER_KERNELS_BUILD_CPU=0 $(BIN)/python setup.py build_ext --inplace

cuda-gates: $(VENV)/.installed ## nvcc on every CUDA kernel for every GPU: warnings, spills, matrix instructions
	$(BIN)/python tools/cuda_gates.py --arch $(ARCH) $(ARGS)

accuracy-by-chance: $(VENV)/.installed ## how often a right kernel misses the accuracy rule; about ten minutes on 2 cores
	$(BIN)/python tools/accuracy_by_chance.py $(ARGS)

planted: $(VENV)/.installed ## break the product in a hundred places, one at a time: the tests have to see it
	$(BIN)/python tools/planted.py --jobs 2 $(ARGS)

mutants: $(VENV)/.installed ## mutants of the kernels: make mutants ARGS="--area triton --sample 100 --minutes 30"
	$(BIN)/python tools/mutants.py --jobs 2 $(ARGS)

fuzz: $(VENV)/.installed ## 3,000 random calls and models against plain PyTorch
	$(BIN)/python tools/fuzz.py $(ARGS)

soak: $(VENV)/.installed ## ten minutes of serving by threads, with copies, training, forks beside
	$(BIN)/python tools/soak.py $(ARGS)

coverage: $(VENV)/.installed ## the tests once more, and which branches of the package they take
	$(BIN)/pytest -n $(JOBS) --dist worksteal --cov=mixer_kernels --cov-branch --cov-report=term-missing:skip-covered $(ARGS)

compile-check: $(VENV)/.installed ## compile every tile config for every GPU, without one
	$(BIN)/python -m mixer_kernels compile-check --arch $(ARCH) $(ARGS)

compile-check-oldest: $(VENV)/.installed $(OLDEST_TRITON_DIR)/.installed ## the same under the oldest tested Triton
	PYTHONPATH=$(OLDEST_TRITON_DIR) $(BIN)/python -m mixer_kernels compile-check --arch $(ARCH) $(ARGS)

gpu-day: $(VENV)/.installed ## on a machine with a GPU: do the kernels agree, how fast are they
	$(BIN)/python tools/gpu_day.py $(ARGS)

docs: $(DOCS_VENV)/.installed ## the documentation site, into build/site; links are checked
	$(DOCS_VENV)/bin/mkdocs build --strict $(ARGS)

hub: ## a kernel repository of the Hugging Face kernels library, in build/hub
	$(PYTHON) tools/make_hub.py $(ARGS)

dist: $(VENV)/.installed ## source distribution and wheel, in dist/
	$(BIN)/python -m build

wheels: ## manylinux wheels with the CPU kernels, in dist/wheels: make wheels PYTHONS="python3.10 python3.11"
	$(PYTHON) tools/wheels.py $(if $(PIP_ARGS),--pip-args="$(PIP_ARGS)") $(PYTHONS)

clean: ## remove .venv, builds and caches
	rm -rf $(VENV) $(DOCS_VENV) build dist *.egg-info .benchmarks .coverage* .hypothesis .pytest_cache .ruff_cache mixer_kernels/_C.* mixer_kernels/_cpu.* mixer_kernels/_metadata.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.requirements: requirements-dev.txt requirements-dev-no-deps.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) install $(PIP_ARGS) -r requirements-dev.txt
	$(PIP) install $(PIP_ARGS) --no-deps -r requirements-dev-no-deps.txt
	touch $@

# With the CPU kernels where there is a C++ compiler, without the CUDA ones: most of the work needs none, and `make cuda`
# compiles only what has changed.
$(VENV)/.installed: $(VENV)/.requirements pyproject.toml setup.py _build.py mixer_kernels/__init__.py
	MIXER_KERNELS_BUILD_CUDA=0 $(PIP) install $(PIP_ARGS) --no-deps -e .
	touch $@

# An environment of its own, without torch: the API reference is read from the sources.
$(DOCS_VENV)/.installed: requirements-docs.txt
	$(PYTHON) -m venv --clear $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip --disable-pip-version-check install $(PIP_ARGS) -r requirements-docs.txt
	touch $@

$(OLDEST_TRITON_DIR)/.installed: | $(VENV)/.installed
	$(PIP) install $(PIP_ARGS) --no-deps --upgrade --target $(OLDEST_TRITON_DIR) triton==$(OLDEST_TRITON)
	touch $@
