"""The models of the zoo, small and from their configuration: nothing is downloaded. See zoo.py.

``MODELS`` has a function for each model, which returns the model and its inputs by keyword. The first part of a name is
the package.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from zoo_inputs import CLASSES, Made
from zoo_transformers import transformers_models
from zoo_vision import vision_models


def graph_model(layer: str, edges: bool = False, **options) -> Made:
    """Two layers of a kind on a random graph."""
    layers = importlib.import_module("torch_geometric.nn")
    make = getattr(layers, layer)

    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            if layer == "GINConv":
                perceptrons = [nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)) for _ in range(2)]
                self.layers = nn.ModuleList([make(perceptron) for perceptron in perceptrons])
            else:
                self.layers = nn.ModuleList([make(6, 8, **options), make(8, CLASSES, **options)])

        def forward(self, x, edge_index, edge_type=None):
            more = () if edge_type is None else (edge_type,)
            return self.layers[1](self.layers[0](x, edge_index, *more).relu(), edge_index, *more)

    inputs = {"x": torch.randn(12, 6), "edge_index": torch.randint(12, (2, 40))}
    return Graph(), inputs | ({"edge_type": torch.randint(3, (40,))} if edges else {})


GRAPHS: dict[str, dict[str, Any]] = {
    "GCNConv": {}, "SAGEConv": {}, "GATConv": {}, "GATv2Conv": {}, "GINConv": {}, "GraphConv": {},
    "TransformerConv": {}, "RGCNConv": {"edges": True, "num_relations": 3},
}  # fmt: skip


MODELS: dict[str, Callable[[], Made]] = {
    **{f"torch_geometric.{name}": partial(graph_model, name, **options) for name, options in GRAPHS.items()},
    **transformers_models(),
    **vision_models(),
}
