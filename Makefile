# Each target works on a fresh machine: it creates the environment and installs missing packages. An active virtual
# environment is used instead, with its own torch.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= $(or $(VIRTUAL_ENV),.venv)
WORKERS ?= 2
SECONDS ?= 120
BIN := $(VENV)/bin

# Threads per process.
export OMP_NUM_THREADS ?= 2

SOURCES := pyproject.toml setup.py build_backend.py $(wildcard csrc/*.* csrc/*/*.*)
LINTED := $(wildcard csrc/*.* csrc/*/*.* tests/*/*.cu tests/*/*.c tests/*/*/*.c)

# One thread per worker: with more threads than cores, the tests take twice as long.
ONE_THREAD := OMP_NUM_THREADS=1

# The rounding of sums depends on the instruction set. These tests are repeated without AVX-512.
ROUNDING := tests/ops/test_numerics.py tests/ops/test_centering.py

# The subset of `make test-fast`: files of every area, without the tests marked slow or run by the CUDA emulator.
FAST := $(foreach name,ops algorithm layers rules conversion optim whole_model_optimizers schedules metrics extension \
	backends bad_input docs architecture,$(wildcard tests/*/test_$(name).py))
FAST_ONLY := -m "not slow" -k "not emulator and not cuda"

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-long fuzz mutants zoo asan tsan bench codegen lint docs audit

help:
	@echo "make demo       train by every rule and compare: examples/two_routes.py"
	@echo "make test       the tests"
	@echo "make test-long  all tests, with those that take too long for every change"
	@echo "make test-fast  a subset with tests of every area, in less than a minute on two cores"
	@echo "make fuzz       random cases for SECONDS=$(SECONDS), from a random SEED unless one is given"
	@echo "make mutants    mutation testing: each fault in a copy of the code must fail a test"
	@echo "make zoo        almost 190 models of other packages, in an environment of their own; writes docs/models.md"
	@echo "make asan       the compiled ops under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make tsan       the compiled ops under ThreadSanitizer"
	@echo "make bench      the benchmarks"
	@echo "make codegen    compile every Triton kernel for sm_80, sm_90 and gfx942, and search the code for faults"
	@echo "make lint       ruff, mypy and clang-format"
	@echo "make docs       the documentation as a site, in site/"
	@echo "make audit      check that WHEEL=file.whl supports every later Python and torch"
	@echo
	@echo "The environment is $(VENV). If it has no torch, TORCH=$(TORCH) is installed; TORCH may be any pip requirement."
	@echo "WORKERS=$(WORKERS) tests run in parallel."

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Install the package in editable mode with one extra; repeated when a compiled source has changed.
$(VENV)/.pyfeedback-%: $(SOURCES) | $(BIN)/python
	@$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install "$(TORCH)"
	$(BIN)/python -m pip install --editable ".[$*]"
	@touch $@

# The packages of an extra alone, without torch and the package: docs reads the sources, and audit reads a wheel.
$(VENV)/.pyfeedback-docs $(VENV)/.pyfeedback-audit: $(VENV)/.pyfeedback-%: pyproject.toml | $(BIN)/python
	grep '^$* = ' pyproject.toml | tr '"' '\n' | grep '[=<>]=' > $@.txt
	$(BIN)/python -m pip install --requirement $@.txt
	@touch $@

demo: $(VENV)/.pyfeedback-examples
	$(BIN)/python examples/two_routes.py

test: $(VENV)/.pyfeedback-test
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations 30
	@if $(BIN)/python -c "import sys, torch; sys.exit(torch.backends.cpu.get_cpu_capability() == 'AVX2')"; then \
		$(ONE_THREAD) ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(BIN)/python -m pytest -n $(WORKERS) $(ROUNDING); \
	else echo "This processor has no AVX-512: the tests of rounding are not repeated."; fi

test-long: $(VENV)/.pyfeedback-test
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --long

test-fast: $(VENV)/.pyfeedback-test
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) $(FAST_ONLY) $(FAST)

fuzz: $(VENV)/.pyfeedback-test
	$(BIN)/python tests/fuzz/fuzz.py --seconds $(SECONDS) $(if $(SEED),--seed $(SEED))

mutants: $(VENV)/.pyfeedback-test
	$(BIN)/python tests/mutants/mutants.py

# torchvision brings its own torch.
zoo:
	$(MAKE) .cache/zoo/.pyfeedback-zoo VENV=.cache/zoo TORCH=torchvision
	$(ONE_THREAD) .cache/zoo/bin/python tests/zoo/zoo.py

# The CPU library under AddressSanitizer and UndefinedBehaviorSanitizer, or under ThreadSanitizer.
asan tsan: $(VENV)/.pyfeedback-test
	tests/extension/sanitize.sh $@ $(BIN)/python

bench: $(VENV)/.pyfeedback-test
	$(BIN)/python -m pytest benchmarks --benchmark-only

codegen: $(VENV)/.pyfeedback-test
	$(BIN)/python benchmarks/codegen.py --architectures 80 90 gfx942

lint: $(VENV)/.pyfeedback-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(LINTED)

# A warning, such as a link without a target, is an error.
docs: $(VENV)/.pyfeedback-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

audit: $(VENV)/.pyfeedback-audit
	$(BIN)/python .ci/audit_wheel.py $(WHEEL)
