"""Layers with a weight and a bias, as most families store them."""

from __future__ import annotations

from multiexit_engine.checkpoint import TensorLoader
from multiexit_engine.layers.linear import Linear
from multiexit_engine.layers.norm import LayerNorm


def load_linear(loader: TensorLoader, name: str, rows: int, columns: int) -> Linear:
    """The matrix [rows, columns] and bias of a module; CheckpointError where one is missing."""
    weight = loader.load_weight(f"{name}.weight", rows, columns)
    return Linear(weight, loader.load(f"{name}.bias", rows))


def load_layer_norm(loader: TensorLoader, name: str, width: int, eps: float) -> LayerNorm:
    """The scale and shift of a module; CheckpointError where one is missing."""
    weight, bias = loader.load(f"{name}.weight", width), loader.load(f"{name}.bias", width)
    return LayerNorm(weight, bias, eps)
