"""Tests that need a CUDA device are left out where there is none; `pytest -m gpu` runs them alone."""

import pytest
import torch


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if for_gpu:
        config.hook.pytest_deselected(items=for_gpu)
        items[:] = [item for item in items if item not in for_gpu]
