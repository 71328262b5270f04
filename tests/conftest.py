"""Tests that need a CUDA device are left out where there is none; `pytest -m gpu` runs them alone."""

import getpass
import os
import tempfile
from pathlib import Path

import pytest
import torch

# Inductor's cache on disk does not tell instruction sets apart (torch 2.13): code compiled for AVX-512, found under
# ATEN_CPU_CAPABILITY=avx2, gives gradients of 1e30, of a model of plain torch.nn too. Each set gets a cache of its own.
if "ATEN_CPU_CAPABILITY" in os.environ:
    _cache = f"torchinductor_{getpass.getuser()}_{os.environ['ATEN_CPU_CAPABILITY']}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir(), _cache)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if for_gpu:
        config.hook.pytest_deselected(items=for_gpu)
        items[:] = [item for item in items if item not in for_gpu]
