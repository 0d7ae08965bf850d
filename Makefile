# Every target does its own set-up from a fresh clone (python3 >= 3.10, a C++ compiler, make, network) and skips what is
# done. Variables: PYTHON=python3  TORCH=2.11.0  CMAKE_ARGS="-DMARLIN_QQQ_CUDA=OFF"  MAX_JOBS=2  PYTEST_ARGS="-x"

PYTHON ?= python3
VENV ?= .venv
TORCH ?= 2.11.0
VENV_NEWEST ?= .venv-newest
PYTEST_ARGS ?=

PY := $(VENV)/bin/python
PY_NEWEST := $(VENV_NEWEST)/bin/python
BUILD = build/cmake-$(shell $(PY) -c 'import sys; print(sys.implementation.cache_tag)')
# All but the generated file.
CPP_SOURCES = git ls-files -co --exclude-standard 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/cpp/*.h' 'tests/cpp/*.cpp' \
	':!csrc/cuda/common/wgmma_int8.cuh'
WITH_TESTS = CMAKE_ARGS="-DMARLIN_QQQ_BUILD_TESTS=ON $(CMAKE_ARGS)"
export MAX_JOBS
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

# What depends on torch's binary interface: these run on every torch with the same libraries.
ABI_TESTS := $(addprefix tests/python/test_,ops.py ops_arguments.py ops_linear.py ops_torch.py)

.PHONY: help demo test test-cpp test-python test-gpu test-sanitizer test-abi test-vllm lint ptxas build format wheel clean

help:
	@echo "make demo       quantise a language model and run it through the ops"
	@echo "make test       lint, C++ tests, Python tests"
	@echo "make test-gpu   the tests that need a CUDA GPU"
	@echo "make test-sanitizer  a few of them under compute-sanitizer's memcheck, racecheck and synccheck"
	@echo "make test-abi   one build of the ops against torch $(TORCH) and the newest torch"
	@echo "make test-vllm  the plug-in inside vLLM's engine, on the CPU"
	@echo "make lint       formatters, linters, types, register spills"
	@echo "make build      environment in $(VENV), libraries in python/marlin_qqq"

# Set-up

$(VENV)/.ready: pyproject.toml scripts/bootstrap.py
	$(WITH_TESTS) $(PYTHON) scripts/bootstrap.py $(VENV) --editable dev torch==$(TORCH)
	@touch $@

build: $(VENV)/.ready
	@$(WITH_TESTS) $(PY) -W ignore setup.py -q build_ext --inplace

$(VENV_NEWEST)/.ready: scripts/bootstrap.py
	$(PYTHON) scripts/bootstrap.py $(VENV_NEWEST) torch pytest hypothesis numpy
	@touch $@

# Use

demo: build
	$(VENV)/bin/marlin-qqq demo

# Tests

test: build
	@$(MAKE) --no-print-directory lint test-cpp test-python

test-cpp: build
	ctest --test-dir $(BUILD) --output-on-failure --no-tests=error

test-python: build
	$(PY) -m pytest -m "not gpu" $(PYTEST_ARGS)

test-gpu: build
	$(PY) -m pytest -m gpu $(PYTEST_ARGS)

# Memory errors and races of the kernels, on a small grid. Without torch's cache every tensor has bounds of its own.
SANITIZER ?= compute-sanitizer
test-sanitizer: build
	for tool in memcheck racecheck synccheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool $$tool --error-exitcode 1 \
	    $(PY) -m pytest -m gpu tests/python/test_ops.py tests/python/test_ops_linear.py tests/python/test_ops_tiles.py \
	    -k "output_type_and_bias or special_rows or strided or lie_apart or (rings_that_flow and 2048-13) or \
	        (before_the_wait and 4096-7) or (any_offset and 2) or \
	        (part_of_their and (29-320 or 90-320))" || exit 1; \
	done

test-abi: build $(VENV_NEWEST)/.ready
	@sha256sum python/marlin_qqq/libmarlin_qqq*.so
	$(PY) -m pytest $(ABI_TESTS) $(PYTEST_ARGS)
	$(PY_NEWEST) -m pytest $(ABI_TESTS) $(PYTEST_ARGS)
	@sha256sum python/marlin_qqq/libmarlin_qqq*.so

# Sets up its own environments, one a vLLM version.
test-vllm:
	$(PYTHON) scripts/test_vllm.py $(PYTEST_ARGS)

lint: build ptxas
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(CPP_SOURCES) | xargs $(VENV)/bin/clang-format --dry-run -Werror

# Spills and warnings in what ptxas said, and what it does not say; nothing to do in a CPU build.
ptxas: build
	$(PY) scripts/check_ptxas.py $(BUILD)
	$(PY) scripts/check_sass.py $(BUILD)

format: $(VENV)/.ready
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(CPP_SOURCES) | xargs $(VENV)/bin/clang-format -i

wheel: $(VENV)/.ready
	$(PY) -m pip wheel --no-build-isolation --no-deps -w dist .

clean:
	rm -rf build dist python/marlin_qqq/*.so python/*.egg-info
