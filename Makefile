# Each target works as the first command on a fresh machine: it makes the environment and installs what is missing.
# In an active virtual environment that one is used, with the torch that it has.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= $(or $(VIRTUAL_ENV),.venv)
WORKERS ?= 2
SECONDS ?= 120
BIN := $(VENV)/bin

# Threads of one process; with WORKERS of them a laptop stays usable.
export OMP_NUM_THREADS ?= 2

SOURCES := pyproject.toml setup.py build_backend.py $(wildcard csrc/*.* csrc/*/*.*)
LINTED := $(wildcard csrc/*.* csrc/*/*.* tests/*.cu)

# Of each of the WORKERS: more threads than cores wait for one another, and the tests take twice as long.
ONE_THREAD := OMP_NUM_THREADS=1

# How a sum rounds depends on the instruction set: these tests run again as on a processor without AVX-512.
ROUNDING := tests/test_numerics.py tests/test_centering.py

.DEFAULT_GOAL := help
.PHONY: help demo test fuzz mutants asan tsan bench lint

help:
	@echo "make demo    train by every rule and compare: examples/two_routes.py"
	@echo "make test    the test suite"
	@echo "make fuzz    random cases for SECONDS=$(SECONDS), from a new SEED or from the one that is given"
	@echo "make mutants faults put into a copy of the code, each of which some test must find: tests/mutants.md"
	@echo "make asan    the compiled ops under AddressSanitizer and UndefinedBehaviorSanitizer; make tsan: ThreadSanitizer"
	@echo "make bench   the benchmarks"
	@echo "make lint    ruff, mypy and clang-format"
	@echo
	@echo "The environment is $(VENV); torch is installed there as TORCH=$(TORCH) unless it has one."
	@echo "TORCH may be anything that pip understands, e.g. TORCH=torch for the newest; WORKERS=$(WORKERS) tests run at once."

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The package, editable, with one extra; again whenever what is compiled has changed.
$(VENV)/.pyfeedback-%: $(SOURCES) | $(BIN)/python
	@$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install "$(TORCH)"
	$(BIN)/python -m pip install --editable ".[$*]"
	@touch $@

demo: $(VENV)/.pyfeedback-examples
	$(BIN)/python examples/two_routes.py

test: $(VENV)/.pyfeedback-test
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS)
	$(ONE_THREAD) ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(BIN)/python -m pytest -n $(WORKERS) $(ROUNDING)

fuzz: $(VENV)/.pyfeedback-test
	$(BIN)/python tests/fuzz.py --seconds $(SECONDS) $(if $(SEED),--seed $(SEED))

mutants: $(VENV)/.pyfeedback-test
	$(BIN)/python tests/mutants.py

# The CPU library under AddressSanitizer and UndefinedBehaviorSanitizer, or under ThreadSanitizer.
asan tsan: $(VENV)/.pyfeedback-test
	tests/sanitize.sh $@ $(BIN)/python

bench: $(VENV)/.pyfeedback-test
	$(BIN)/python -m pytest benchmarks --benchmark-only

lint: $(VENV)/.pyfeedback-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(LINTED)
