"""One file per family of layers; importing this registers them all. `register_layer` adds one of your own."""

from models.layers import (
    activations,
    convolution,
    dense,
    depthwise,
    dropout,
    embedding,
    fixed,
    merge,
    normalisation,
    pooling,
    recurrent,
    shaping,
)
from models.layers.gradients import PerExample, row_product
from models.layers.layer import Context, Parameter
from models.layers.registry import register_layer

__all__ = [
    "Context",
    "Parameter",
    "PerExample",
    "activations",
    "convolution",
    "dense",
    "depthwise",
    "dropout",
    "embedding",
    "fixed",
    "merge",
    "normalisation",
    "pooling",
    "recurrent",
    "register_layer",
    "row_product",
    "shaping",
]
