"""Shared fixtures. Tests marked gpu are deselected without a CUDA device; `pytest -m gpu` runs only them.

Tests marked long are deselected unless the option --long is given, as by `make test-long`.
"""

import getpass
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from training_program import EXAMPLES, part

# Inductor's disk cache ignores the instruction set (torch 2.13): code compiled for AVX-512 and loaded under
# ATEN_CPU_CAPABILITY=avx2 returns gradients of 1e30, also for plain torch.nn. Each instruction set gets its own cache.
if "ATEN_CPU_CAPABILITY" in os.environ:
    _cache = f"torchinductor_{getpass.getuser()}_{os.environ['ATEN_CPU_CAPABILITY']}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir(), _cache)))

# What pyfeedback.tune has measured on this machine must not change what is tested.
os.environ.setdefault("PYFEEDBACK_TUNE", "off")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests marked long as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = {"gpu": not torch.cuda.is_available(), "long": not config.getoption("--long")}
    marks = [mark for mark, is_left_out in left_out.items() if is_left_out]
    kept = [item for item in items if not any(item.get_closest_marker(mark) for mark in marks)]
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept


@pytest.fixture
def example_folder(monkeypatch):
    """Make the examples importable, and use one thread here and in the processes that they start."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run_program(monkeypatch, example_folder):
    """A function that runs the training program with the given arguments in this process."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        part("train").main()

    return run
