# make demo    from a fresh clone to a sparse net trained beside a dense one
# make test    C++ tests (plain and under sanitizers), GPU kernels compiled and emulated, and pytest at the same time
# make help    the rest
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
PYTEST_ARGS ?=
GPU_ARGS ?=
AOT_ARGS ?=
CUDA_ARGS ?=
# The oldest Triton that the GPU kernels support, beside the installed one.
TRITON_OLD ?= triton==3.6.0
# The CUDA compiler where the machine has none.
NVCC_WHEELS ?= 'nvidia-cuda-nvcc==13.0.*' 'nvidia-cuda-crt==13.0.*' 'nvidia-nvvm==13.0.*' 'nvidia-cuda-runtime==13.0.*'
DEMO_ARGS ?= --recipe demo --compare --out runs/demo --overwrite

# CUDA kernels take minutes to compile, so .venv gets them only where an NVIDIA GPU is, and for that GPU alone; SPARSEKERN_BUILD
# and TORCH_CUDA_ARCH_LIST say otherwise. `pip install` knows no such rule (docs/install.md).
GPU_ARCHS := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | \
                     grep -x '[0-9]*\.[0-9]' | sed 's/^9\.0$$/9.0a/' | sort -u | tr '\n' ' ')
ifeq ($(strip $(GPU_ARCHS)),)
HERE := SPARSEKERN_BUILD=$${SPARSEKERN_BUILD:-cpu}
else
HERE := TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-$(strip $(GPU_ARCHS))}"
endif

BIN := $(VENV)/bin
PY := $(BIN)/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet
AOT = $(PY) -m sparsekern.backends.triton.aot --arch 80 90 100 --jobs $(JOBS) --cache build/aot/cache --quiet $(AOT_ARGS)
# What a new build of the package depends on; Python sources are used in place.
BUILD_FILES := pyproject.toml setup.py CMakeLists.txt sparsekern/_version.py $(wildcard cmake/*) \
               $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
CPP_FILES := $(shell find tests/cpp tests/emulation csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.DELETE_ON_ERROR:
.PHONY: help demo test test-cpp test-python test-aot test-aot-sample test-cuda test-nvrtc test-slow \
        lane-native lane-python bench gpu lint format wheel doctor clean

help:
	@grep -E '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed 's/:[^#]*## /\t/' | expand -t 14

# A torch that is already there (a CUDA one, say) is kept.
$(VENV)/.sk-torch:
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -c 'import torch' 2>/dev/null || $(PIP) install '$(TORCH)'
	$(PIP) install 'setuptools>=77' 'cmake>=3.24' ninja 'pybind11>=2.13'
	touch $@

$(VENV)/.sk-package: $(VENV)/.sk-torch $(BUILD_FILES)
	$(HERE) $(PIP) install --no-build-isolation -e .
	touch $@

$(VENV)/.sk-test: $(VENV)/.sk-torch $(BUILD_FILES)
	$(HERE) $(PIP) install --no-build-isolation -e '.[test]'
	touch $@ $(VENV)/.sk-package

$(VENV)/.sk-dev: $(VENV)/.sk-torch $(BUILD_FILES)
	$(HERE) $(PIP) install --no-build-isolation -e '.[dev]'
	touch $@ $(VENV)/.sk-test $(VENV)/.sk-package

# About 200 MB.
$(VENV)/.sk-triton36: $(VENV)/.sk-torch
	$(PIP) install --no-deps --upgrade --target $(VENV)/triton-3.6 '$(TRITON_OLD)' || \
	    { echo "test-aot needs $(TRITON_OLD), which could not be downloaded" >&2; exit 1; }
	touch $@

# About 100 MB to download.
$(VENV)/.sk-nvcc: $(VENV)/.sk-torch
	$(PY) cmake/nvcc.py || $(PIP) install $(NVCC_WHEELS) || \
	    { echo "test-cuda needs nvcc: no CUDA toolkit here, and its wheels could not be downloaded" >&2; exit 1; }
	touch $@

demo: $(VENV)/.sk-package ## install and train: sparse, dense and a narrower dense net, side by side
	$(BIN)/sparsekern train $(DEMO_ARGS)

LANE_JOBS := $(shell expr $(JOBS) / 2 '|' 1)
# Two lanes, because pytest keeps little more than one core busy. pytest prints as it goes, the other lane when both are
# done; the closing lines of pytest come again at the very end.
test: $(VENV)/.sk-test $(VENV)/.sk-triton36 $(VENV)/.sk-nvcc ## everything that runs in minutes
	@mkdir -p build/lanes
	@status=0; $(MAKE) --no-print-directory -k -j2 lane-python lane-native || status=$$?; \
	cat build/lanes/native; \
	grep -hE '^(FAILED|ERROR) |^make.*\*\*\*| in [0-9.]+s( \(.*\))?$$' build/lanes/native build/lanes/python; exit $$status

lane-python: SHELL := bash
lane-python:
	@set -o pipefail; $(MAKE) --no-print-directory test-python 2>&1 | tee build/lanes/python

lane-native:
	@status=0; for part in test-cpp test-cuda test-aot-sample; do \
	    $(MAKE) --no-print-directory JOBS=$(LANE_JOBS) CUDA_ARGS=--quiet $$part || status=1; \
	done >build/lanes/native 2>&1; exit $$status

# CUDA kernels are emulated under sanitizers alone: that finds more, and each run takes its time.
test-cpp: $(VENV)/.sk-torch ## C++ tests of every instruction set; again under sanitizers, with CUDA kernels emulated
	$(BIN)/cmake -S . -B build/cpp -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DSK_DEV=ON -DSK_PYTHON=OFF \
	    -DSK_EMULATION=OFF
	$(BIN)/cmake --build build/cpp --parallel $(JOBS)
	$(BIN)/ctest --test-dir build/cpp --output-on-failure
	$(BIN)/cmake -S . -B build/cpp-asan -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	    -DSK_DEV=ON -DSK_PYTHON=OFF -DSK_SANITIZE=address,undefined
	$(BIN)/cmake --build build/cpp-asan --parallel $(JOBS)
	$(BIN)/ctest --test-dir build/cpp-asan --output-on-failure

test-python: $(VENV)/.sk-test ## pytest, and the benchmarks once without timing
	$(PY) -m pytest -q tests $(PYTEST_ARGS)
	$(PY) -m pytest -q benchmarks --benchmark-disable

test-aot: $(VENV)/.sk-test $(VENV)/.sk-triton36 ## every GPU tile compiled by two Tritons and checked, without a GPU
	status=0; \
	env -u TRITON_INTERPRET $(AOT) --json build/aot/new.json || status=1; \
	env -u TRITON_INTERPRET PYTHONPATH=$(abspath $(VENV))/triton-3.6 $(AOT) --json build/aot/old.json || status=1; \
	exit $$status

test-aot-sample: ## a part of test-aot: every kernel, dtype and extreme block
	$(MAKE) --no-print-directory test-aot AOT_ARGS='--sample $(AOT_ARGS)'

test-cuda: $(VENV)/.sk-test $(VENV)/.sk-nvcc ## every CUDA kernel compiled for three GPUs and checked, without a GPU
	$(PY) -m tests.cuda_build.gate --jobs $(JOBS) $(CUDA_ARGS)

NVRTC := build/nvrtc-12.8
$(NVRTC):
	$(PIP) install --no-deps --target $@ 'nvidia-cuda-nvrtc-cu12==12.8.*'

test-nvrtc: test-cuda $(NVRTC) ## the same kernels' device code by CUDA 12.8, for two GPUs
	$(PY) -m tests.cuda_build.nvrtc $(NVRTC)/nvidia/cuda_nvrtc/lib/libnvrtc.so.12

test-slow: $(VENV)/.sk-test $(VENV)/.sk-nvcc ## tests that take minutes: clean installations, long runs
	$(PY) -m pytest -q tests -m slow $(PYTEST_ARGS)

bench: $(VENV)/.sk-test ## speed against dense PyTorch on this machine
	$(PY) -m pytest benchmarks

# No virtual environment: a machine with a GPU has its own torch and Triton, and maybe no network.
gpu: ## on a machine with a GPU: tests, limits, tuning, layers and whole nets against dense, targets (GPU_ARGS=--help)
	$(if $(wildcard $(PY)),$(PY),$(PYTHON)) -m benchmarks.gpu $(GPU_ARGS)

lint: $(VENV)/.sk-dev ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)

format: $(VENV)/.sk-dev ## format Python and C++
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

wheel: $(VENV)/.sk-test ## sdist and, from it, a wheel in dist/
	$(PY) -m build

doctor: $(VENV)/.sk-package ## what is installed and what runs here
	$(PY) -m sparsekern

clean: ## build products; .venv and runs/ stay
	rm -rf build dist *.egg-info sparsekern/_C*.so sparsekern/_build.json .pytest_cache .mypy_cache .ruff_cache
	rm -f $(VENV)/.sk-package $(VENV)/.sk-test $(VENV)/.sk-dev
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
